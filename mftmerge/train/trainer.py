"""The loop: TRL's SFTTrainer with the mask optimiser, validation that keeps the best mask, and safe checkpoints."""

from __future__ import annotations

import math
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from mftmerge.data import IGNORE, Tokens
from mftmerge.errors import BadInput
from mftmerge.prefix import token_loss_sum
from mftmerge.train.settings import TrainSettings
from mftmerge.train.sharding import Shard

COMPLETE = "complete"  # the file that is written last into a checkpoint
BEST = "best.pt"


class MaskTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer that computes logits only where there is a label, and saves scores instead of the model."""

    best: Best | None = None
    loss_is_scaled_for_ga = True  # compute_loss divides by the labels of all accumulated batches

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        labels = inputs["labels"]
        extra = {k: inputs[k] for k in ("position_ids",) if k in inputs}
        total = token_loss_sum(self.model, inputs["input_ids"], labels, whole=model, **extra)
        count = (labels[:, 1:] != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
        # The count is over all ranks, and DDP and FSDP average gradients over ranks.
        ranks = self.accelerator.num_processes if num_items_in_batch is not None else 1
        return total * ranks / torch.as_tensor(count).clamp(min=1)

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """With FSDP2, the ranks' gradients are added up at the last of the accumulated batches."""
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Nothing: the weights are the base's, and the scores are the optimiser's state."""
        if output_dir and self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing to load for the same reason."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """With FSDP2 every rank saves the rows of the scores that it holds."""
        if not self.is_distributed_loading_by_transformers:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        os.makedirs(output_dir, exist_ok=True)
        torch.save(self.optimizer.state_dict(), self._own_state(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_distributed_loading_by_transformers:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        path = self._own_state(checkpoint)
        if not path.exists():
            raise BadInput(f"{checkpoint}: resume with as many processes as the run began with")
        self.optimizer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def _own_state(self, directory: str) -> Path:
        return Path(directory) / f"optimizer-{self.args.process_index}-of-{self.args.world_size}.pt"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint counts once its last file is there, so that one that was cut short is never used."""
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # all ranks' files are there
        directory = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and self.best is not None:
            torch.save(self.best.state_dict(), directory / BEST)
        if self.args.should_save:
            for path in directory.iterdir():
                with path.open("rb") as f:
                    os.fsync(f.fileno())
            (directory / COMPLETE).touch()


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    found = [p.parent for p in directory.glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda p: int(p.name.split("-")[1])) if found else None


class Best(TrainerCallback):  # type: ignore[misc]
    """Validates, remembers the best mask (the initial one is the first candidate), and stops early.

    losses: function that gives the validation rows' losses, shape (rows, 2), of the model as it is now; None: the last
    mask is taken. progress: called with each entry of the history.
    """

    def __init__(
        self,
        optimizer: Any,
        settings: TrainSettings,
        losses: Callable[[], Any] | None,
        progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.optimizer, self.settings, self.losses, self.progress = optimizer, settings, losses, progress
        self.history: list[dict[str, Any]] = []
        self.step, self.loss, self.rows, self.mask, self.scores = 0, math.inf, None, None, None
        self.since = 0  # validations since the best
        self.stopped_early = self.interrupted = False

    def consider(self, step: int) -> float | None:
        """Validate the mask at the final share kept, and keep it if it is the best so far."""
        rows = None
        if self.losses is not None:
            with self.optimizer.masked_by(self.optimizer.mask()):
                rows = self.losses()
            loss = float(rows[:, 0].sum() / rows[:, 1].sum())
        else:
            loss = -float(step)  # nothing to validate on: the last mask is taken
        if loss < self.loss:
            self.step, self.loss, self.rows, self.since = step, loss, rows, 0
            self.mask = self.optimizer.mask()
            self.scores = self.optimizer.scores() if self.settings.scores else None
        else:
            self.since += 1
        return loss if rows is not None else None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, last = state.global_step, state.global_step == state.max_steps
        entry: dict[str, Any] = {"step": step, "flipped": self.optimizer.flipped}
        entry["density"] = float(self.optimizer.current_keep)
        if step % self.settings.every == 0 or last:
            entry["validation"] = self.consider(step)
            if self.settings.patience and self.since >= self.settings.patience:
                control.should_training_stop = self.stopped_early = True
        if self.interrupted:
            control.should_training_stop = control.should_save = True
        self.history.append(entry)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs and self.history:
            self.history[-1] |= {"loss": logs["loss"], "lr": logs.get("learning_rate")}
            if self.progress:
                self.progress(self.history[-1])

    def state_dict(self) -> dict[str, Any]:
        state = {k: getattr(self, k) for k in ("history", "step", "loss", "rows", "mask", "scores", "since")}
        return state | {"rows": None if self.rows is None else torch.from_numpy(self.rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, value)
        self.rows = None if state["rows"] is None else state["rows"].numpy()


@contextmanager
def interruptible(best: Best) -> Iterator[None]:
    """The first SIGINT finishes the step and saves a checkpoint; a second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: Any) -> None:
        if best.interrupted:
            raise KeyboardInterrupt
        best.interrupted = True

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def schedule(optimizer: torch.optim.Optimizer, settings: TrainSettings) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up and linear decay. The first step already moves (warm-up starts at 1/n, not at 0)."""
    steps, warm = settings.steps, settings.warmup_steps

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / max(1, warm)) * min(1.0, max(0, steps - step) / max(1, steps - warm))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def make_trainer(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Tokens],
    optimizer: Any,
    settings: TrainSettings,
    directory: Path,
    *,
    save: bool,
    callbacks: Sequence[TrainerCallback] = (),
) -> MaskTrainer:
    """An SFTTrainer over tokenised rows. The learning rate's schedule is ours, clipping is the optimiser's."""
    from datasets import Dataset

    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    with warnings.catch_warnings():
        # gradient_checkpointing has another name from transformers 5.20 on; the old one works with all versions here
        warnings.simplefilter("ignore", FutureWarning)
        config = _config(model, settings, directory, save)
    config._n_gpu = min(config.n_gpu, 1)  # one process trains on one GPU; more of them need a launcher
    from transformers.trainer_callback import PrinterCallback

    trainer = MaskTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([dict(r) for r in rows]),
        processing_class=tokenizer,
        optimizers=(optimizer, schedule(optimizer, settings)),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    # Do not wrap a model whose parameters are sharded already. (Said after the trainer was made, since it would refuse
    # to save checkpoints, which are ours here.)
    trainer.is_distributed_loading_by_transformers = Shard.of(optimizer.targets[0].parameter).group is not None
    return trainer


def _config(model: Any, settings: TrainSettings, directory: Path, save: bool) -> SFTConfig:
    return SFTConfig(
        output_dir=str(directory),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        max_grad_norm=0.0,
        max_length=settings.max_length,
        packing=settings.packing,
        dataset_kwargs={"skip_prepare_dataset": not settings.packing},
        remove_unused_columns=False,
        bf16=False,  # no autocast: weights have their own dtype
        seed=settings.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=settings.log_to,
        save_strategy="steps" if save else "no",
        save_steps=settings.save_every or settings.every,
        save_total_limit=2,
        disable_tqdm=True,
        use_cpu=next(model.parameters()).device.type == "cpu",
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )

"""The training loop: batches, steps, validation that keeps the best state, checkpoints, and stops that lose nothing.

Plain torch, with accelerate for what a launcher started (DDP, the ranks' batches) and for trackers. The same loop
trains masks and, as a control, weights: what it needs of an optimiser is `Learner`.
"""

from __future__ import annotations

import math
import random
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from mftmerge.data import IGNORE
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.files import sync_file, writing
from mftmerge.loss import token_losses
from mftmerge.progress import Progress, Step
from mftmerge.train import selection
from mftmerge.train.batches import PASS_TOKENS, Batch, labelled_rows, loader, row_numbers, row_shares
from mftmerge.train.settings import TrainSettings
from mftmerge.train.sharding import Shard
from mftmerge.train.stops import Interrupted, Stops
from mftmerge.train.targets import Target
from mftmerge.train.validation import Judge, Judged, judged

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

COMPLETE = "complete"  # the file that is written last into a checkpoint: one without it is never used
Entry = dict[str, Any]  # of the history: step, and of these what is known
REPORTED = ("loss", "validation", "base", "exact", "density", "flipped", "lr", "grad_norm")


class Learner(Protocol):
    """What the loop needs of an optimiser: torch's interface, and the learnt state as `mask` and `scores`."""

    targets: list[Target]
    param_groups: list[dict[str, Any]]
    flipped: int
    gradient_norm: float

    @property
    def current_keep(self) -> Fraction | float: ...
    def step(self) -> object: ...
    def mask(self) -> dict[str, Tensor]: ...
    def scores(self) -> dict[str, Tensor]: ...
    def masked_by(self, kept: Mapping[str, Tensor]) -> AbstractContextManager[None]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, object]) -> None: ...


# -- the best state so far --------------------------------------------------------------------------------------------


class Best:
    """Validates, remembers the best mask (the initial one is the first candidate), and says when to stop early.

    judge: gives what the validation rows say of the model as it is now; None: the last mask is taken. progress: called
    after each step.
    """

    def __init__(
        self,
        optimizer: Learner,
        settings: TrainSettings,
        judge: Judge | None,
        progress: Progress | None = None,
    ) -> None:
        self.optimizer, self.settings, self.judge, self.progress = optimizer, settings, judge, progress
        self.history: list[Entry] = []
        self.base: float | None = None  # mean loss of the model as it is, shown beside each validation
        self.step, self.loss = 0, math.inf
        self.initial: Judged | None = None  # of the initial mask
        self.found: Judged | None = None  # of the best one
        self.share: float | None = None  # of right answers at the last validation
        self.key: tuple[float, ...] = (math.inf,)  # the lowest so far
        self.mask: dict[str, Tensor] | None = None
        self.scores: dict[str, Tensor] | None = None
        self.since = 0  # validations since the best
        self.stopped_early = False

    def measure(self) -> Judged | None:
        """What the validation rows say of the mask at the final share kept."""
        if self.judge is None:
            return None
        with self.optimizer.masked_by(self.optimizer.mask()):
            return judged(self.judge())

    def consider(self, step: int) -> float | None:
        """Validate the mask, and keep it if it is the best so far; gives the mean loss."""
        return self.keep(step, self.measure())

    def keep(self, step: int, found: Judged | None) -> float | None:
        """Keep the mask, which was found to be worth this, if it is the best so far; gives its mean loss."""
        if found is not None:
            self.share = found.share
            if step == 0:
                self.initial = found
        key = found.key if found is not None else (-float(step),)  # nothing to validate on: the last mask is taken
        self.since = 0 if key < self.key else self.since + 1
        if key < self.key or self.settings.keep_last:
            self.step, self.loss, self.key = step, found.loss if found else -float(step), min(key, self.key)
            self.found = found
            self.mask = self.optimizer.mask()
            self.scores = self.optimizer.scores() if self.settings.scores else None
        self.stopped_early = bool(self.settings.patience and self.since >= self.settings.patience)
        return found.loss if found is not None else None

    def report(self, what: str, entry: Entry) -> None:
        if self.progress:
            known = entry if entry.get("validation") is None else entry | {"base": self.base}
            facts = {k: known.get(k) for k in REPORTED}
            self.progress(Step(what, entry["step"], self.settings.steps, "steps", facts))

    def state_dict(self) -> dict[str, Any]:
        state = {k: getattr(self, k) for k in ("history", "step", "loss", "key", "scores", "since", "stopped_early")}
        state["mask"] = self.mask and {n: selection.packed(t) for n, t in self.mask.items()}
        return state | {k: v and v.tensors() for k, v in (("initial", self.initial), ("found", self.found))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, value and Judged.of(value) if key in ("initial", "found") else value)
        self.mask = state["mask"] and {n: selection.unpacked(*packed) for n, packed in state["mask"].items()}


# -- the loop ---------------------------------------------------------------------------------------------------------


class Loop:
    """Trains `optimizer` on tokenised rows (or what `_loader` takes); `best` validates. Make one for each run.

    place: directory for checkpoints; None: none are saved. pad: id of the padding token (which no loss sees).
    name: of the work, for progress. logs: where tensorboard's files go.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Sequence[object],
        optimizer: Learner,
        best: Best,
        settings: TrainSettings,
        *,
        pad: int = 0,
        place: Path | None = None,
        name: str = "train",
        logs: Path | None = None,
    ) -> None:
        self.model, self.optimizer, self.best, self.settings = model, optimizer, best, settings
        self.place, self.name = place, name
        self.step = 0
        self.sharded = Shard.of(optimizer.targets[0].parameter).group is not None
        # Of every rank's random states one draw decides the order of rows: the one that transformers' Trainer makes.
        set_seed(settings.seed)
        # accelerate has one state for the whole program: whoever else uses it, before or after, finds it as it was.
        self._others = dict(AcceleratorState._shared_state), dict(GradientState._shared_state)
        AcceleratorState._shared_state.clear()
        self.accelerator = Accelerator(
            cpu=model.device.type == "cpu",
            mixed_precision="no",  # no autocast: weights have their own dtype
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
            log_with=None if settings.log_to == "none" else settings.log_to,
            project_dir=logs.parent if logs else None,
        )
        self.batches = self.accelerator.prepare(self._loader(rows, pad))
        # A model whose parameters are sharded already (FSDP2) is not wrapped again.
        wrap = self.accelerator.num_processes > 1 and not self.sharded
        self.call: torch.nn.Module = self.accelerator.prepare(model) if wrap else model
        self.lr = optimizer.param_groups[0]["lr"]
        if settings.log_to != "none":
            project = logs.name if logs and settings.log_to == "tensorboard" else "mftmerge"
            flat = {k: v for k, v in settings.model_dump().items() if isinstance(v, bool | int | float | str)}
            self.accelerator.init_trackers(project, config=flat)
        self._random = random_state()
        self._due = False  # the last step's validation is still to come

    def _loader(self, rows: Sequence[Any], fill: int) -> DataLoader[object]:
        whole = self.model.device.type != "cpu" or self.sharded
        return loader(self.model, rows, self.settings.batch_size, fill, None if whole else PASS_TOKENS)

    def run(self, resume: Path | None = None) -> None:
        """Train to the last step, or until validation says that more is no use.

        resume: a checkpoint to continue from, bit for bit. Raises Interrupted after a checkpoint was saved;
        MftmergeError when a gradient is not finite (the state before that step is saved).
        """
        if resume is not None:
            self._load(resume)
            set_random_state(self._random)
        self.model.train()
        if not self.step and self.best.history:  # what was measured before the first step
            self._log(self.best.history[-1])
        with Stops(wait=self.accelerator.num_processes > 1) as stops:
            try:
                self._steps(stops)
            except Interrupted as e:
                self._save()
                raise Interrupted(e.number, self.step) from None
            except MftmergeError as e:
                self._save()
                where = "; the state before it is saved (--resume)" if self.place else ""
                raise type(e)(f"{e}{where}") from None
            finally:
                for t in self.optimizer.targets:
                    t.parameter.grad = None
                for tracker in self.accelerator.trackers:  # not `end_training`: it ends the process group too
                    tracker.finish()
                AcceleratorState._shared_state.clear()
                AcceleratorState._shared_state.update(self._others[0])
                GradientState._shared_state.update(self._others[1])

    def _steps(self, stops: Stops) -> None:
        if self._due:
            self._validate(stops)
        groups = self._groups()
        while self.step < self.settings.steps and not self.best.stopped_early:
            loss = self._gradients(next(groups))
            with stops.deferred():
                self.optimizer.param_groups[0]["lr"] = lr = self.lr * factor(self.step, self.settings)
                self.optimizer.step()
                self.step += 1
                self._random = random_state()
                self._due = self.step % self.settings.every == 0 or self.step == self.settings.steps
                entry = {"step": self.step, "flipped": self.optimizer.flipped, "loss": loss, "lr": lr}
                entry |= {"density": float(self.optimizer.current_keep), "grad_norm": self.optimizer.gradient_norm}
                self.best.history.append(entry)
                for t in self.optimizer.targets:
                    t.parameter.grad = None
            if self._due:
                self._validate(stops)
            self.best.report(self.name, entry)
            self._log(entry)
            if self._all_stop(stops):
                raise Interrupted(stops.number or signal.SIGINT)
            if self.step % (self.settings.save_every or self.settings.every) == 0 or self.step == self.settings.steps:
                with stops.deferred():
                    self._save()

    def _log(self, entry: Entry) -> None:
        self.accelerator.log({k: v for k, v in entry.items() if k != "step" and v is not None}, step=entry["step"])

    def _validate(self, stops: Stops) -> None:
        found = self.best.measure()
        with stops.deferred():  # a stop in the middle would leave what one mask is worth beside another
            self.best.history[-1]["validation"] = self.best.keep(self.step, found)
            if self.best.share is not None:
                self.best.history[-1]["exact"] = self.best.share
            self._due = False

    def _gradients(self, batches: Sequence[Batch]) -> float:
        """Gradients of the mean loss over the tokens (or rows) of one step, of all ranks; gives that loss."""
        ranks = self.accelerator.num_processes
        by_row = self.settings.loss_average == "row"
        count = sum(labelled_rows(b) if by_row else (b["labels"][:, 1:] != IGNORE).sum() for b in batches)
        count = self.accelerator.gather(torch.as_tensor(count, device=self.accelerator.device)).sum().clamp(min=1)
        total = torch.zeros((), device=self.accelerator.device)
        for i, batch in enumerate(batches):
            with self._synchronised(last=i == len(batches) - 1):
                rows = row_numbers(batch) if by_row else None
                losses, wanted = token_losses(
                    self.model, batch.pop("input_ids"), batch.pop("labels"), call=self.call, **batch
                )
                if rows is not None:
                    losses = losses * row_shares(rows[wanted])
                if not losses.requires_grad:
                    raise BadInput(
                        f"{type(self.model).__name__}: its layers hand no gradient on where those below are frozen "
                        "(reversible layers, reentrant gradient checkpointing), so no mask can be trained"
                    )
                # DDP and FSDP average gradients over ranks, and the count is of all ranks.
                loss = losses.sum() * ranks / count
                self.accelerator.backward(loss)
            total += loss.detach()
        return float(self.accelerator.gather(total).mean())

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are added up over the ranks at the last of the accumulated batches only."""
        if self.sharded:
            cast("FSDPModule", self.model).set_requires_gradient_sync(last)  # what `fully_shard` made of it
            return nullcontext()
        wait: AbstractContextManager[None] = nullcontext() if last else self.accelerator.no_sync(self.call)
        return wait

    def _groups(self) -> Iterator[list[Batch]]:
        """What each step from the next one on takes, as passes; the last step of an epoch may have fewer batches."""
        size = self.settings.accumulate
        steps_an_epoch = -(-len(self.batches) // size)
        epoch, done = divmod(self.step, steps_an_epoch)
        while True:
            self.batches.set_epoch(epoch)
            rest = self.accelerator.skip_first_batches(self.batches, done * size) if done else self.batches
            group: list[Batch] = []
            for number, batch in enumerate(rest, 1):
                if done and number == 1:  # opening an epoch draws a number, which a run that goes on has drawn already
                    set_random_state(self._random)
                group += batch
                if number % size == 0:
                    yield group
                    group = []
            if group:
                yield group
            epoch, done = epoch + 1, 0

    def _all_stop(self, stops: Stops) -> bool:
        """Whether any rank was told to stop: all ranks do so after the same step."""
        told = torch.tensor([stops.number is not None], dtype=torch.int64, device=self.accelerator.device)
        return bool(self.accelerator.gather(told).any())

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _own(self, directory: Path) -> Path:
        a = self.accelerator
        return directory / f"rank-{a.process_index}-of-{a.num_processes}.pt"

    def _save(self) -> None:
        """The state after the last whole step: scores, moments, random numbers, the best mask. The weights are the
        base model's. An older checkpoint goes once this one is complete."""
        if self.place is None:
            return
        directory = self.place / f"checkpoint-{self.step}"
        if (directory / COMPLETE).exists():
            return
        directory.mkdir(parents=True, exist_ok=True)
        main = self.accelerator.is_main_process
        state = {"random": self._random, "due": self._due}
        if main or self.sharded:  # with FSDP2 every rank holds the rows of the scores that it trains
            state["optimizer"] = self.optimizer.state_dict()
        with writing(directory):
            torch.save(state, self._own(directory))
            if main:
                torch.save(self.best.state_dict(), directory / "best.pt")
        self.accelerator.wait_for_everyone()  # all ranks' files are there
        if main:
            for path in directory.iterdir():
                sync_file(path)
            (directory / COMPLETE).touch()
            for old in self.place.glob("checkpoint-*"):
                if old != directory:
                    shutil.rmtree(old, ignore_errors=True)

    def _load(self, directory: Path) -> None:
        if not self._own(directory).exists():
            raise BadInput(f"{directory}: resume with as many processes as the run began with")
        mine = torch.load(self._own(directory), map_location="cpu", weights_only=True)
        first = directory / f"rank-0-of-{self.accelerator.num_processes}.pt"
        shared = mine if "optimizer" in mine else torch.load(first, map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(shared["optimizer"])
        self.best.load_state_dict(torch.load(directory / "best.pt", map_location="cpu", weights_only=True))
        self._random, self._due, self.step = mine["random"], mine["due"], int(directory.name.split("-")[1])


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    found = [p.parent for p in directory.glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda p: int(p.name.split("-")[1])) if found else None


# -- parts ------------------------------------------------------------------------------------------------------------


def factor(step: int, settings: TrainSettings) -> float:
    """Of the learning rate at a step from 0: linear warm-up (the first step moves already), then linear decay."""
    steps, warm = settings.steps, settings.warmup_steps
    if settings.reference_schedule:  # the published code's: transformers' linear schedule
        warm = int(settings.warmup * steps)
        return step / max(1, warm) if step < warm else max(0.0, (steps - step) / max(1, steps - warm))
    return min(1.0, (step + 1) / max(1, warm)) * min(1.0, max(0, steps - step) / max(1, steps - warm))


def random_state() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's generators, as torch.load reads them without running code."""
    kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    state = {"python": random.getstate(), "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest]}
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return state | {"torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Go on drawing from `random_state()`."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])

"""One training run from rows to a mask: `train_mask`."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment

from mftmerge import data as rows_of
from mftmerge.checkpoint import Checkpoint, resolve
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.files import replacing
from mftmerge.loading import load_causal_lm
from mftmerge.mask import Mask, MaskInfo
from mftmerge.naming import decoder_layers
from mftmerge.prefix import PrefixCache
from mftmerge.train import inputs, scores, sharding, targets
from mftmerge.train.optimizer import MaskOptimizer
from mftmerge.train.settings import TrainSettings
from mftmerge.train.sharding import Shard

log = logging.getLogger(__name__)
Progress = Callable[[dict[str, Any]], None]


@dataclass
class TrainResult:
    """What a run gives.

    mask: the best one. history: an entry a step (step, loss, lr, flipped, density, validation where it was done).
    losses: validation losses of each row, float64 (rows, 2), under "base", "initial", "mask" and, with `control`,
    "weights", "random", "magnitude". comparison: differences from the base with standard errors. gained: the trained
    mask has a lower validation loss than the base model and than the initial mask.
    """

    mask: Mask
    history: list[dict[str, Any]]
    comparison: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, Any] = field(default_factory=dict)
    best_step: int = 0
    gained: bool = False
    stopped_early: bool = False
    seconds: float = 0.0
    settings: TrainSettings = field(default_factory=lambda: TrainSettings.make({}))


def train_mask(
    model: Any,
    data: Any,
    out: str | Path | None = None,
    *,
    settings: TrainSettings | Mapping[str, Any] | None = None,
    eval_data: Any = None,
    tokenizer: Any = None,
    prefix: PrefixCache | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
    **overrides: Any,
) -> TrainResult:
    """Learn a mask over a model and write it to `out`.

    model: a checkpoint's directory or hub id, or a loaded causal LM (which is left as it was, bit for bit).
    data, eval_data: anything that `data.load_rows` takes, a list of such files (a mixture), or rows that
    `data.tokenize` made. settings and overrides: see `TrainSettings`. prefix: a cache to share between runs over one
    model. progress: called with each entry of the history; note: with what a user should read.

    Raises BadInput for what the user gave, MftmergeError when training fails; KeyboardInterrupt after SIGINT, when a
    checkpoint has been saved if `out` is given (`resume` continues from it).
    """
    given = settings.model_dump() if isinstance(settings, TrainSettings) else dict(settings or {})
    chosen = TrainSettings.make({**given, **overrides})
    target = inputs.Output(out, overwrite, resume)
    say = note or log.info
    shard = sharding.requested()  # sharded here and not by accelerate, so that the optimiser sees the shards
    with patch_environment(ACCELERATE_USE_FSDP="false", **inputs.logging_place(chosen.log_to, out)):
        loaded, tokenizer, reference = inputs.load_model(model, tokenizer, chosen, shard=shard)
        train_rows, valid_rows = inputs.read_rows(data, eval_data, tokenizer, chosen)
        run = _Run(loaded, tokenizer, reference, train_rows, valid_rows, chosen, prefix, say, progress)
        with target.directory() as directory:
            result = run.train(directory, save=out is not None, resume=target.last(directory, chosen, reference, say))
            if out is not None and inputs.is_main():
                result.mask.save(out)
                used = chosen.to_yaml(model=reference, data=inputs.named(data))
                with replacing(f"{out}.yaml") as temporary:
                    temporary.write_text(used, encoding="utf-8")
    return result


class _Run:
    """A loaded model, rows and settings, and the steps from them to a mask."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        reference: str,
        rows: list[Any],
        valid: list[Any],
        settings: TrainSettings,
        cache: PrefixCache | None,
        say: Callable[[str], None],
        progress: Progress | None,
    ) -> None:
        self.model, self.tokenizer, self.reference = model, tokenizer, reference
        self.rows, self.valid, self.settings, self.say, self.progress = rows, valid, settings, say, progress
        self.targets = targets.find(model, settings.layers, settings.modules)
        self.layers = sorted({t.layer for t in self.targets})
        self.cache = cache or self._new_cache()
        if self.cache is not None:
            self.cache.add([*rows, *valid])

    def _new_cache(self) -> PrefixCache | None:
        sharded = Shard.of(self.targets[0].parameter).group is not None  # layers that are skipped would not gather
        if self.settings.prefix == "off" or self.layers[0] == 0 or sharded:
            return None
        directory = Path(tempfile.gettempdir()) if self.settings.prefix == "disk" else None
        return PrefixCache(self.model, self.layers[0], directory=directory)

    def losses(self) -> Any:
        """Losses of the validation rows under the weights that are in the model now: shape (rows, 2)."""
        from mftmerge.loss import row_losses

        return row_losses(self.model, self.valid)

    def train(self, directory: Path, *, save: bool, resume: Path | None) -> TrainResult:
        """Train, validate, and put the model back as it was."""
        start = time.monotonic()
        flags = targets.freeze_others(self.model, self.targets)
        training, self.model.config.use_cache = self.model.training, False
        try:
            with ExitStack() as stack:
                if self.cache is not None:
                    stack.enter_context(self.cache.use())
                return self._train(directory, save, resume, start)
        finally:
            for name, p in self.model.named_parameters():
                p.requires_grad_(flags[name])
                p.grad = None
            self.model.train(training)

    def _train(self, directory: Path, save: bool, resume: Path | None, start: float) -> TrainResult:
        from mftmerge.train.trainer import Best

        losses = {"base": self.losses()} if self.valid else {}
        dropped = self._dropped()
        first = self._initial_scores(dropped)
        optimizer = self._optimizer(first, dropped)
        best = Best(optimizer, self.settings, self.losses if self.valid else None, self.progress)
        try:
            self._announce(first)
            if resume is None:
                best.consider(0)
                if self.valid:
                    best.history.append({"step": 0, "validation": best.loss, "density": float(optimizer.keep)})
                    losses["initial"] = best.rows
            if self.settings.steps:
                self._loop(optimizer, best, directory, save, resume)
        finally:
            optimizer.restore()
        if self.valid:
            losses["mask"] = best.rows
        if self.settings.control and self.valid:
            from mftmerge.train.control import run_controls

            self.say("training the matched control: the same steps on the weights")
            place = directory / "control"
            losses |= run_controls(
                self.model, self.tokenizer, self.targets, self.rows, self.settings, self.losses, place, dropped=dropped
            )
        return self._result(best, losses, first, time.monotonic() - start)

    def _loop(self, optimizer: MaskOptimizer, best: Any, directory: Path, save: bool, resume: Path | None) -> None:
        from mftmerge.train.trainer import BEST, interruptible, make_trainer

        trainer = make_trainer(
            self.model, self.tokenizer, self.rows, optimizer, self.settings, directory, save=save, callbacks=[best]
        )
        trainer.best = best
        if resume is not None:
            best.load_state_dict(torch.load(resume / BEST, weights_only=False))
        compiled = self._compile()
        try:
            with interruptible(best):
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        except MftmergeError as e:  # a gradient that is not finite: the step was not taken
            if save:
                trainer._save_checkpoint(trainer.model, None)
            raise MftmergeError(f"{e}{'; the state before it is saved (--resume)' if save else ''}") from None
        finally:
            vars(self.model).pop("forward", None)  # SFTTrainer adds its own head
            for layer in compiled:
                layer._compiled_call_impl = None
        if best.interrupted:
            where = f"; continue with --resume (saved in {directory})" if save else ""
            self.say(f"stopped after step {trainer.state.global_step}{where}")
            raise KeyboardInterrupt

    def _compile(self) -> list[Any]:
        """Compile each trained layer by itself: one graph for all of them, and hooks around it stay as they are."""
        if not self.settings.compile:
            return []
        layers = list(decoder_layers(self.model)[1])[self.layers[0] :]
        for layer in layers:
            layer.compile()
        return layers

    # -- parts --------------------------------------------------------------------------------------------------------

    def _optimizer(
        self, first: Mapping[str, torch.Tensor], dropped: Mapping[str, torch.Tensor] | None
    ) -> MaskOptimizer:
        s = self.settings
        return MaskOptimizer(
            self.targets,
            first,
            keep=str(s.keep),
            lr=s.learning_rate,
            signed=scores.is_signed(s.init),
            scope=s.scope,
            pattern=s.n_of_m,
            dropped=dropped,
            clip=s.clip,
            keep_warmup=s.keep_warmup,
            reference_rounding=s.reference_rounding,
            adam_bits=s.adam_bits,
        )

    def _dropped(self) -> dict[str, torch.Tensor] | None:
        """The base model's values of the covered parameters, for a mask over the difference."""
        if self.settings.base is None:
            return None
        other = load_causal_lm(resolve(self.settings.base), dtype=self.model.dtype)
        theirs = {n: p.detach() for n, p in other.named_parameters()}
        for t in self.targets:
            found = theirs.get(t.name)
            if found is None or found.shape != t.parameter.shape:
                raise BadInput(f"{self.settings.base}: has no tensor {t.name} of shape {tuple(t.parameter.shape)}")
        return {t.name: theirs[t.name] for t in self.targets}

    def _initial_scores(self, dropped: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        if self.settings.start is not None:
            signed = scores.is_signed(self.settings.init)
            return scores.of_mask(self.settings.start, self.model, self.targets, signed=signed)
        evidence = self._evidence(dropped) if self.settings.init == "taylor" else None
        return scores.initial(
            self.targets, self.settings.init, seed=self.settings.seed, dropped=dropped, evidence=evidence
        )

    def _evidence(self, dropped: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """Mean of dL/dW * (W - dropped) over as many rows as one training run of 8 steps sees."""
        from mftmerge.prefix import token_loss_sum

        rows = self.rows[: 8 * self.settings.batch_size]
        self.model.zero_grad()
        for row in rows:
            ids, labels = (torch.tensor([row[k]], device=self.model.device) for k in ("input_ids", "labels"))
            (token_loss_sum(self.model, ids, labels) / len(rows)).backward()
        out = {}
        for t in self.targets:
            weight = sharding.whole(t.parameter.detach())
            change = weight if dropped is None else weight - dropped[t.name]
            assert t.parameter.grad is not None
            out[t.name] = sharding.whole(t.parameter.grad).float() * change.float()
        self.model.zero_grad()
        return out

    def _announce(self, first: Mapping[str, torch.Tensor]) -> None:
        s, count = self.settings, sum(t.parameter.numel() for t in self.targets)
        cut = scores.typical_cut(first, s.keep, scores.is_signed(s.init))
        self.say(
            f"{len(self.rows)} rows, {len(self.valid)} for validation; {len(self.targets)} tensors of layers "
            f"{_ranges(self.layers)}, {count:,} weights, keep {s.pattern or s.keep}"
        )
        ratio = f" ({s.travel / cut:.1f} times)" if cut > 0 else ""
        self.say(
            f"learning rate {s.learning_rate:.2g}: scores can travel {s.travel:.4f}, the cut is at {cut:.4f}{ratio}"
        )
        if self.cache is not None:
            size = self.cache.nbytes([*self.rows, *self.valid])
            self.say(f"layers below {self.layers[0]} run once a row; their states take up to {size / 2**20:.0f} MiB")
        if self.model.device.type == "cpu" and self.model.dtype != torch.float32:
            self.say("many CPUs are several times faster in float32 (--dtype float32), which takes more memory")
        if not self.valid:
            self.say("no validation rows: the last mask is kept, whatever it is worth")

    # -- after the run ------------------------------------------------------------------------------------------------

    def _result(
        self, best: Any, losses: dict[str, Any], first: Mapping[str, torch.Tensor], seconds: float
    ) -> TrainResult:
        from mftmerge.evaluate.pairing import paired

        comparison: dict[str, Any] = {}
        for name in losses:
            comparison[name] = {"loss": float(losses[name][:, 0].sum() / losses[name][:, 1].sum())}
            if name != "base":
                d = paired(losses[name], losses["base"])
                comparison[name] |= {"difference": d.mean, "standard_error": d.standard_error, "rows": d.n}
        gained = bool(comparison) and best.step > 0 and comparison["mask"]["difference"] < 0
        mask = self._mask(best, first, comparison, gained)
        if self.valid:
            self.say(_verdict(comparison, best.step, gained))
        return TrainResult(
            mask, best.history, comparison, losses, best.step, gained, best.stopped_early, seconds, self.settings
        )

    def _mask(self, best: Any, first: Mapping[str, torch.Tensor], comparison: dict[str, Any], gained: bool) -> Mask:
        from mftmerge import naming

        checkpoint = self._checkpoint()

        def convert(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
            named = naming.to_checkpoint(self.model, tensors, names=checkpoint.names if checkpoint else None)
            return {n: t.contiguous().numpy() for n, t in named.items()}

        kept = convert(best.mask)
        validation = [[h["step"], h["validation"]] for h in best.history if h.get("validation") is not None]
        training = self.settings.model_dump(exclude={"check_memory", "log_to", "control"}, exclude_none=True) | {
            "selection": "signed" if scores.is_signed(self.settings.init) else "abs",
            "init_digest": scores.digest(first),
            "lr": self.settings.learning_rate,
            "layers": _ranges(self.layers),
            "data": rows_of.digest(self.rows),
            "rows": len(self.rows),
            "validation": validation,
            "best_step": best.step,
            "gained": gained,
        }
        info = MaskInfo(
            keep=None if self.settings.pattern else self.settings.keep,
            base=self.reference or None,
            fingerprints={n: checkpoint.fingerprint(n) for n in kept} if checkpoint else {},
            training=training,
            comparison=comparison if self.settings.control else {},
        )
        if not self.settings.scores:
            return Mask.from_bools(kept, info)
        return Mask.from_bools(kept, info, convert(best.scores), convert(first))

    def _checkpoint(self) -> Checkpoint | None:
        """The files of the model, where it has any: names and fingerprints are always theirs."""
        path = Path(self.reference) if self.reference else None
        try:
            return Checkpoint.open(path if path and path.is_dir() else resolve(self.reference))
        except BadInput:
            return None


def _verdict(comparison: Mapping[str, Any], step: int, gained: bool) -> str:
    d = comparison["mask"]
    change = f"{d['difference']:+.4f} +- {d['standard_error']:.4f} nats against the base ({d['rows']} validation rows)"
    if gained:
        return f"best mask: step {step}, {change}"
    if step == 0:
        return f"nothing was gained: no step was better than the initial mask, which is kept ({change})"
    return f"nothing was gained: the best mask (step {step}) is no better than the base ({change})"


def _ranges(numbers: Sequence[int]) -> str:
    """4,5,6,9 as "4-6,9"."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)

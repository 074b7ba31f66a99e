"""One training run from rows to a mask: `train_mask`."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mftmerge import data as rows_of
from mftmerge import naming
from mftmerge.checkpoint import Checkpoint, resolve
from mftmerge.data import Tokens
from mftmerge.errors import BadInput, worded
from mftmerge.files import write_text
from mftmerge.machine import lacks_bfloat16
from mftmerge.mask import Mask, MaskInfo
from mftmerge.matching import over_delta
from mftmerge.names import ranges
from mftmerge.naming import decoder_layers
from mftmerge.prefix import PrefixCache
from mftmerge.progress import Progress
from mftmerge.train import inputs, scores, sharding, targets
from mftmerge.train.control import run_controls
from mftmerge.train.loop import Best, Loop, random_state, set_random_state
from mftmerge.train.optimizer import MaskOptimizer
from mftmerge.train.place import Place
from mftmerge.train.results import TrainResult
from mftmerge.train.settings import TrainSettings
from mftmerge.train.validation import Judged, Validation
from mftmerge.train.verdict import advice, compared, verdict

log = logging.getLogger(__name__)
Note = Callable[[str], None]
ASIDE = {"check_memory", "control", "log_to", "preset", "save_every", "trust_remote_code"}  # do not decide the mask


def train_mask(
    model: str | Path | PreTrainedModel,
    data: object,
    out: str | Path | None = None,
    *,
    settings: TrainSettings | Mapping[str, object] | None = None,
    eval_data: object = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prefix: PrefixCache | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    note: Note | None = None,
    **overrides: object,
) -> TrainResult:
    """Learn a mask over a model and write it to `out`.

    model: a checkpoint's directory or hub id, or a loaded causal LM (which is left as it was, bit for bit).
    data, eval_data: anything that `data.load_rows` takes, a list of such files (a mixture), or rows that
    `data.tokenize` made. settings and overrides: see `TrainSettings`. prefix: a cache to share between runs over one
    model, or the setting of that name. progress: called after each step; note: with what a user should read.

    Raises BadInput for what the user gave, MftmergeError when training fails; KeyboardInterrupt after SIGINT, when a
    checkpoint has been saved if `out` is given (`resume` continues from it). SIGTERM does the same and then what it
    did before.
    """
    if isinstance(prefix, str):
        overrides["prefix"], prefix = prefix, None
    chosen = TrainSettings.of(settings, overrides)
    inputs.require_logger(chosen.log_to)
    place = Place(out, overwrite, resume, (model, data, eval_data, chosen.base, chosen.start))
    hear = note or log.info

    def say(line: str) -> None:
        hear(worded(line))

    shard = sharding.requested()  # sharded here and not by accelerate, so that the optimiser sees the shards
    with place.open() as directory, patch_environment(ACCELERATE_USE_FSDP="false"):
        raw, raw_valid = inputs.raw_rows(data, chosen), inputs.raw_rows(eval_data, chosen)
        chosen = inputs.with_dtype(chosen, model, shard=shard)
        loaded, tokenizer, reference = inputs.load_model(model, tokenizer, chosen, shard=shard)
        rows, valid = inputs.read_rows(raw, raw_valid, tokenizer, chosen, loaded, say)
        packs, chosen = inputs.packed(loaded, rows, tokenizer, chosen, say)
        chosen = chosen.settled(len(packs or rows))
        run = _Run(loaded, tokenizer, reference, rows, valid, chosen, prefix, say, progress, out)
        run.batched = packs or rows
        resumed = place.checkpoint(run.identity(), say) if out is not None else None
        with place.stoppable(say):
            result = run.train(directory, save=out is not None, resume=resumed)
        if out is not None and sharding.is_main():
            result.mask.save(out)
            sources = {"data": inputs.named(data)} | (
                {} if eval_data is None else {"eval_data": inputs.named(eval_data)}
            )
            write_text(f"{out}.yaml", chosen.to_yaml(model=reference, **sources))
    return result


class _Run:
    """A loaded model, rows and settings, and the way from them to a mask."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reference: str,
        rows: list[Tokens],
        valid: list[Tokens],
        settings: TrainSettings,
        cache: PrefixCache | None,
        say: Note,
        progress: Progress | None,
        out: str | Path | None,
    ) -> None:
        self.model, self.tokenizer, self.reference = model, tokenizer, reference
        self.rows, self.valid, self.settings, self.say, self.progress = rows, valid, settings, say, progress
        self.logs = Path(f"{out or 'mftmerge'}.logs")
        self.batched: Sequence[Any] = rows  # what a step takes: rows, or packs of them
        self.targets = inputs.with_keep(targets.find(model, settings.layers, settings.modules), settings)
        self.layers = sorted({t.layer for t in self.targets})
        self.dropped = inputs.dropped_values(model, self.targets, settings)
        sharded = sharding.Shard.of(self.targets[0].parameter).group is not None  # skipped layers would not gather
        cache = cache or PrefixCache.as_set(model, self.layers[0], "off" if sharded else settings.prefix)
        known = [*([] if settings.packing else rows), *valid]  # a pack is none of the rows
        self.cache = cache if cache is not None and cache.serves(known, rows[0], say) else None

    def identity(self) -> dict[str, Any]:
        """All that decides the mask, for a run that is to be continued."""
        settings, start = self.settings, self.settings.start
        digests = {
            "data": rows_of.digest(self.rows),
            "eval_data": rows_of.digest(self.valid),
            "model": targets.digest(self.model.named_parameters()),
        }
        if self.dropped is not None:
            digests["base"] = targets.digest(self.dropped.items())
        if start is not None:
            first = scores.of_mask(start, self.model, self.targets, signed=scores.is_signed(settings.init))
            digests["start"] = scores.digest(first)
        return settings.model_dump(exclude=ASIDE) | digests

    def train(self, directory: Path, *, save: bool, resume: Path | None) -> TrainResult:
        """Train, validate, and put the model back as it was."""
        start = time.monotonic()
        checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())
        training, drawn = self.model.training, random_state()
        if self.settings.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            with ExitStack() as stack:
                stack.enter_context(targets.learning_alone(self.model, self.targets))
                if self.cache is not None:
                    stack.enter_context(self.cache.use())
                return self._train(directory, save, resume, start)
        finally:
            self.model.train(training)
            set_random_state(drawn)  # the caller's generators too are as they were
            if self.settings.gradient_checkpointing and not checkpointing:
                self.model.gradient_checkpointing_disable()

    def _train(self, directory: Path, save: bool, resume: Path | None, start: float) -> TrainResult:
        judge = Validation(self.model, self.valid, self.tokenizer, self.settings, self.cache)
        found = {"base": judge()} if self.valid else {}
        dropped = self.dropped
        first = inputs.initial_scores(self.model, self.targets, self.rows, self.settings, dropped)
        optimizer = self._optimizer(first, dropped)
        best = Best(optimizer, self.settings, judge if self.valid else None, self.progress)
        best.base = found["base"].loss if found else None
        try:
            self._announce(first)
            if save and self.settings.steps:
                size = sum(t.parameter.numel() for t in self.targets) * self.settings.checkpoint_bytes / 2**20
                self.say(f"a checkpoint takes {size:.0f} MiB of disk, two while one is replaced ({directory})")
            if resume is None:
                best.consider(0)
                if self.valid:
                    entry = {"step": 0, "validation": best.loss, "exact": best.share, "density": float(optimizer.keep)}
                    best.history.append({k: v for k, v in entry.items() if v is not None})
            if self.settings.steps:
                self._loop(optimizer, best, directory if save else None, resume)
        finally:
            optimizer.restore()
        if self.valid:
            assert best.initial is not None
            assert best.found is not None
            found |= {"initial": best.initial, "mask": best.found}
        if self.settings.control and self.valid:
            self.say("training the matched control: the same steps on the weights")
            found |= run_controls(
                self.model,
                self.targets,
                self.batched,
                self.settings,
                judge,
                dropped=dropped,
                pad=inputs.pad_id(self.tokenizer),
                progress=self.progress,
            )
        return self._result(best, found, first, time.monotonic() - start)

    def _loop(self, optimizer: MaskOptimizer, best: Best, place: Path | None, resume: Path | None) -> None:
        loop = Loop(
            self.model,
            self.batched,
            optimizer,
            best,
            self.settings,
            pad=inputs.pad_id(self.tokenizer),
            place=place,
            logs=self.logs,
        )
        compiled = self._compile()
        try:
            loop.run(resume)
        finally:
            for layer in compiled:
                layer._compiled_call_impl = None  # torch has no public way back from `Module.compile`
            gc.collect()  # what the loop wrapped refers to itself; the scores would stay beside those of a control

    def _compile(self) -> list[torch.nn.Module]:
        """Compile each trained layer by itself: one graph for all of them, and hooks around it stay as they are."""
        if not self.settings.compile:
            return []
        layers = list(decoder_layers(self.model)[1])[self.layers[0] :]
        for layer in layers:
            layer.compile()
        return layers

    # -- parts --------------------------------------------------------------------------------------------------------

    def _optimizer(self, first: Mapping[str, Tensor], dropped: Mapping[str, Tensor] | None) -> MaskOptimizer:
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

    def _announce(self, first: Mapping[str, Tensor]) -> None:
        s, count = self.settings, sum(t.parameter.numel() for t in self.targets)
        share = targets.share(self.model, self.targets, s.layers)
        cut = scores.typical_cut(first, s.keep, scores.is_signed(s.init))
        self.say(
            f"{len(self.rows)} rows, {len(self.valid)} for validation; {len(self.targets)} tensors of layers "
            f"{ranges(self.layers)}, {count:,} weights ({share:.1%} of these layers'), "
            f"keep {s.pattern or s.keep}"
        )
        ratio = f" ({s.travel / cut:.1f} times)" if cut > 0 else ""
        self.say(
            f"learning rate {s.learning_rate:.2g}: a weight's score can travel {s.travel:.4f}; "
            f"whether the weight is kept is decided at {cut:.4f}{ratio}"
        )
        if self.cache is not None:
            known = self.valid if self.settings.packing else [*self.rows, *self.valid]
            what = "validation row" if self.settings.packing else "row"
            size = self.cache.nbytes(known) / 2**20
            self.say(f"layers below {self.layers[0]} run once a {what}; their states take up to {size:.0f} MiB")
        if self.model.device.type == "cpu" and self.model.dtype == torch.bfloat16 and lacks_bfloat16():
            self.say("this processor has no bfloat16 arithmetic: --dtype float32 is faster, and takes more memory")
        if not self.valid:
            self.say("no validation rows: the last mask is kept, whatever it is worth")

    # -- after the run ------------------------------------------------------------------------------------------------

    def _result(self, best: Best, found: dict[str, Judged], first: Mapping[str, Tensor], seconds: float) -> TrainResult:
        comparison = {name: compared(judged, found["base"], name) for name, judged in found.items()}
        gained = bool(found) and best.step > 0 and found["mask"].key < min(found["base"].key, found["initial"].key)
        mask = self._mask(best, first, comparison, gained)
        if self.valid:
            said = verdict(comparison, best.step, gained, kept_last=self.settings.keep_last)
            if not gained and self.settings.steps:
                said += f"; {advice(best.history, self.settings)}"
            self.say(said)
        return TrainResult(
            mask,
            best.history,
            comparison,
            {name: judged.losses for name, judged in found.items()},
            {name: judged.marks for name, judged in found.items() if judged.marks is not None},
            best.step,
            gained,
            best.stopped_early,
            seconds,
            self.settings,
        )

    def _mask(self, best: Best, first: Mapping[str, Tensor], comparison: dict[str, Any], gained: bool) -> Mask:
        checkpoint = self._checkpoint()

        def convert(tensors: Mapping[str, Tensor] | None) -> dict[str, Any]:
            return naming.to_arrays(self.model, tensors or {}, names=checkpoint.names if checkpoint else None)

        kept = convert(best.mask)
        validation = [[h["step"], h["validation"]] for h in best.history if h.get("validation") is not None]
        training = self.settings.model_dump(exclude={"check_memory", "log_to", "control"}, exclude_none=True) | {
            "selection": "signed" if scores.is_signed(self.settings.init) else "abs",
            "init_digest": scores.digest(first),
            "lr": self.settings.learning_rate,
            "layers": ranges(self.layers),
            "data": rows_of.digest(self.rows),
            "rows": len(self.rows),
            "validation": validation,
            "best_step": best.step,
            "gained": gained,
        }
        info = MaskInfo(
            keep=None if self.settings.pattern or any(t.keep for t in self.targets) else self.settings.keep,
            base=self.reference or None,
            fingerprints={n: checkpoint.fingerprint(n) for n in kept} if checkpoint else {},
            training=training,
            comparison=comparison if self.settings.control else {},
            **(over_delta(self.settings.base, kept) if self.settings.base else {}),
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

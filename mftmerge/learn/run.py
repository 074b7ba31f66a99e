"""One run from a recipe with open masks to masks and a plain recipe: `learn_merge`."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate.utils import patch_environment

from mftmerge import data as rows_of
from mftmerge.data import Tokens
from mftmerge.errors import BadInput
from mftmerge.evaluate.pairing import paired
from mftmerge.files import protect, write_text
from mftmerge.learn import memory
from mftmerge.learn.domains import ANSWERS, DIVERGENCE, answer, listen, measure, prompt_of, read_domain
from mftmerge.learn.experts import load
from mftmerge.learn.loop import MergeLoop
from mftmerge.learn.merging import Merging
from mftmerge.learn.optimizer import MergeOptimizer
from mftmerge.learn.parameters import first_layer
from mftmerge.learn.settings import LearnSettings
from mftmerge.learn.written import RECIPE, Learnt, mask_names, masks, plain_recipe
from mftmerge.loss import Losses
from mftmerge.mask import Mask
from mftmerge.prefix import PrefixCache
from mftmerge.progress import Progress, Step
from mftmerge.recipe.load import Recipe, load_recipe
from mftmerge.recipe.settings import MergeSettings
from mftmerge.train import inputs, sharding, targets
from mftmerge.train.loop import Best
from mftmerge.train.memory import require
from mftmerge.train.place import Place
from mftmerge.train.targets import freeze_others

log = logging.getLogger(__name__)
Note = Callable[[str], None]
SCALED = 32  # training rows of a domain from which its scale is taken, at most
REPORTED = ("base", "expert", "initial", "learnt")


@dataclass
class LearnResult:
    """What a run gives.

    masks: by name, one an expert, in the recipe's order. recipe: the plain recipe's text, in which NAME.mask stands for
    each. history: an entry a step. domains: by name, from the validation rows: the loss of "base", "expert", "initial"
    (the plain merge) and "learnt", `kept` (the share of the expert's gain that the initial and the learnt merge keep),
    `apart` (their divergence from the expert, nats a token) and `difference` with its standard error (learnt minus
    initial). best_step: 0 where no step was better than the plain merge.
    """

    masks: dict[str, Mask]
    recipe: str
    history: list[dict[str, Any]]
    domains: dict[str, dict[str, Any]] = field(default_factory=dict)
    best_step: int = 0
    gained: bool = False
    stopped_early: bool = False
    seconds: float = 0.0
    settings: LearnSettings = field(default_factory=LearnSettings)


def learn_merge(
    recipe: str | Path | Mapping[str, object],
    out: str | Path | None = None,
    *,
    data: Mapping[str, object] | None = None,
    settings: LearnSettings | Mapping[str, object] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    note: Note | None = None,
    **overrides: object,
) -> LearnResult:
    """Learn all open masks of a recipe together, and write them with a plain recipe into the directory `out`.

    recipe: a file, or its one document as a mapping, in which paths start from the current directory. An open mask is
    `mask: {learn: {data: FILE, rows: N}}` on an entry of `models:`. data: by model as the recipe names it, rows in the
    place of the file: anything that `data.load_rows` takes, or rows that `data.tokenize` made. settings and overrides:
    see `LearnSettings`. progress: called after each step; note: with what a user should read.

    Raises BadInput for what the user gave, MftmergeError when learning fails; KeyboardInterrupt after SIGINT, when a
    checkpoint has been saved if `out` is given (`resume` continues from it). SIGTERM does the same and then what it
    did before.
    """
    chosen = LearnSettings.of(settings, overrides)
    inputs.require_logger(chosen.log_to)
    say = note or log.info
    shard = sharding.requested()  # sharded here and not by accelerate, so that the optimiser sees the shards
    with (
        patch_environment(ACCELERATE_USE_FSDP="false"),
        tempfile.TemporaryDirectory(prefix="mftmerge-learn-") as scratch,
    ):
        work = Path(scratch)
        checked = _checked(recipe, work, chosen)
        place = _place(checked, out, overwrite, resume)
        with _no_empty(out), place.open() as directory:
            run = _Run(checked, work, chosen, dict(data or {}), say, progress, shard=shard)
            found = place.checkpoint(run.identity(), say) if out is not None else None
            with place.stoppable(say):
                result = run.learn(directory if out is not None else None, found)
            if out is not None and sharding.is_main():
                for name, mask in result.masks.items():
                    mask.save(Path(out) / f"{name}.mask")
                write_text(Path(out) / RECIPE, result.recipe)  # last: a directory with a recipe in it is whole
    return result


@contextmanager
def _no_empty(out: str | Path | None) -> Iterator[None]:
    """Leave no empty directory behind when the block fails."""
    try:
        yield
    except BaseException:
        if out is not None:
            with suppress(OSError):  # it holds what can be continued
                Path(out).rmdir()
        raise


def _checked(recipe: str | Path | Mapping[str, object], work: Path, settings: LearnSettings) -> Recipe:
    merge = MergeSettings(trust_remote_code=settings.trust_remote_code)
    if not isinstance(recipe, Mapping):
        return load_recipe(recipe, settings=merge, learning=True)
    path = work / RECIPE
    path.write_text(yaml.safe_dump(dict(recipe), sort_keys=False), encoding="utf-8")
    return load_recipe(path, settings=merge, learning=True)


def _place(recipe: Recipe, out: str | Path | None, overwrite: bool, resume: bool) -> Place:
    """The place of the plain recipe, which is written last, in the directory that the run writes."""
    if out is None:
        return Place(None, overwrite, resume)
    folder = Path(out)
    document = recipe.documents[0]
    read = [recipe.path, *(i.model.path for _, i in document.parts()), *(learn.data for _, learn in recipe.to_learn)]
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder}: is a file; give the name of a directory")
    protect(folder, read)
    if not folder.parent.is_dir():
        raise BadInput(f"{folder}: there is no directory {folder.parent}; make it first")
    folder.mkdir(exist_ok=True)
    return Place(folder / RECIPE, overwrite, resume, read)


class _Run:
    """A recipe, the models of its merge, their domains' rows, and the way to the masks."""

    def __init__(
        self,
        recipe: Recipe,
        work: Path,
        settings: LearnSettings,
        data: dict[str, object],
        say: Note,
        progress: Progress | None,
        *,
        shard: bool = False,
    ) -> None:
        self.recipe, self.say, self.progress = recipe, say, progress
        self.start = time.monotonic()
        self.merging = Merging(recipe, work, MergeSettings(trust_remote_code=settings.trust_remote_code))
        if unknown := sorted(set(data) - set(self.merging.names)):
            raise BadInput(
                f"data: {unknown[0]!r} is no model with an open mask; there are {', '.join(self.merging.names)}"
            )
        trusted = settings.trust_remote_code or None
        tokenizer = inputs.load_tokenizer(self.merging.directory(self.merging.base), trust_remote_code=trusted)
        self.tokenizer, self.pad = tokenizer, inputs.pad_id(tokenizer)
        wanted = zip(self.merging.names, recipe.to_learn, strict=True)
        self.domains = [
            read_domain(name, learn, data.get(name), recipe.folder, tokenizer, settings) for name, (_, learn) in wanted
        ]
        answered = all(row["labels"] for d in self.domains for row in (*d.train, *d.valid))
        self.settings = settings.settled(min(len(d.train) for d in self.domains), answered)
        changed = memory.differing(self.merging)
        if settings.check_memory and not shard:  # a rank needs less than one process would
            needed = memory.estimate(self.merging, changed, self.domains, self.settings)
            require(needed, str(recipe.path), self.settings.of_loop(), layers=False)
        self.model, self.parts, self.holders = load(self.merging, self.settings, shard=shard)
        for domain in self.domains:
            domain.train, domain.valid = self._readable(domain.train), self._readable(domain.valid)
        self.sharded = shard

    def _readable(self, rows: list[Tokens]) -> list[Tokens]:
        """The rows within the model's positions; those that an expert is to answer last, as they are."""
        answered, asked = ([r for r in rows if bool(r["labels"]) == has] for has in (True, False))
        return [*(inputs.within_positions(answered, self.model, self.say) if answered else ()), *asked]

    def identity(self) -> dict[str, Any]:
        """All that decides the masks, for a run that is to be continued."""
        rows = {d.name: rows_of.digest([*d.train, *d.valid]) for d in self.domains}
        return {"recipe": self.recipe.text, **self.settings.model_dump(), "rows": rows} | self._digests()

    def _digests(self) -> dict[str, str]:
        """Of the models as they take part in the merge, closed masks applied; sharded, of this rank's rows."""
        parts, merging = self.parts.items(), self.merging
        digest = targets.digest
        found = {"base": digest([*self.model.named_parameters(), *((n, p.base) for n, p in parts)])}
        for k, name in enumerate(merging.names):
            found[f"expert {name}"] = digest((n, p.expert(k)) for n, p in parts)
        open_ones = {merging.base, *merging.experts}
        closed = [(n, t) for n, p in parts for model, t in p.values.items() if model not in open_ones]
        return found | ({"models without an open mask": digest(closed)} if closed else {})

    def learn(self, place: Path | None, resume: Path | None) -> LearnResult:
        """Learn, validate, and make the masks."""
        s = self.settings
        rate = s.of_loop()
        optimizer = MergeOptimizer(
            self.parts,
            self.holders,
            lr=rate.learning_rate,
            start=s.start_density,
            density=s.density,
            clip=s.clip,
            adam_bits=s.adam_bits,
        )
        freeze_others(self.model, optimizer.targets)
        if s.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for number, domain in enumerate(self.domains):
            if not all(r["labels"] for r in (*domain.train, *domain.valid)):
                optimizer.put_expert(number)
                for rows in (domain.train, domain.valid):
                    answer(self.model, self.tokenizer, rows, s)
        with ExitStack() as stack:
            if (cache := self._cache(optimizer)) is not None:
                stack.enter_context(cache.use())
            self._ask_experts(optimizer)
            best = Best(optimizer, rate, self._losses if self._validates else None, self.progress)
            self._announce(optimizer, cache)
            if resume is None:
                best.consider(0)
                if self._validates:
                    best.history.append({"step": 0, "validation": best.loss, "density": optimizer.current_keep})
            if s.steps:
                MergeLoop(self.model, self.domains, optimizer, best, s, self.pad, place).run(resume)
            return self._result(optimizer, best)

    def _cache(self, optimizer: MergeOptimizer) -> PrefixCache | None:
        """Hidden states below the first layer in which any expert differs from the base."""
        how = "off" if self.sharded else self.settings.prefix  # skipped layers would not gather
        cache = PrefixCache.as_set(self.model, first_layer(self.model, optimizer.targets), how)
        rows = [r for d in self.domains for r in (*d.train, *d.valid)]
        return cache if cache is not None and cache.serves(rows, rows[0], self.say) else None

    def _ask_experts(self, optimizer: MergeOptimizer) -> None:
        """What each expert tells of its rows, and how far the base is from it: the scale of the domain's loss."""
        s = self.settings
        asked = ((DIVERGENCE, s.asks_experts), (ANSWERS, s.asks_answers))
        teachers = [column for column, wanted in asked if wanted]
        for number, domain in enumerate(self.domains):
            few = domain.train[:SCALED]
            optimizer.put_expert(number)
            if s.asks_experts:
                domain.told = listen(self.model, domain.train, s.teacher_top)
                domain.told_valid = listen(self.model, domain.valid, s.teacher_top)
            own = measure(self.model, few, domain.told[:SCALED])
            domain.measured["expert"] = measure(self.model, domain.valid, domain.told_valid)
            optimizer.put_expert(None)
            if s.base_kl:
                domain.prompts = listen(self.model, [prompt_of(row) for row in domain.train], s.teacher_top)
            base = measure(self.model, few, domain.told[:SCALED])
            domain.measured["base"] = measure(self.model, domain.valid, domain.told_valid)
            gains = (base - own).sum(0) / base[:, 2].sum()
            domain.scales = {column: float(gains[column]) * len(teachers) for column in teachers}
            if min(domain.scales.values()) <= 0:
                raise BadInput(
                    f"{domain.name}: is no better than the base on its own rows, so there is no gain to keep; "
                    "give other rows, or leave it out"
                )
            if self.progress:
                self.progress(Step("asking the experts", number + 1, len(self.domains), "runs"))
        optimizer.refresh()

    # -- validation ---------------------------------------------------------------------------------------------------

    @property
    def _validates(self) -> bool:
        return all(d.valid for d in self.domains)

    def _measured(self) -> list[Losses]:
        return [measure(self.model, d.valid, d.told_valid) for d in self.domains]

    def _losses(self) -> Losses:
        return self._over_scales(self._measured())

    def _over_scales(self, measured: Sequence[Losses]) -> Losses:
        """Of the validation rows, (rows, 2), such that sum over sum is the mean over domains of loss over scale."""
        found = []
        for domain, rows in zip(self.domains, measured, strict=True):
            tokens = rows[:, 2].sum()
            loss = sum(rows[:, column] / (scale * tokens) for column, scale in domain.scales.items())
            found.append(np.stack([loss, rows[:, 2] / tokens], 1))
        return np.concatenate(found)

    def _announce(self, optimizer: MergeOptimizer, cache: PrefixCache | None) -> None:
        s, count = self.settings, optimizer.size
        rows = ", ".join(f"{d.name} {len(d.train)} + {len(d.valid)}" for d in self.domains)
        self.say(f"rows to learn from and to validate on: {rows}")
        self.say(
            f"{len(self.domains)} masks over {len(self.parts)} tensors, {count:,} weights; {s.steps} steps of "
            f"{s.batch_size} rows of each domain; teacher: {s.teacher}"
        )
        if cache is not None:
            size = cache.nbytes([r for d in self.domains for r in (*d.train, *d.valid)])
            self.say(
                f"layers below {cache.first_layer} are the same in all models and run once a row; their states take up "
                f"to {size / 2**20:.0f} MiB"
            )
        if not self._validates:
            self.say("no validation rows: the last masks are kept, whatever they are worth")

    # -- after the run ------------------------------------------------------------------------------------------------

    def _result(self, optimizer: MergeOptimizer, best: Best) -> LearnResult:
        assert best.mask is not None
        domains = self._domains(optimizer, best) if self._validates else {}
        gained = bool(domains) and best.step > 0
        s = self.settings
        validation = [[h["step"], h["validation"]] for h in best.history if h.get("validation") is not None]
        facts = s.model_dump(exclude={"check_memory", "log_to"}, exclude_none=True) | {
            "method": self.merging.document.merge_method,
            "together": list(self.merging.names),
            "lr": s.of_loop().learning_rate,
            "rows": {d.name: len(d.train) for d in self.domains},
            "data": {d.name: rows_of.digest(d.train) for d in self.domains},
            "validation": validation,
            "best_step": best.step,
            "gained": gained,
        }
        learnt = Learnt(best.mask, *((best.scores, optimizer.scores(first=True)) if s.scores else ()))
        made = masks(self.merging, self.holders, learnt, facts, keep=s.density)
        names = mask_names(self.merging.names)
        for name, found in domains.items():
            kept, apart = found["kept"], found["apart"]
            near = f"; from its expert {apart['learnt']:.4f} nats ({apart['initial']:.4f})" if apart["base"] else ""
            self.say(f"{name}: {kept['learnt']:.0%} of its expert's gain (before learning {kept['initial']:.0%}){near}")
        if domains:
            what = f"best masks: step {best.step}" if gained else "nothing was gained: the plain merge is kept"
            base = self._over_scales([d.measured["base"] for d in self.domains]).sum(0)
            self.say(
                f"{what} (validation loss over gain {best.loss:.3f}; at step 0 {validation[0][1]:.3f}, the base's "
                f"{base[0] / base[1]:.3f})"
            )
        return LearnResult(
            dict(zip(names, made, strict=True)),
            plain_recipe(self.recipe, [f"{n}.mask" for n in names]),
            best.history,
            domains,
            best.step,
            gained,
            best.stopped_early,
            time.monotonic() - self.start,
            s,
        )

    def _domains(self, optimizer: MergeOptimizer, best: Best) -> dict[str, dict[str, Any]]:
        """What the validation rows say of each domain, as `LearnResult.domains` has it."""
        assert best.mask is not None
        measured = {}
        for name, codes in (("initial", optimizer.mask(first=True)), ("learnt", best.mask)):
            optimizer.put(codes)
            measured[name] = self._measured()
        found = {}
        for i, domain in enumerate(self.domains):
            rows = domain.measured | {name: m[i] for name, m in measured.items()}
            loss = {name: float(rows[name][:, 1].sum() / rows[name][:, 2].sum()) for name in REPORTED}
            gain = loss["base"] - loss["expert"]
            d = paired(rows["learnt"][:, 1:], rows["initial"][:, 1:])
            found[domain.name] = {
                "loss": loss,
                "kept": {n: (loss["base"] - loss[n]) / gain if gain else np.nan for n in ("initial", "learnt")},
                "apart": {n: float(rows[n][:, 0].sum() / rows[n][:, 2].sum()) for n in ("base", "initial", "learnt")},
                "difference": {"mean": d.mean, "standard_error": d.standard_error, "rows": d.n},
            }
        return found

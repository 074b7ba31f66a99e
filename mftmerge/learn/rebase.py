"""A mask on a model that has moved on: fitted to a merged or further-tuned model with a few rows.

A mask dropped weights because that helped the model it was learnt over. On another model each dropped weight is asked
again: to first order, dropping w for its other value d lowers the loss by dL/dW * (w - d). What the new model's
gradient does not confirm is kept; the rest is ordered by that gain and trained for a few steps, after which less of it
may be dropped, and never more. How much of it is dropped, if anything, validation rows decide: less than one standard
error of a gain is none. The mask as it is is a candidate too.

Rows of one domain say nothing of what others pay. With `guards`, rows of others, only what no guard's gradient speaks
against is confirmed, the steps are taken on all, and nothing is chosen under which a guard's validation rows lose.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from mftmerge.checkpoint import Checkpoint, resolve
from mftmerge.data import Tokens
from mftmerge.errors import BadInput
from mftmerge.evaluate.pairing import PairedDifference, paired
from mftmerge.files import refuse_existing
from mftmerge.learn.merging import Part, ranks
from mftmerge.learn.optimizer import MergeOptimizer
from mftmerge.learn.parameters import Holders, first_layer
from mftmerge.learn.rebasesettings import RebaseSettings
from mftmerge.loading import chosen_dtype, load_causal_lm, load_tokenizer, placed
from mftmerge.loss import Losses, labelled_logits, padded, row_losses
from mftmerge.mask import Mask, Parent
from mftmerge.matching import delta_base, match, require_base_tensors
from mftmerge.prefix import PrefixCache
from mftmerge.progress import Progress, Step
from mftmerge.train.inputs import held_out, is_tokenised, tokens_of, within_positions
from mftmerge.train.targets import freeze_others

log = logging.getLogger(__name__)
Note = Callable[[str], None]
OWN, DROPPED = "model", "dropped"  # a weight's two values
KEEP_ALL, AS_IT_IS = "keeps everything", "the mask as it is"


@dataclass
class RebaseResult:
    """What a fit gives.

    mask: the chosen one. chosen: which candidate it is. candidates: by name, on the validation rows, the paired
    difference from the model without a mask (nats a token). guards: the same of each guard, under the chosen mask.
    gained: whether a mask is better than none. dropped: the share of the covered weights that the mask drops.
    """

    mask: Mask
    chosen: str
    candidates: dict[str, PairedDifference] = field(default_factory=dict)
    guards: dict[str, PairedDifference] = field(default_factory=dict)
    gained: bool = False
    dropped: float = 0.0
    seconds: float = 0.0


def rebase_mask(
    mask: str | Path | Mask,
    model: str | Path,
    data: object,
    out: str | Path | None = None,
    *,
    base: str | Path | None = None,
    guards: Mapping[str, object] | None = None,
    settings: RebaseSettings | Mapping[str, object] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    note: Note | None = None,
    **overrides: object,
) -> RebaseResult:
    """Fit a mask to another model than it was learnt over, and write it to `out`.

    model: a merged or further-tuned checkpoint with the mask's tensors: a directory or hub id. data: rows of the mask's
    domain, some 32: anything that `data.load_rows` takes, or rows that `data.tokenize` made. base: for a mask over a
    delta, the model that dropped weights return to, where its header does not name one that is here. guards: rows of
    other domains that are not to pay for it, by name, each as `data`.

    The mask that keeps everything is a candidate; when nothing is better it is written, and `note` told so.
    Raises BadInput for what the user gave.
    """
    chosen = RebaseSettings.of(settings, overrides)
    if out is not None:
        refuse_existing(out, overwrite, (mask, model, data, base, *(guards or {}).values()))
    path = resolve(model)
    loaded = mask if isinstance(mask, Mask) else Mask.load(mask)
    name = "the mask" if isinstance(mask, Mask) else str(mask)
    fit = _Fit(loaded, name, path, str(model), delta_base(loaded, base, None), chosen, note or log.info, progress)
    result = fit.run(data, guards or {})
    if out is not None:
        result.mask.save(out, overwrite=overwrite)
    return result


class _Fit:
    """A mask, the model that it is fitted to, and the way to the fitted mask."""

    def __init__(
        self,
        mask: Mask,
        name: str,
        path: Path,
        reference: str,
        base: str | Path | None,
        settings: RebaseSettings,
        say: Note,
        progress: Progress | None,
    ) -> None:
        self.start = time.monotonic()
        self.mask, self.name, self.path, self.reference = mask, name, path, reference
        self.settings, self.say, self.progress = settings, say, progress
        self.checkpoint = Checkpoint.open(path)
        self.names = match(mask, self.checkpoint, reference)  # the model's tensor -> the mask's
        self.base = None if base is None else Checkpoint.open(resolve(base))
        if self.base is not None:
            require_base_tensors(self.names, self.checkpoint, self.base, f"base {base}")

    def run(self, data: object, guards: Mapping[str, object]) -> RebaseResult:
        s = self.settings
        train, valid = self._rows(data, "rows")
        guarding = {name: self._rows(rows, f"guard {name}") for name, rows in guards.items()}
        dtype = chosen_dtype(self.path, s.dtype)
        model = load_causal_lm(self.path, dtype=dtype, trust_remote_code=s.trust_remote_code or None)
        placed(model)

        def readable(pair: tuple[list[Tokens], list[Tokens]]) -> tuple[list[Tokens], list[Tokens]]:
            return within_positions(pair[0], model, self.say), within_positions(pair[1], model, self.say)

        train, valid = readable((train, valid))
        guarding = {name: readable(pair) for name, pair in guarding.items()}
        holders = Holders(model, self.checkpoint.names)
        targets = holders.targets(self.names)
        freeze_others(model, targets)
        learnt = [train, *(rows for rows, _ in guarding.values())]
        with ExitStack() as stack:
            cache = PrefixCache.as_set(model, first_layer(model, targets), s.prefix)
            every = [*train, *valid, *(row for pair in guarding.values() for rows in pair for row in rows)]
            if cache is not None and cache.serves(every, train[0], self.say):
                stack.enter_context(cache.use())
            parts = self._parts(holders)
            without = row_losses(model, valid)
            judged = [(name, rows, row_losses(model, rows)) for name, (_, rows) in guarding.items()]
            starts = self._starts(model, holders, parts, learnt)
            optimizer = MergeOptimizer(parts, holders, lr=s.lr, starts={n: [v] for n, v in starts.items()})
            losses = {name: self._losses(model, optimizer, codes, valid) for name, codes in self._first(parts)}
            kept = dict(self._first(parts))
            for when in ("before training", "after training") if s.steps else ("before training",):
                if when == "after training":
                    self._train(model, optimizer, learnt)
                for share in s.shares:
                    name = f"{share:g} of what may be dropped, {when}"
                    kept[name] = {n: _cut(optimizer.scores_of(n, 0), share) for n in parts}
                    losses[name] = self._losses(model, optimizer, kept[name], valid)
            candidates = {name: paired(rows, without) for name, rows in losses.items()}

            def of_guards(name: str) -> dict[str, PairedDifference]:
                codes = kept[name]
                return {n: paired(self._losses(model, optimizer, codes, rows), before) for n, rows, before in judged}

            chosen, held = self._choice(candidates, of_guards)
        return self._result(chosen, kept[chosen], candidates, held)

    def _is_gain(self, difference: PairedDifference) -> bool:
        return difference.mean + self.settings.errors * difference.standard_error < 0

    def _choice(
        self, candidates: Mapping[str, PairedDifference], guards: Callable[[str], dict[str, PairedDifference]]
    ) -> tuple[str, dict[str, PairedDifference]]:
        """The best candidate under which no guard loses, and what it does to them; KEEP_ALL where none gains."""
        for name in sorted(candidates, key=lambda n: candidates[n].mean):
            d = candidates[name]
            if not self._is_gain(d):
                break
            held = guards(name)
            loses = max(held, key=lambda g: held[g].mean, default=None)
            if loses is None or held[loses].mean <= 0:
                return name, held
            self.say(f"{name}: {d.mean:+.4f}, and {held[loses].mean:+.4f} nats on {loses}: not taken")
        return KEEP_ALL, {}  # of what gains, if anything does, the guards would pay

    def _rows(self, data: Any, what: str) -> tuple[list[Tokens], list[Tokens]]:
        s = self.settings
        if is_tokenised(data):
            rows = list(data)
        else:
            rows = tokens_of(data, load_tokenizer(self.path, trust_remote_code=s.trust_remote_code or None), s)
        wanted = s.rows or len(rows)
        if len(rows) < wanted or wanted < 4:
            raise BadInput(f"{what}: {max(wanted, 4)} are needed, the data has {len(rows)}")
        return held_out(rows, min(wanted - 2, max(2, int(wanted * s.eval_share))), s.seed, wanted)

    def _parts(self, holders: Holders) -> dict[str, Part]:
        """The covered tensors with a weight's two values: the model's, and what a dropped one becomes."""
        parts = {}
        for parameter in dict.fromkeys(holders.holder(n) for n in self.names):
            whole = holders.parameters[parameter].detach()
            for name, own in holders.split(parameter, whole).items():
                if name not in self.names:
                    raise BadInput(
                        f"{self.name}: covers only some of the tensors that the live model holds as {parameter}"
                    )
                if self.base is None:
                    other = torch.zeros_like(own)
                else:
                    other = torch.from_numpy(self.base.read_float32(name)).to(own).view(own.shape)
                parts[name] = Part(name, {DROPPED: other, OWN: own.clone()}, DROPPED, (OWN,))
        return parts

    def _gradients(self, model: PreTrainedModel, rows: Sequence[Tokens]) -> None:
        """Leave the gradient of the mean loss over the rows' tokens in the parameters."""
        tokens = sum(sum(label >= 0 for label in row["labels"][1:]) for row in rows)
        model.train()
        for at in range(0, len(rows), self.settings.batch_size):
            ids, labels, attention = padded(rows[at : at + self.settings.batch_size], model.device)
            logits, wanted, _ = labelled_logits(model, ids, labels, attention_mask=attention)
            (cross_entropy(logits.float(), wanted, reduction="sum") / tokens).backward()

    def _gains(
        self, model: PreTrainedModel, holders: Holders, parts: Mapping[str, Part], rows: Sequence[Tokens]
    ) -> Iterator[tuple[str, Tensor]]:
        """By how much dropping each weight lowers the rows' loss, to first order."""
        self._gradients(model, rows)
        for parameter in dict.fromkeys(holders.holder(n) for n in parts):
            gradient = holders.parameters[parameter].grad
            assert gradient is not None
            for name, g in holders.split(parameter, gradient).items():
                yield name, g.float() * parts[name].change(0)
            holders.parameters[parameter].grad = None

    def _starts(
        self,
        model: PreTrainedModel,
        holders: Holders,
        parts: Mapping[str, Part],
        learnt: Sequence[Sequence[Tokens]],
    ) -> dict[str, Tensor]:
        """Scores to start from: minus the rank of the gain where the mask drops and the gradient confirms it, which is
        what may be dropped; infinite elsewhere, which no step brings below 0. learnt: the domain's rows, and those of
        each guard."""
        confirmed = {}
        for name, part in parts.items():
            dropped = ~torch.from_numpy(self.mask.kept(self.names[name]))
            confirmed[name] = dropped.to(part.base.device)
        for rows in learnt[1:]:
            for name, gain in self._gains(model, holders, parts, rows):
                confirmed[name] &= gain >= 0
        found = {}
        for name, gain in self._gains(model, holders, parts, learnt[0]):
            confirmed[name] &= gain > 0
            first = ranks(torch.where(confirmed[name], gain, 0))
            found[name] = torch.where(confirmed[name], -first, torch.inf)
        return found

    def _first(self, parts: Mapping[str, Part]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The candidates that nothing is learnt for."""
        yield KEEP_ALL, {n: torch.ones(p.shape, dtype=torch.uint8) for n, p in parts.items()}
        yield AS_IT_IS, {n: torch.from_numpy(self.mask.kept(self.names[n]).astype(np.uint8)) for n in parts}

    def _losses(
        self, model: PreTrainedModel, optimizer: MergeOptimizer, codes: Mapping[str, Tensor], rows: Sequence[Tokens]
    ) -> Losses:
        with optimizer.masked_by(codes):
            return row_losses(model, rows)

    def _train(self, model: PreTrainedModel, optimizer: MergeOptimizer, learnt: Sequence[Sequence[Tokens]]) -> None:
        """A step on a batch of each of `learnt`, so many times."""
        s, order = self.settings, random.Random(self.settings.seed)
        queues: list[list[Tokens]] = [[] for _ in learnt]
        for step in range(s.steps):
            for queue, rows in zip(queues, learnt, strict=True):
                while len(queue) < s.batch_size:
                    queue += order.sample(list(rows), len(rows))
                self._gradients(model, queue[: s.batch_size])
                del queue[: s.batch_size]
            optimizer.param_groups[0]["lr"] = s.lr * (1 - step / s.steps)
            optimizer.step()
            for t in optimizer.targets:
                t.parameter.grad = None
            if self.progress:
                self.progress(Step("fitting", step + 1, s.steps, "steps"))

    def _result(
        self,
        chosen: str,
        kept: Mapping[str, Tensor],
        candidates: dict[str, PairedDifference],
        guards: dict[str, PairedDifference],
    ) -> RebaseResult:
        gained = chosen != KEEP_ALL
        d = candidates[chosen]
        facts = self.settings.model_dump(exclude_none=True) | {
            "chosen": chosen,
            "gained": gained,
            "difference": d.mean,
            "standard_error": d.standard_error,
        }
        if guards:
            facts["guards"] = {name: held.mean for name, held in guards.items()}
        old = self.mask.info
        info = replace(
            old,
            keep=None,
            base=self.reference,
            fingerprints={n: self.checkpoint.fingerprint(n) for n in kept},
            training=facts,
            comparison={},
            operation="rebase",
            options={},
            parents=(Parent(Path(self.name).name, self.mask.digest, None, old.operation, old.options, old.parents),),
            delta_fingerprints={} if self.base is None else {n: self.base.fingerprint(n) for n in kept},
        )
        made = Mask.from_bools({n: code.cpu().numpy() != 0 for n, code in kept.items()}, info)
        before = candidates[AS_IT_IS]
        self.say(f"as it is the mask changes the loss by {before.mean:+.4f} +- {before.standard_error:.4f} nats")
        if gained:
            self.say(f"{chosen}: {d.mean:+.4f} +- {d.standard_error:.4f} nats, {1 - made.density():.2%} dropped")
        else:
            paid = " but at a guard's cost" if any(map(self._is_gain, candidates.values())) else ""
            self.say(f"there is nothing to gain on this model{paid}: the mask that keeps everything is written")
        for name, held in guards.items():
            self.say(f"guard {name}: {held.mean:+.4f} +- {held.standard_error:.4f} nats")
        seconds = time.monotonic() - self.start
        return RebaseResult(made, chosen, candidates, guards, gained, 1 - made.density(), seconds)


def _cut(scores: Tensor, share: float) -> Tensor:
    """Codes that drop this share of the weights with a score below 0, those with the lowest scores."""
    below = scores < 0
    count = int(share * int(below.sum()))
    kept = torch.ones(scores.shape, dtype=torch.uint8, device=scores.device)
    if count:
        kept.view(-1)[torch.argsort(scores.reshape(-1), stable=True)[:count]] = 0
    return kept

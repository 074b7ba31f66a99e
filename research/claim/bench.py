"""A fine-tuned base in memory: what is trained over it, and what every state of it is measured by."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mftmerge.evaluate.generation import Marker, Marks, agree
from mftmerge.loss import row_losses
from mftmerge.prefix import PrefixCache
from mftmerge.train import scores
from mftmerge.train.control import WeightOptimizer
from mftmerge.train.inputs import pad_id
from mftmerge.train.loop import Best, Loop
from mftmerge.train.optimizer import MaskOptimizer
from mftmerge.train.settings import TrainSettings
from mftmerge.train.targets import find, freeze_others
from mftmerge.train.validation import Judged
from research.claim import functions
from research.claim.common import DOMAINS, Row, Tokens, load, read_rows, write_json
from research.claim.lora import LoraOptimizer

Weights = dict[str, Tensor]
VALIDATED, TESTED = 160, 600
OTHERS = 100  # test rows of each other domain, for what a state forgets


@dataclass(frozen=True)
class Cell:
    """One run over a base. what: mask, weights or lora; keep and init for masks, rank for lora.

    delta: checkpoint whose values dropped weights take.
    """

    name: str
    what: str = "mask"
    lr: float = 0.0
    keep: float = 0.9
    init: str = "magnitude"
    rank: int = 0
    delta: str | None = None


def _rounded(losses: np.ndarray) -> list[list[float]]:
    """Rows' losses and tokens, as they are recorded."""
    return [[round(float(s), 4), int(n)] for s, n in losses]


class States(Best):
    """Remembers the last state, and the best ones by validation loss and by exact match on the same rows."""

    def __init__(self, optimizer: Any, settings: TrainSettings, bench: Bench) -> None:
        super().__init__(optimizer, settings, None, lambda step: print("  ", step.done, dict(step.facts), flush=True))
        self.bench = bench
        self.states: dict[str, tuple[tuple[float, ...], int, Weights]] = {}
        self.course: list[dict[str, Any]] = []
        self._seen: tuple[Weights, float, float | None] | None = None

    def measure(self) -> None:
        state = self.optimizer.mask()
        with self.optimizer.masked_by(state):
            self._seen = (state, *self.bench.validate())

    def keep(self, step: int, found: Judged | None) -> float | None:
        """Keep what was measured last, wherever it is the best so far; `found` says nothing here."""
        assert self._seen is not None
        state, loss, exact = self._seen
        self.course.append({"step": step, "loss": loss, "exact": exact})
        print("  ", self.course[-1], flush=True)
        values: dict[str, tuple[float, ...]] = {"loss": (loss,), "last": (-float(step),)}
        if exact is not None:
            values["exact"] = (-exact, loss)
        for how, value in values.items():
            if how not in self.states or value < self.states[how][0]:
                self.states[how] = (value, step, state)
        return loss


class Bench:
    """A base, its rows, and the records in `out`, one file a state; what is there is not done again."""

    def __init__(
        self,
        base: str | Path,
        domain: str,
        folder: Path,
        out: Path,
        seed: int,
        layers: str,
        answers: tuple[str, ...] = ("validation", "test"),
        tested: int = TESTED,
        learnt: str = "train",
    ) -> None:
        """answers: the splits whose answers are written and marked; of the others only the loss is known. "functions":
        those with tests, which are completed and run wherever the test rows' loss is measured.

        tested: test rows. learnt: split that is trained on.
        """
        self.domain, self.out, self.seed, self.layers = DOMAINS[domain], out, seed, layers
        self.model, self.tokenizer = load(base)
        rows = read_rows(self.domain, folder, self.tokenizer)
        self.train: list[Tokens] = [tokens for _, tokens in rows[learnt]]
        self.rows = {"validation": rows["validation"][:VALIDATED], "test": rows["test"][:tested]}
        self.targets = find(self.model, layers)
        freeze_others(self.model, self.targets)
        self.originals = {t.name: t.parameter.detach().clone() for t in self.targets}
        self.cache = PrefixCache(self.model, min(t.layer for t in self.targets))
        self.markers: dict[str, Marker] = {}
        self.drafts: dict[str, list[list[int]] | None] = {}
        for split, found in self.rows.items():
            self.cache.add([tokens for _, tokens in found])
            if split not in answers:
                continue
            raw = [row for row, _ in found]
            self.markers[split] = self._marker(raw, exact=self.domain.exact)
        if "functions" in answers:
            self.functions = functions.rows()
            self.markers["functions"] = self._marker(self.functions)
        self.cache.add(self.train)
        self.others: dict[str, list[Tokens]] = {}
        for other in DOMAINS.values():
            if other.name != domain:
                test = read_rows(other, folder, self.tokenizer, ("test",))["test"][:OTHERS]
                self.others[other.name] = [tokens for _, tokens in test]
                self.cache.add(self.others[other.name])

    def _marker(self, rows: list[Row], **more: Any) -> Marker:
        return Marker(rows, self.tokenizer, max_new_tokens=self.domain.new_tokens, batch_tokens=4096, **more)

    def measure(self, split: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Losses, (rows, 2), of the model as it is, and marks, (rows,), by name; none where answers are not asked for.

        exact: by the domain's rule; executed: whether the query that was written selects what the row's own selects;
        passed: of the functions with tests, which pass them, (functions,).
        """
        with self.cache.use():
            losses = row_losses(self.model, [tokens for _, tokens in self.rows[split]])
        marks = {}
        if split in self.markers:
            found = self._answered(split)
            marks["exact"] = found.metrics["exact"][:, 0]
            if self.domain.executed and split == "test":
                pairs = zip(found.answers, self.markers[split].asked, strict=True)
                marks["executed"] = np.array([agree("sql", answer, question) for answer, question in pairs])
        if split == "test" and "functions" in self.markers:
            marks["passed"] = functions.passed(self.functions, self._answered("functions").answers)
        return losses, marks

    def _answered(self, name: str) -> Marks:
        """What the model answers. The drafts are always the base's own answers: their lower states are in the cache."""
        marker = self.markers[name]
        with self.cache.use():
            found = marker(self.model)
        if name not in self.drafts:
            self.cache.add(marker.drafts)
            self.drafts[name] = marker.ids
        marker.ids = self.drafts[name]
        return found

    def validate(self) -> tuple[float, float | None]:
        losses, marks = self.measure("validation")
        return float(losses[:, 0].sum() / losses[:, 1].sum()), float(marks["exact"].mean()) if marks else None

    @contextmanager
    def using(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The model with other weights; its own afterwards."""
        with torch.no_grad():
            for t in self.targets:
                t.parameter.copy_(weights.get(t.name, t.parameter))
        try:
            yield
        finally:
            with torch.no_grad():
                for t in self.targets:
                    t.parameter.copy_(self.originals[t.name])

    def record(self, name: str, weights: Mapping[str, Tensor], **facts: Any) -> None:
        """Measure a state on the test rows."""
        path = self.out / f"{name}.json"
        if path.exists():
            return
        with self.using(weights):
            losses, marks = self.measure("test")
            with self.cache.use():
                others = {n: row_losses(self.model, found) for n, found in self.others.items()}
        rows = _rounded(losses)
        facts["others"] = {n: _rounded(found) for n, found in others.items()}
        right = {how: found.astype(int).tolist() for how, found in marks.items()}
        write_json(path, {"name": name, "loss": rows, **right, **facts})
        shares = {how: round(float(found.mean()), 4) for how, found in marks.items()}
        print(name, round(losses[:, 0].sum() / losses[:, 1].sum(), 4), shares, facts.get("step"), flush=True)

    # -- runs ---------------------------------------------------------------------------------------------------------

    @property
    def kept(self) -> tuple[str, ...]:
        """Which states of a run are recorded."""
        return ("last", "loss", "exact") if "validation" in self.markers else ("last", "loss")

    def done(self, cell: Cell) -> bool:
        return all((self.out / f"{cell.name} {how}.json").exists() for how in self.kept)

    def run(self, cell: Cell, steps: int) -> None:
        """Train and record the last state and the two best ones (which may be the same or the first one)."""
        if self.done(cell):
            return
        given = {"steps": steps, "layers": self.layers, "lr": cell.lr, "keep": cell.keep, "init": cell.init}
        settings = TrainSettings.make(given | {"seed": self.seed, "eval_every": math.ceil(steps / 4)})
        torch.manual_seed(self.seed)
        optimizer = self._optimizer(cell, settings)
        print(cell, flush=True)
        best = States(optimizer, settings, self)
        try:
            best.consider(0)
            with self.cache.use():
                Loop(self.model, self.train, optimizer, best, settings, pad=pad_id(self.tokenizer)).run()
        finally:
            optimizer.restore()
        facts = {"cell": vars(cell), "steps": steps, "course": best.course, "seed": self.seed}
        facts |= {"flipped": [h.get("flipped") for h in best.history][:12]}
        for how in self.kept:
            _, step, state = best.states[how]
            with optimizer.masked_by(state):
                weights = {t.name: t.parameter.detach().clone() for t in self.targets}
            optimizer.restore()
            same = [other for other in self.kept if other != how and best.states[other][1] == step]
            twin = next(
                (self.out / f"{cell.name} {o}.json" for o in same if (self.out / f"{cell.name} {o}.json").exists()),
                None,
            )
            if twin:  # the same state again
                write_json(
                    self.out / f"{cell.name} {how}.json", json.loads(twin.read_text()) | {"name": f"{cell.name} {how}"}
                )
            else:
                self.record(f"{cell.name} {how}", weights, step=step, **facts)
        del optimizer, best
        gc.collect()

    def _optimizer(self, cell: Cell, settings: TrainSettings) -> Any:
        if cell.what == "weights":
            return WeightOptimizer(self.targets, cell.lr)
        if cell.what == "lora":
            return LoraOptimizer(self.targets, cell.lr, rank=cell.rank)
        dropped = self.values_of(cell.delta) if cell.delta else None
        start = scores.initial(self.targets, cell.init, seed=self.seed, dropped=dropped)
        options: dict[str, Any] = {"signed": scores.is_signed(cell.init), "dropped": dropped}
        return MaskOptimizer(self.targets, start, keep=str(cell.keep), lr=cell.lr, **options)

    def values_of(self, checkpoint: str) -> Weights:
        """Another model's values of the targets."""
        other, _ = load(checkpoint)
        found = {n: p.detach() for n, p in other.named_parameters()}
        return {t.name: found[t.name].clone() for t in self.targets}

    def random_mask(self) -> Weights:
        """A tenth of each matrix dropped at random."""
        draw = torch.Generator().manual_seed(1000 + self.seed)
        return {n: w * (torch.rand(w.shape, generator=draw) >= 0.1) for n, w in self.originals.items()}

    def smallest(self, *, rows: bool) -> Weights:
        """Without the tenth of the weights (or of the output rows) that is smallest in (mean) magnitude."""
        out = {}
        for n, w in self.originals.items():
            size = w.abs().mean(1) if rows else w.abs().flatten()
            drop = size.argsort(stable=True)[: int(0.1 * len(size))]
            kept = torch.ones_like(size, dtype=torch.bool).index_fill(0, drop, False)
            out[n] = w * (kept[:, None] if rows else kept.view_as(w))
        return out

    def signal(self, batches: int = 12, size: int = 8) -> dict[str, float]:
        """How far score gradients of different rows agree: what a rule for the learning rate could be made from.

        agreement: share of weights near the cut whose gradient has the same sign in two halves of the rows. share: of
        the mean squared gradient of a batch, the part that is the same for all batches.
        """
        start = scores.initial(self.targets)
        optimizer = MaskOptimizer(self.targets, start)
        halves: list[dict[str, Tensor]] = [{}, {}]
        squares = 0.0
        from mftmerge.loss import padded, token_losses

        with self.cache.use():
            for number in range(batches):
                ids, labels, seen = padded(self.train[number * size : (number + 1) * size])
                token_losses(self.model, ids, labels, attention_mask=seen)[0].mean().backward()
                for name, g in optimizer.score_gradients().items():
                    squares += float(g.double().square().sum()) / batches
                    half = halves[number % 2]
                    half[name] = half.get(name, 0) + g / (batches / 2)
                for t in self.targets:
                    t.parameter.grad = None
        optimizer.restore()
        a, b = (torch.cat([h[t.name].flatten() for t in self.targets]) for h in halves)
        agreement = float((a.sign() == b.sign()).float().mean())
        inner = float((a.double() * b.double()).sum())  # unbiased for the square of the mean gradient
        return {"agreement": agreement, "share": inner / squares, "norm": math.sqrt(squares)}

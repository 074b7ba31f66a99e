"""Numbers of the page: losses, shares of the experts' gains, their errors over test rows, and the goal by lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mftmerge.evaluate.pairing import paired
from research.learning.common import Cells

RESAMPLES = 2000


@dataclass(frozen=True)
class Record:
    """The cells of one setting. A model's cells are `seedN/MODEL`; the base has one for all seeds."""

    cells: dict[str, dict[str, Any]]

    @classmethod
    def load(cls, path: Path) -> Record:
        return cls(Cells(path).found)

    @property
    def domains(self) -> list[str]:
        return list(self.cells["study"]["domains"])

    @cached_property
    def seeds(self) -> list[str]:
        """Seeds whose experts are all there."""
        found = sorted({n.split("/")[0] for n in self.cells if "/" in n})
        return [s for s in found if all(f"{s}/expert {d}" in self.cells for d in self.domains)]

    def seeds_of(self, *models: str) -> list[str]:
        """The seeds that have all of these models."""
        return [s for s in self.seeds if all(m == "base" or f"{s}/{m}" in self.cells for m in models)]

    @cached_property
    def models(self) -> list[str]:
        """What was measured in some seed, in the order of measuring."""
        return list(dict.fromkeys(n.split("/", 1)[1] for n in self.cells if n.split("/")[0] in self.seeds))

    def tokens(self, domain: str) -> Any:
        return np.array(self.cells["tokens"][domain], np.float64)

    def sums(self, model: str, domain: str, seeds: list[str]) -> Any:
        """Loss sums of the test rows, shape (seeds, rows)."""
        names = [model if model == "base" else f"{s}/{model}" for s in seeds]
        return np.array([self.cells[n]["test"][domain] for n in names], np.float64)

    def has(self, model: str, domain: str, seeds: list[str]) -> bool:
        return all(domain in self.cells[f"{s}/{model}"]["test"] for s in seeds)

    def loss(self, model: str, domain: str) -> float:
        """Nats a token, mean over the seeds that measured it."""
        seeds = [s for s in self.seeds_of(model) if model == "base" or self.has(model, domain, [s])]
        return float(self.sums(model, domain, seeds).mean(0).sum() / self.tokens(domain).sum())

    def difference(self, model: str, reference: str, domain: str) -> tuple[float, float]:
        """`model` minus `reference` in nats a token over their common seeds, and the paired error over test rows."""
        tokens, seeds = self.tokens(domain), self.seeds_of(model, reference)
        a, b = (np.stack([self.sums(m, domain, seeds).mean(0), tokens], 1) for m in (model, reference))
        found = paired(a, b)
        return found.mean, found.standard_error

    def share(self, model: str, domain: str) -> tuple[float, float, float]:
        """Share of the expert's gain that a model keeps, and a 95 % interval.

        Gains are means over the model's seeds. The interval is a percentile bootstrap over test rows, the same rows
        drawn for base, expert and model; it says nothing about other seeds, whose spread `by_seed` shows.
        """
        seeds = self.seeds_of(model)
        base, own, found = (self.sums(m, domain, seeds).mean(0) for m in ("base", f"expert {domain}", model))
        n = len(base)
        drawn = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
        shares = (base - found)[drawn].sum(1) / (base - own)[drawn].sum(1)
        low, high = np.quantile(shares, [0.025, 0.975])
        return float((base - found).sum() / (base - own).sum()), float(low), float(high)

    def by_seed(self, model: str, domain: str) -> list[float]:
        """The share in each seed."""
        seeds = self.seeds_of(model)
        base, own, found = (self.sums(m, domain, seeds).sum(1) for m in ("base", f"expert {domain}", model))
        return [float(x) for x in (base - found) / (base - own)]

    def lowest(self, model: str) -> list[float]:
        """The lowest share over domains, by seed."""
        return [min(s) for s in zip(*(self.by_seed(model, d) for d in self.domains), strict=True)]

    def fact(self, model: str, key: str) -> list[Any]:
        """What the cells say about a model, by seed."""
        return [self.cells[f"{s}/{model}"]["facts"].get(key) for s in self.seeds_of(model)]


@dataclass(frozen=True)
class Verdict:
    """One line of the goal. met: None where a difference is within two standard errors: level."""

    what: str
    met: bool | None
    numbers: str


def decided(mean: float, error: float) -> bool | None:
    """Whether a difference is below 0; None within two standard errors of it."""
    return None if abs(mean) <= 2 * error else mean < 0


def ahead(record: Record, model: str, reference: str, domain: str, errors: float) -> bool:
    """Whether a model's loss is lower than the reference's by more than so many standard errors."""
    mean, error = record.difference(model, reference, domain)
    return mean < -errors * error


def verdicts(
    record: Record, ours: str, few: Sequence[tuple[int, str]], without_data: list[str], long: dict[str, str]
) -> list[Verdict]:
    """The goal, checked. ours: the model that is judged with 100 rows; few: those with fewer, and how many."""
    found = []
    for d in record.domains if record.seeds_of(ours) else []:
        share, by_seed = record.share(ours, d)[0], record.by_seed(ours, d)
        numbers = f"{100 * share:.1f} %, lowest seed {100 * min(by_seed):.1f} %"
        found.append(
            Verdict(
                f"98 % of the gain of {long[d]} with 100 rows, lowest seed 95 %",
                share >= 0.98 and min(by_seed) >= 0.95,
                numbers,
            )
        )
    measured = [m for m in without_data if record.seeds_of(m, ours)]
    for d in record.domains if measured else []:
        behind = [m for m in measured if not ahead(record, ours, m, d, 2)]
        best = min(measured, key=lambda m: record.loss(m, d))
        mean, error = record.difference(ours, best, d)
        numbers = f"best without data: {best}; difference {mean:+.3f} ± {error:.3f}"
        found.append(
            Verdict(f"ahead of every merge without data on {long[d]} by two standard errors", not behind, numbers)
        )
    for count, model in ((100, ours), *few):
        tuned = f"fine-tuning by answers, {count} rows"
        goals = {d: f"ahead of fine-tuning the merge on the same {count} rows on {long[d]}" for d in record.domains}
        goals = (goals if count < 100 else {}) | {"other": f"less forgetting than fine-tuning at {count} rows"}
        for d, goal in goals.items() if record.seeds_of(model, tuned) else []:
            mean, error = record.difference(model, tuned, d)
            kind = "" if model == ours else " (sums)" if model.startswith("masks") else " (selection)"
            found.append(Verdict(goal + kind, decided(mean, error), f"{mean:+.3f} ± {error:.3f}"))
    return found

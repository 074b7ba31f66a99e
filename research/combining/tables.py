"""Numbers of the page: gains, shares of a domain's own gain, errors over test rows, spread over seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mftmerge.evaluate.pairing import paired

RESAMPLES = 2000


@dataclass(frozen=True)
class Study:
    """One base model's records. seeds: "seed0", ...; domains in the order of the study."""

    raw: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> Study:
        return cls(json.loads(path.read_text(encoding="utf-8")))

    @property
    def domains(self) -> list[str]:
        return list(self.raw["study"]["domains"])

    @cached_property
    def seeds(self) -> list[str]:
        return sorted({name.split("/")[0] for name in self.raw["records"] if "/" in name})

    def names(self, *, every_seed: bool = True) -> list[str]:
        """Models that exist for every seed, or those that exist only for some."""
        found: dict[str, list[str]] = {}
        for name in self.raw["records"]:
            if "/" in name:
                seed, model = name.split("/", 1)
                found.setdefault(model, []).append(seed)
        return sorted(n for n, of in found.items() if (len(of) == len(self.seeds)) == every_seed)

    def seeds_of(self, *names: str) -> list[str]:
        """The seeds that have all of these models; a model without seeds (the base) counts for every one."""
        records = self.raw["records"]
        return [s for s in self.seeds if all(n in records or f"{s}/{n}" in records for n in names)]

    def tokens(self, domain: str) -> Any:
        return np.array(self.raw["tokens"][domain], np.float64)

    def sums(self, name: str, domain: str, seeds: Sequence[str]) -> Any:
        """Loss sums of the test rows, shape (seeds, rows); a model without seeds is repeated."""
        records = self.raw["records"]
        return np.array([records[name if name in records else f"{s}/{name}"]["test"][domain] for s in seeds])

    def loss(self, name: str, domain: str) -> float:
        """Nats per answer token, mean over seeds."""
        return float(self.sums(name, domain, self.seeds_of(name)).mean(0).sum() / self.tokens(domain).sum())

    def difference(self, name: str, reference: str, domain: str) -> tuple[float, float]:
        """Mean over seeds of `name` minus `reference`, and its paired standard error over test rows."""
        tokens, seeds = self.tokens(domain), self.seeds_of(name, reference)
        a, b = (np.stack([self.sums(n, domain, seeds).mean(0), tokens], 1) for n in (name, reference))
        d = paired(a, b)
        return d.mean, d.standard_error

    def by_seed(self, name: str, domain: str) -> list[float]:
        """Difference from the base for each seed."""
        seeds = self.seeds_of(name)
        found = self.sums(name, domain, seeds) - self.sums("base", domain, seeds)
        return [float(x) for x in found.sum(1) / self.tokens(domain).sum()]

    def share(self, name: str, domain: str) -> tuple[float, float, float]:
        """Share of the gain of the domain's own mask that a model keeps: estimate and a 95 % interval.

        Gains are means over seeds. The interval is a percentile bootstrap over test rows, the same rows drawn for the
        base, the own mask and the model; it says nothing about other seeds, whose spread `shares_by_seed` shows.
        """
        seeds = self.seeds_of(name)
        base, own, model = (self.sums(n, domain, seeds).mean(0) for n in ("base", f"{domain} mask", name))
        n = len(base)
        drawn = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
        shares = (base - model)[drawn].sum(1) / (base - own)[drawn].sum(1)
        low, high = np.quantile(shares, [0.025, 0.975])
        return float((base - model).sum() / (base - own).sum()), float(low), float(high)

    def shares_by_seed(self, name: str, domain: str) -> list[float]:
        seeds = self.seeds_of(name)
        base, own, model = (self.sums(n, domain, seeds).sum(1) for n in ("base", f"{domain} mask", name))
        return [float(s) for s in (base - model) / (base - own)]

    def validation_share(self, name: str) -> float:
        """The lowest share over domains, of validation losses, mean over seeds: what a choice may look at."""
        records, shares, seeds = self.raw["records"], [], self.seeds_of(name)
        for d in self.domains:
            base = records["base"]["validation"][d]
            own = np.mean([records[f"{s}/{d} mask"]["validation"][d] for s in seeds])
            model = np.mean([records[f"{s}/{name}"]["validation"][d] for s in seeds])
            shares.append((base - model) / (base - own))
        return float(min(shares))

    def fact(self, name: str, key: str) -> list[Any]:
        """What a record says about a model, for every seed that has it."""
        return [self.raw["records"][f"{s}/{name}"]["facts"].get(key) for s in self.seeds_of(name)]


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column left, the others right."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def filled(text: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """A page with each of the blocks that it has, `<!-- NAME -->` to `<!-- end -->`, made again."""
    for name, make in blocks.items():
        head, begin, rest = text.partition(f"<!-- {name} -->\n")
        if begin:
            text = head + begin + make() + "<!-- end -->" + rest.partition("<!-- end -->")[2]
    return text

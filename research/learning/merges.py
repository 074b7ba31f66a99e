"""Merges that look at no rows: mergekit's methods and ours, each with its scale and density tuned on validation rows.

A setting is as good as the domain that it serves worst: the lowest share of an expert's gain that the merge keeps.
Settings are searched one axis at a time from the usual ones, until no neighbour is better; a setting is given up as
soon as one domain is worse than the best setting's worst.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.merge_methods.api import merge_tensors

from mftmerge.recipe.methods import register
from research.combining.common import Weights
from research.learning.common import Bench, mean

Setting = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A merge method and the values of its parameters to search; start: places in these values."""

    name: str
    axes: Mapping[str, Sequence[Any]]
    start: Mapping[str, int]
    fixed: Mapping[str, Any]


SCALES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2)
LARGE = (0.7, 1.0, 1.3, 1.6, 2.0, 2.5)  # of methods that average
TIES_LIKE = {"density": 1, "lambda": 3, "normalize": 0}
METHODS = {
    "task arithmetic": Method("task_arithmetic", {"lambda": SCALES}, {"lambda": 3}, {"weight": 1.0}),
    "TIES": Method(
        "ties",
        {"lambda": (*SCALES, 1.5, 2.0), "density": (0.2, 0.5, 0.8), "normalize": (False, True)},
        TIES_LIKE,
        {"weight": 1.0},
    ),
    "DARE-TIES": Method(
        "dare_ties",
        {"lambda": (*SCALES, 1.5, 2.0), "density": (0.5, 0.8, 0.9), "normalize": (False, True)},
        TIES_LIKE,
        {"weight": 1.0},
    ),
    "DELLA": Method(
        "della",
        {"lambda": (*SCALES, 1.5, 2.0), "density": (0.5, 0.7, 0.84), "normalize": (False, True)},
        TIES_LIKE,
        {"weight": 1.0},
    ),
    "consensus": Method(
        "consensus",
        {"lambda": SCALES, "tall_lambda": (0.2, 0.4, 0.6), "k": (1, 2)},
        {"lambda": 3, "tall_lambda": 1, "k": 0},
        {"weight": 1.0},
    ),
    "localize-and-stitch": Method(
        "localize_and_stitch",
        {"lambda": LARGE, "density": (0.05, 0.1, 0.2, 0.5, 0.8)},
        {"lambda": 2, "density": 3},
        {},
    ),
}


def merged(base: Weights, experts: Sequence[Weights], method: str, setting: Setting, seed: int) -> Weights:
    """What a recipe of this method would give, tensor by tensor."""
    register()
    torch.manual_seed(seed)  # DARE and DELLA draw
    with torch.no_grad():
        return {
            n: merge_tensors([base[n], *(e[n] for e in experts)], method, base_index=0, parameters=setting, name=n)
            for n in base
        }


class Judge:
    """Shares of the experts' gains on validation rows."""

    def __init__(self, bench: Bench, experts: Mapping[str, Weights]) -> None:
        self.bench, self.gains, self.base = bench, dict[str, float](), dict[str, float]()
        for domain, weights in experts.items():
            self.base[domain] = mean(bench.losses(domain, "validation"))
            with bench.using(weights):
                self.gains[domain] = self.base[domain] - mean(bench.losses(domain, "validation"))
        self.order = list(experts)

    def now(self, enough: float = -float("inf")) -> dict[str, float]:
        """Shares that the model as it is keeps, by domain; fewer domains where one is at most `enough`."""
        found: dict[str, float] = {}
        for domain in list(self.order):
            found[domain] = (self.base[domain] - mean(self.bench.losses(domain, "validation"))) / self.gains[domain]
            if found[domain] <= enough:
                self.order.remove(domain)
                self.order.insert(0, domain)  # the one to ask first next time
                break
        return found


def tuned(method: Method, judge: Judge, make: Callable[[Setting], Weights]) -> tuple[Setting, Weights, dict[str, Any]]:
    """The best setting of a method, its merge, and what was tried: settings and their lowest shares."""
    tried: dict[tuple[int, ...], float] = {}
    axes = list(method.axes)
    place = tuple(method.start[a] for a in axes)
    kept: Weights = {}

    def setting(at: tuple[int, ...]) -> Setting:
        return {a: method.axes[a][i] for a, i in zip(axes, at, strict=True)} | dict(method.fixed)

    def try_at(at: tuple[int, ...]) -> bool:
        nonlocal place, kept
        if at in tried or any(not 0 <= i < len(method.axes[a]) for a, i in zip(axes, at, strict=True)):
            return False
        best = max(tried.values(), default=-float("inf"))
        weights = make(setting(at))
        with judge.bench.using(weights):
            tried[at] = min(judge.now(best).values())
        if tried[at] > best:
            place, kept = at, weights
        return tried[at] > best

    try_at(place)
    moved = True
    while moved:
        moved = False
        for axis in range(len(axes)):
            for by in (1, -1):
                while try_at(tuple(i + by * (k == axis) for k, i in enumerate(place))):
                    moved = True
    history = [[setting(at), round(share, 4)] for at, share in tried.items()]
    return setting(place), kept, {"tried": history}

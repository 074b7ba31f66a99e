"""The combinations that are compared: each takes the masks of a seed and gives kept sets, or shares between 0 and 1.

Those that the product has are made by `mftmerge.combine`; the others are experiments, written here in numpy.
Scores of mask d are S_d, all started from one S0 (magnitudes of the base's weights); E_d = S_d - S0 is its evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mftmerge.combine import combine
from mftmerge.cut import keep_top
from mftmerge.mask import Mask
from mftmerge.overlap import untrained

Kept = dict[str, Any]  # tensor name -> array of its shape


@dataclass(frozen=True)
class Family:
    """The masks of one seed, in the order of the domains, and how much each gained on validation rows (nats)."""

    masks: Sequence[Mask]
    gains: Sequence[float]
    keep: float

    @cached_property
    def start(self) -> Mask:
        found = untrained(self.masks[0])
        assert found is not None
        return found

    @cached_property
    def evidence(self) -> dict[str, list[Any]]:
        return {n: [m.scores(n) - m.initial_scores(n) for m in self.masks] for n in self.masks[0].names}

    def cut(self, scores: Mapping[str, Any], keep: float | None = None) -> Kept:
        """Keep exactly a share of each tensor, the highest scores."""
        share, out = self.keep if keep is None else keep, {}
        for name, values in scores.items():
            drop = values.size - round(share * values.size)
            out[name] = keep_top(values.astype(np.float32), drop)
        return out

    def added(self, weights: Sequence[float], change: Callable[[Any], Any] | None = None) -> dict[str, Any]:
        """S0 + sum_d w_d f(E_d) by tensor."""
        out = {}
        for name in self.masks[0].names:
            parts = change(self.evidence[name]) if change else self.evidence[name]
            total = sum(w * e.astype(np.float64) for w, e in zip(weights, parts, strict=True))
            out[name] = self.masks[0].initial_scores(name) + total
        return out


def normalised(parts: Sequence[Any]) -> list[Any]:
    """Evidence of a tensor scaled to one root mean square for all masks: the mean of theirs."""
    sizes = [float(np.sqrt(np.mean(np.square(e, dtype=np.float64)))) for e in parts]
    return [e * (np.mean(sizes) / s) if s else e for e, s in zip(parts, sizes, strict=True)]


def ranked(parts: Sequence[Any]) -> list[Any]:
    """Evidence replaced by sign * rank of its size, scaled to the mean root mean square."""
    mean = float(np.mean([np.sqrt(np.mean(np.square(e, dtype=np.float64))) for e in parts]))
    out = []
    for e in parts:
        order = np.empty(e.size, np.float64)
        order[np.argsort(np.abs(e), axis=None, kind="stable")] = np.arange(1, e.size + 1) / e.size
        out.append(np.sign(e) * order.reshape(e.shape) * np.sqrt(3) * mean)
    return out


def trimmed(share: float) -> Callable[[Sequence[Any]], list[Any]]:
    """Only the largest share of each mask's evidence, as TIES trims task vectors."""

    def change(parts: Sequence[Any]) -> list[Any]:
        out = []
        for e in parts:
            cut = np.partition(np.abs(e), -max(1, round(share * e.size)), axis=None)[-max(1, round(share * e.size))]
            out.append(np.where(np.abs(e) >= cut, e, 0))
        return out

    return change


def elected(parts: Sequence[Any]) -> list[Any]:
    """Evidence only where it has the sign of the sum, as TIES elects signs."""
    sign = np.sign(sum(parts))
    return [np.where(np.sign(e) == sign, e, 0) for e in parts]


def largest(parts: Sequence[Any]) -> list[Any]:
    """At each weight only the evidence of the mask that has most of it: nobody is outvoted by noise."""
    stack = np.stack(parts)
    winner = np.abs(stack).argmax(axis=0)
    return [np.where(winner == d, e, 0) for d, e in enumerate(parts)]


def flips(family: Family, needed: int) -> Kept:
    """The untrained mask with the changes that at least `needed` masks made to it."""
    out = {}
    for name in family.masks[0].names:
        start = family.start.kept(name)
        changed = sum((m.kept(name) != start).astype(np.int8) for m in family.masks)
        out[name] = start ^ (changed >= needed)
    return out


def vetoed(family: Family, share: float) -> Kept:
    """The intersection, but a weight is kept where it is in the top share of some mask's positive evidence."""
    out = {}
    for name in family.masks[0].names:
        kept = np.logical_and.reduce([m.kept(name) for m in family.masks])
        for e in family.evidence[name]:
            cut = np.partition(e, -round(share * e.size), axis=None)[-round(share * e.size)]
            kept |= (e >= cut) & (e > 0)
        out[name] = kept
    return out


def bools(mask: Mask) -> Kept:
    return {n: mask.kept(n) for n in mask.names}


def untuned(family: Family) -> dict[str, Callable[[], Kept]]:
    """name -> the combination, none of which looks at a validation row except for the gains of the masks."""
    masks, keep, ones = family.masks, family.keep, [1.0] * len(family.masks)
    inverse = [1 / max(g, 1e-3) for g in family.gains]
    by_gain = [w * len(ones) / sum(family.gains) for w in family.gains]
    by_inverse = [w * len(ones) / sum(inverse) for w in inverse]

    def product(op: str, **options: Any) -> Callable[[], Kept]:
        return lambda: bools(combine(op, masks, **options))

    def score(weights: Sequence[float] = ones, change: Any = None, at: float = keep) -> Callable[[], Kept]:
        return lambda: family.cut(family.added(weights, change), at)

    return {
        "union": product("union"),
        "intersection": product("intersection"),
        "vote": product("vote"),
        "vote at 0.9": product("vote", density=keep),
        "vote by gain at 0.9": product("vote", density=keep, weights=[max(round(g, 4), 1e-4) for g in family.gains]),
        "average of the masks": lambda: {n: np.mean([m.kept(n) for m in masks], axis=0) for n in masks[0].names},
        "changes of any": lambda: flips(family, 1),
        "changes of two": lambda: flips(family, 2),
        "intersection with veto 0.02": lambda: vetoed(family, 0.02),
        "intersection with veto 0.10": lambda: vetoed(family, 0.10),
        "score": product("score", density=keep),
        "score at 0.95": score(at=0.95),
        "score at 0.85": score(at=0.85),
        "score x 2": score([2.0] * len(ones)),
        "score by gain": score(by_gain),
        "score by inverse gain": score(by_inverse),
        "score normalised": score(change=normalised),
        "score ranked": score(change=ranked),
        "score trimmed to 0.2": score(change=trimmed(0.2)),
        "score of the largest": score(change=largest),
        "score elected": score(change=elected),
        "score elected at 0.93": score(change=elected, at=0.93),
        "score elected at 0.95": score(change=elected, at=0.95),
        "score elected, trimmed to 0.2": score(change=lambda e: elected(trimmed(0.2)(e))),
        "score elected, normalised": score(change=lambda e: elected(normalised(e))),
        "score elected x 1.5": score([1.5] * len(ones), elected),
        "score elected x 1.5 at 0.95": score([1.5] * len(ones), elected, 0.95),
        "score at 0.92": score(at=0.92),
        "score at 0.93": score(at=0.93),
        "score at 0.94": score(at=0.94),
        "score normalised at 0.94": score(change=normalised, at=0.94),
        "score normalised at 0.93": score(change=normalised, at=0.93),
        "score elected, normalised at 0.93": score(change=lambda e: elected(normalised(e)), at=0.93),
        "vote at 0.93": product("vote", density=0.93),
    }


def balanced(
    family: Family,
    shares: Callable[[Kept], list[float]],
    change: Callable[[Sequence[Any]], list[Any]] | None = None,
    keep: float | None = None,
    rounds: int = 6,
    step: float = 1.0,
) -> tuple[list[float], Kept, list[Any]]:
    """Score arithmetic with the weights that serve the worst served domain best, by validation rows.

    shares: which part of its own mask's gain each domain keeps under a kept set. Each round raises the weights of the
    domains that keep less than the mean and lowers the others (multiplicative updates: the max-min of several
    objectives); the best round counts. Returns weights, kept set and the history.
    """
    weights = np.ones(len(family.masks))
    best: tuple[float, list[float], Kept] | None = None
    history = []
    for _ in range(rounds):
        kept = family.cut(family.added(list(weights), change), keep)
        found = np.array(shares(kept))
        history.append([[round(float(w), 4) for w in weights], [round(float(s), 4) for s in found]])
        if best is None or found.min() > best[0]:
            best = (float(found.min()), [float(w) for w in weights], kept)
        weights = weights * np.exp(step * np.clip(found.mean() - found, -0.5, 0.5) * 2)
    assert best is not None
    return best[1], best[2], history

"""Predictors of what each combination keeps of each domain's gain, beside what was measured.

A combination is a kept set c; m is the domain's
own mask, s the untrained mask that all started from, w the weights. Predictors of the share that c keeps of the own
mask's gain:

jaccard            overlap of the pruned sets of c and m
own changes        the share of the bits in which m differs from s that c has too
evidence           the domain's evidence along c - s, over that along m - s
first order        the slope at s along c - s, over that along m - s
mean slope         the mean of the slopes at s and at m, likewise
diagonal           around m: 1 minus (its slope along c - m plus half the diagonal curvature there) over m's gain over s
second order       around m, with the rows' whole Fisher matrix, over m's gain over the base: the product's
                   `evaluate.prediction` as it is
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from research.combining import combinations
from research.combining.common import Bench
from research.interference import measure

MEASURED = Path(__file__).parent.parent / "combining" / "results" / "instruct.json"
PREDICTORS = ("jaccard", "own changes", "evidence", "first order", "mean slope", "diagonal", "second order")


def simple(
    bench: Bench, masks: combinations.Family, seed: int, kept: Mapping[str, combinations.Kept], lost: measure.Losses
) -> dict[str, dict[str, dict[str, float]]]:
    """combination -> domain -> predictor -> share of the own mask's gain over the base, of all but the product's.

    All but two of them say how far a combination is on the way from the untrained to the own mask; where these two
    stand on validation rows is known before anything is combined. Every sum over the weights is linear in c (whose
    square it is), so that one product of matrices has them for all combinations, and for s and m too.
    """
    out: dict[str, dict[str, dict[str, float]]] = {name: {} for name in kept}
    start = combinations.bools(masks.start)
    for i, (domain, mask) in enumerate(zip(bench.domains, masks.masks, strict=True)):
        own = combinations.bools(mask)
        at_start, at_own = (measure.slopes(bench, seed, domain, *at) for at in (("start", start), ("own", own)))
        every = [*kept.values(), start, own]
        sums, dropped = np.zeros((len(every), 7)), 0.0
        for n, weights in bench.originals.items():
            w, m, s = weights.numpy(), own[n].astype(np.float32), start[n].astype(np.float32)
            curvature = at_own[f"curvature/{n}"].numpy() * w * w / 2
            columns = [np.sign(m - s), masks.evidence[n][i], at_start[f"gradient/{n}"].numpy() * w]
            columns += [at_own[f"gradient/{n}"].numpy() * w, curvature * (1 - 2 * m), 1 - m, m]
            table = np.stack([c.reshape(-1).astype(np.float32) for c in columns], axis=1)
            sums += np.stack([k[n].reshape(-1).astype(np.float32) for k in every]) @ table
            dropped += float((1 - m).sum())
        size = sum(w.numel() for w in bench.originals.values())
        *combined, first, last = sums
        base, untrained, held = (lost[m]["validation"][domain] for m in ("base", "untrained mask", f"{domain} mask"))
        begun = (base - untrained) / (base - held)
        for name, here in zip(kept, combined, strict=True):
            way = (here - first)[:4] / (last - first)[:4]
            both = (here - first)[2:4].sum() / (last - first)[2:4].sum()
            along = dict(zip(("own changes", "evidence", "first order"), way, strict=False)) | {"mean slope": both}
            change = here[3] - last[3] + here[4] - last[4]
            out[name][domain] = {p: float(begun + (1 - begun) * share) for p, share in along.items()} | {
                "jaccard": float((dropped - here[5]) / (size - here[6])),
                "diagonal": float(1 - change / (untrained - held)),
            }
    return out


def seed_shares(bench: Bench, seed: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """combination -> domain -> share, by predictor, "measured" on test rows and on "validation" rows."""
    masks = measure.family(bench, seed)
    kept, found = measure.compared(masks), dict[str, Any]()
    product = measure.outlook(bench, seed, masks, kept)
    lost = measure.losses(bench, seed, record, masks, kept)

    def share(name: str, split: str, domain: str) -> float:
        base, own, here = (lost[m][split][domain] for m in ("base", f"{domain} mask", name))
        return (base - here) / (base - own)

    names = sorted(kept.keys() & lost.keys())
    said = simple(bench, masks, seed, {name: kept[name] for name in names}, lost)
    for name in names:
        found[name] = {
            d: said[name][d]
            | {"second order": product[d]["shares"][name]}
            | {"measured": share(name, "test", d), "validation": share(name, "validation", d)}
            for d in bench.domains
        }
    return found


def seed_layers(bench: Bench, seed: int) -> dict[str, Any]:
    """combination -> domain -> layer -> "predicted" and "measured" change of the own mask's loss, and its "error"."""
    masks = measure.family(bench, seed)
    kept = measure.compared(masks)
    product, found = measure.outlook(bench, seed, masks, kept), measure.replaced(bench, seed, masks, kept)
    for name, domains in found.items():
        for domain, layers in domains.items():
            for layer, one in layers.items():
                one["predicted"] = product[domain]["layers"][name][layer]
    return found

"""What the rows' own gradients say of many kept sets at once: the second-order model of a loss with its cross terms.

    python -m research.interference.quadratic OUT --model DIR --domain NAME=FILE ... --seed 0

For each domain, at its own mask m and at the untrained mask s: one backward pass a validation row; the row's gradient g
(of its summed loss, at the masked weights) is multiplied with the change w * (c - m) of every kept set c. Over all rows

    slope(c) = sum of g.d / tokens,     square(c) = sum of (g.d)^2 / tokens,     d = w * (c - m),

and square is d^T F d with the empirical Fisher matrix F whole, not its diagonal alone: the second-order change of the
loss, where the rows are the samples. Written to OUT/seedN/quadratic.json; `predict.py` makes predictors of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import torch

from mftmerge.files import replacing
from mftmerge.loss import padded, token_losses
from research.combining import combinations
from research.combining.common import Bench
from research.interference.measure import differentiated, family, open_bench, options

Sums = dict[str, dict[str, float]]  # kept set -> "slope" and "square"


def compared(masks: combinations.Family) -> dict[str, combinations.Kept]:
    """Every combination of which a loss can be predicted, by name; shares of weights are no mask."""
    made = combinations.untuned(masks).items()
    return {
        n: make() for n, make in made if "gain" not in n and n != "average of the masks"
    }  # shares of weights are no mask


def sums(bench: Bench, domain: str, at: combinations.Kept, kept: Mapping[str, combinations.Kept]) -> Sums:
    """Slopes and squares of kept sets on a domain's validation rows, around the mask `at`."""
    parameters = differentiated(bench)
    moved: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]] = {}
    for what, given in kept.items():
        for n in parameters:
            new, old = (np.asarray(k[n], bool).reshape(-1) for k in (given, at))
            moved[what, n] = tuple(torch.from_numpy(np.flatnonzero(a & ~b)) for a, b in ((new, old), (old, new)))  # type: ignore[assignment]
    found: Sums = {what: {"slope": 0.0, "square": 0.0} for what in kept}
    tokens = 0
    with bench.using(bench.masked(at)), bench.cache.use():
        for row in bench.rows[domain]["validation"]:
            ids, labels, attention = padded([row])
            losses, _ = token_losses(bench.model, ids, labels, attention_mask=attention)
            tokens += len(losses)
            losses.sum().backward()
            along = dict.fromkeys(kept, 0.0)
            for n, p in parameters.items():
                assert p.grad is not None
                effect = (p.grad * bench.originals[n]).reshape(-1)
                for what in kept:
                    on, off = moved[what, n]
                    along[what] += float(effect[on].sum(dtype=torch.float64) - effect[off].sum(dtype=torch.float64))
                p.grad = None
            for what, value in along.items():
                found[what]["slope"] += value
                found[what]["square"] += value**2
    return {what: {k: v / tokens for k, v in both.items()} for what, both in found.items()}


def main() -> None:
    given = options(__doc__).parse_args()
    bench = open_bench(given.out, given.model, given.domain)
    for seed in given.seed:
        masks = family(bench, seed)
        start = combinations.bools(masks.start)
        kept = compared(masks) | {"untrained": start}
        found = {}
        for domain, mask in zip(bench.domains, masks.masks, strict=True):
            own = combinations.bools(mask)
            everything = kept | {"own": own}
            found[domain] = {
                "own": sums(bench, domain, own, everything),
                "start": sums(bench, domain, start, everything),
            }
            print(seed, domain, flush=True)
        with replacing(given.out / f"seed{seed}" / "quadratic.json") as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

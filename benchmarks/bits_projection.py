"""Claim: cutting a vote to an exact density is many times faster than sorting the votes (argsort).

Projection on packed counters and population counts, without and with scores that break ties, against a stable argsort
of the vote counts of the whole tensor (lexsort with scores). Both give the same bits, which is checked.
"""

from __future__ import annotations

import numpy as np
from common import interleaved
from mask_common import plain, quick, random_packed, record

from mftmerge import bits
from mftmerge.combine import combine
from mftmerge.cut import drop_count
from mftmerge.mask import Mask


def sort(masks: list[Mask], size: int, scored: bool) -> np.ndarray:
    votes = np.sum([m.kept("w") for m in masks], axis=0, dtype=np.uint8)
    rank = (2 * votes >= len(masks)).astype(np.uint8) * 16 + votes
    total = np.sum([m.scores("w") for m in masks], axis=0) if scored else None
    order = np.argsort(rank, kind="stable") if total is None else np.lexsort((total, rank))
    kept = np.ones(size, np.bool_)
    kept[order[: drop_count(size, 0.9)]] = False
    return bits.pack(kept)


def main() -> None:
    size, rounds = (1 << 20, 3) if quick() else (1 << 24, 5)
    rng = np.random.default_rng(0)
    scores = [rng.standard_normal(size, np.float32) for _ in range(3)]
    rows = [plain("weights", size, "weights")]
    for scored in (False, True):
        masks = [
            Mask({"w": random_packed(size, s)}, {"w": (size,)}, scores={"w": scores[s]} if scored else None)
            for s in range(3)
        ]
        cut = combine("vote", masks, density=0.9)
        assert np.array_equal(cut.packed("w"), sort(masks, size, scored))
        sides = {
            "projection": lambda m=masks: combine("vote", m, density=0.9),
            "argsort": lambda m=masks, s=scored: sort(m, size, s),
        }
        seconds = interleaved(sides, rounds)
        case = "vote of 3 cut to 0.9" + (", ties by scores, against lexsort" if scored else ", against argsort")
        rows.append(plain(case, seconds["argsort"] / seconds["projection"], "x"))
    record(__file__, (__doc__ or "").split("\n")[0], rows)


if __name__ == "__main__":
    main()

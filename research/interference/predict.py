"""Predict what each combination keeps of each domain's gain, and compare that with what was measured.

    python -m research.interference.predict OUT --model DIR --domain NAME=FILE ... --seed 0 -o RESULT.json

OUT is that of `measure.py`; what was measured stands in the record of the study of combinations. A combination is a
kept set c; m is the domain's own mask, s the untrained mask that all started from, w the weights. Predictors of the
share that c keeps of the own mask's gain:

jaccard            overlap of the pruned sets of c and m
own changes        the share of the bits in which m differs from s that c has too
evidence           the domain's evidence along c - s, over that along m - s
first order        the slope at s along c - s, over that along m - s
mean slope         the mean of the slopes at s and at m, likewise
diagonal           around m: 1 minus (its slope along c - m plus half the diagonal curvature there) over m's gain over s
second order       around m, with the rows' whole Fisher matrix (`quadratic.py`), over m's gain over the base: what
                   `evaluate.prediction` uses
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mftmerge.files import replacing
from research.combining import combinations
from research.combining.common import Bench
from research.interference.measure import family, measured, open_bench, options
from research.interference.quadratic import compared

MEASURED = Path(__file__).parent.parent / "combining" / "results" / "instruct.json"
PREDICTORS = ("jaccard", "own changes", "evidence", "first order", "mean slope", "diagonal", "second order")


def shares(record: Mapping[str, Any], seed: int, domains: list[str]) -> dict[str, dict[str, float]]:
    """combination -> domain -> measured share of the own mask's gain on test rows, of one seed."""
    records, place = record["records"], f"seed{seed}/"
    base = {d: float(sum(records["base"]["test"][d])) for d in domains}
    own = {d: float(sum(records[f"{place}{d} mask"]["test"][d])) for d in domains}
    found = {n.removeprefix(place): one["test"] for n, one in records.items() if n.startswith(place)}
    return {n: {d: (base[d] - sum(t[d])) / (base[d] - own[d]) for d in domains} for n, t in found.items()}


def gains(record: Mapping[str, Any], seed: int, domains: list[str]) -> dict[str, float]:
    """Nats a token that each own mask gains over the untrained mask, on validation rows."""
    records = record["records"]
    start, own = (
        records["untrained mask"]["validation"],
        {d: records[f"seed{seed}/{d} mask"]["validation"] for d in domains},
    )
    return {d: start[d] - own[d][d] for d in domains}


def _tensor(kept: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(kept, np.float32))


def predicted(
    bench: Bench, masks: combinations.Family, seed: int, kept: combinations.Kept, gain: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """domain -> predictor -> share."""
    out: dict[str, dict[str, float]] = {}
    for i, (domain, mask) in enumerate(zip(bench.domains, masks.masks, strict=True)):
        slopes = [measured(bench, seed, domain, where, {}) for where in ("start", "own")]
        sums: dict[str, float] = {}

        def add(name: str, value: torch.Tensor, sums: dict[str, float] = sums) -> None:
            sums[name] = sums.get(name, 0.0) + float(value.sum(dtype=torch.float64))

        for n, w in bench.originals.items():
            c, m, s = _tensor(kept[n]), _tensor(mask.kept(n)), _tensor(masks.start.kept(n))
            add("both", (1 - c) * (1 - m))
            add("either", 1 - c * m)
            values = {"own changes": torch.sign(m - s), "evidence": _tensor(masks.evidence[n][i])}
            values |= {"at start": slopes[0][f"gradient/{n}"] * w, "at own": slopes[1][f"gradient/{n}"] * w}
            for name, value in values.items():
                add(f"{name} c", value * (c - s))
                add(f"{name} m", value * (m - s))
            add("curvature", slopes[1][f"curvature/{n}"] * (w * (c - m)).square() / 2)
        both = {
            name: (sums[f"{name} c"], sums[f"{name} m"]) for name in ("own changes", "evidence", "at start", "at own")
        }
        mean = [a + b for a, b in zip(both["at start"], both["at own"], strict=True)]
        change = both["at own"][0] - both["at own"][1] + sums["curvature"]
        out[domain] = {
            "jaccard": sums["both"] / sums["either"],
            "own changes": both["own changes"][0] / both["own changes"][1],
            "evidence": both["evidence"][0] / both["evidence"][1],
            "first order": both["at start"][0] / both["at start"][1],
            "mean slope": mean[0] / mean[1],
            "diagonal": 1 - change / gain[domain],
        }
    return out


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("-o", "--result", type=Path, required=True)
    given = parser.parse_args()
    record = json.loads(MEASURED.read_text(encoding="utf-8"))
    bench = open_bench(given.out, given.model, given.domain)
    found: dict[str, Any] = {}
    for seed in given.seed:
        masks, known = family(bench, seed), shares(record, seed, bench.domains)
        rows = json.loads((given.out / f"seed{seed}" / "quadratic.json").read_text(encoding="utf-8"))
        lost = {d: record["records"]["base"]["validation"][d] for d in bench.domains}
        own = {d: record["records"][f"seed{seed}/{d} mask"]["validation"][d] for d in bench.domains}
        for name, kept in compared(masks).items():
            if name in known:
                one = predicted(bench, masks, seed, kept, gains(record, seed, bench.domains))
                for d in bench.domains:
                    moved = rows[d]["own"][name]
                    one[d]["second order"] = 1 - (moved["slope"] + moved["square"] / 2) / (lost[d] - own[d])
                found[f"seed{seed}/{name}"] = {d: one[d] | {"measured": known[name][d]} for d in bench.domains}
                print(seed, name, flush=True)
    with replacing(given.result) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

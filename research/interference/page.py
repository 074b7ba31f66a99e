"""The tables of docs/interference.md: `python -m research.interference.page [RESULT.json]`.

RESULT is what `predict.py` wrote; it is copied to results/ first. What was measured stands in the record of the study
of combinations. A test checks that page and results agree.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from mftmerge.evaluate.results import markdown_table
from mftmerge.files import replacing
from research.interference.predict import MEASURED, PREDICTORS

PAGE = Path(__file__).parents[2] / "docs" / "interference.md"
RESULT = Path(__file__).parent / "results" / "predicted.json"
BEGIN, END = "<!-- generated: predicted -->\n", "<!-- end -->"
LONG = {"math": "GSM8K", "sql": "WikiSQL", "python": "Python"}
SHOWN = ("union", "intersection", "vote", "score", "score at 0.93", "score elected at 0.95", "score of the largest")
TRIED = 0.2  # the part of all combinations that a search led by a predictor measures
GOAL = 0.9

Found = Mapping[str, Mapping[str, Mapping[str, float]]]  # "seed0/union" -> domain -> predictor or "measured" -> value
Record = Mapping[str, Any]


def shares(found: Found, record: Record) -> dict[str, dict[str, dict[str, float]]]:
    """Every predictor as a share of the own mask's gain over the base, and what validation rows measured.

    All but two predictors say how far a combination is on the way from the untrained to the own mask; where these two
    stand on validation rows is known before anything is combined.
    """
    records, out = record["records"], {}
    for name, domains in found.items():
        seed, combination = name.split("/", 1)
        out[name] = {}
        for domain, values in domains.items():

            def lost(model: str, domain: str = domain) -> float:
                return float(records[model]["validation"][domain])

            gain = lost("base") - lost(f"{seed}/{domain} mask")
            start = (lost("base") - lost("untrained mask")) / gain
            said = {
                p: values[p] if p in ("jaccard", "diagonal", "second order") else start + (1 - start) * values[p]
                for p in PREDICTORS
            }
            seen = (lost("base") - lost(f"{seed}/{combination}")) / gain
            out[name][domain] = said | {"measured": values["measured"], "validation": seen}
    return out


def rank_agreement(
    values: Mapping[str, Mapping[str, Mapping[str, float]]], predictor: str, seed: str, domain: str
) -> float:
    """Spearman's correlation of a predictor with the share that test rows measured, over one seed's combinations."""
    mine = [d[domain] for name, d in values.items() if name.startswith(f"{seed}/")]
    return float(spearmanr([v[predictor] for v in mine], [v["measured"] for v in mine]).statistic)


def searched(
    values: Mapping[str, Mapping[str, Mapping[str, float]]], predictor: str, seed: str
) -> tuple[float, float, int]:
    """Lowest share on validation rows of the best combination: of all, and of the few that the predictor puts first."""
    mine = {name: d for name, d in values.items() if name.startswith(f"{seed}/")}

    def lowest(name: str, by: str) -> float:
        return min(v[by] for v in mine[name].values())

    few = sorted(mine, key=lambda n: -lowest(n, predictor))[: max(1, round(TRIED * len(mine)))]
    return max(lowest(n, "validation") for n in mine), max(lowest(n, "validation") for n in few), len(few)


def agreement_table(values: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    seeds, domains = _seeds(values), _domains(values)
    rows = []
    for p in PREDICTORS:
        cells = [[rank_agreement(values, p, s, d) for s in seeds] for d in domains]
        rows.append([p, *(", ".join(f"{c:.2f}" for c in of) for of in cells), f"{np.mean(cells):.2f}"])
    count = len([n for n in values if n.startswith(f"{seeds[0]}/")])
    head = ["predictor", *(LONG.get(d, d) for d in domains), "mean"]
    met = [r[0] for r in rows if float(r[-1]) >= GOAL]
    said = f"{count} combinations a seed, {len(seeds)} seeds. The goal of {GOAL} is met by: {', '.join(met) or 'none'}."
    return [*markdown_table(head, rows), "", said]


def side_by_side(values: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Predicted and measured shares of some combinations, mean over seeds."""
    domains, rows = _domains(values), []
    for combination in SHOWN:
        mine = [d for name, d in values.items() if name.split("/", 1)[1] == combination]
        if mine:
            means = [[np.mean([m[d][which] for m in mine]) for which in ("second order", "measured")] for d in domains]
            cells = [f"{100 * said:.0f} / {100 * seen:.0f}" for said, seen in means]
            rows.append([combination, *cells])
    return markdown_table(["predicted / measured, %", *(LONG.get(d, d) for d in domains)], rows)


def search_table(values: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    rows = []
    for p in PREDICTORS:
        found = [searched(values, p, s) for s in _seeds(values)]
        rows.append([p, *(f"{100 * few:.0f} of {100 * best:.0f} %" for best, few, _ in found)])
    few = searched(values, PREDICTORS[0], _seeds(values)[0])[2]
    return markdown_table(
        [f"best of the {few} that a predictor puts first, against the best of all", *_seeds(values)], rows
    )


def _seeds(values: Mapping[str, Any]) -> list[str]:
    return sorted({n.split("/")[0] for n in values})


def _domains(values: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(next(iter(values.values())))


def tables() -> str:
    values = shares(json.loads(RESULT.read_text(encoding="utf-8")), json.loads(MEASURED.read_text(encoding="utf-8")))
    parts: Sequence[list[str]] = (
        ["Spearman's correlation of predicted and measured shares over the combinations, one number a seed:"],
        agreement_table(values),
        ["What the product's predictor (second order) says of some combinations, beside what was measured:"],
        side_by_side(values),
        ["Lowest share over domains, on validation rows, found by a search that measures a fifth of the combinations:"],
        search_table(values),
    )
    return "\n\n".join("\n".join(p) for p in parts) + "\n"


def page(text: str) -> str:
    """The page with its tables made again."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + tables() + END + rest.split(END, 1)[1]


def main() -> None:
    if len(sys.argv) > 1:
        RESULT.parent.mkdir(exist_ok=True)
        with replacing(RESULT) as temporary:
            temporary.write_text(Path(sys.argv[1]).read_text(encoding="utf-8"), encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

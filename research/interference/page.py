"""The tables of docs/interference.md from results/: `python -m research.interference.page` writes them again.

A test checks that page and results agree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from mftmerge.evaluate.results import markdown_table
from research.interference.measure import ROWS_BY_LAYER
from research.interference.predict import PREDICTORS

PAGE = Path(__file__).parents[2] / "docs" / "interference.md"
RESULT = Path(__file__).parent / "results" / "predicted.json"
LAYERS = Path(__file__).parent / "results" / "layers.json"
BEGIN, END = "<!-- generated: predicted -->\n", "<!-- end -->"
LONG = {"math": "GSM8K", "sql": "WikiSQL", "python": "Python"}
SHOWN = ("union", "intersection", "vote", "score", "score at 0.93", "score elected at 0.95", "score of the largest")
TRIED = 0.2  # the part of all combinations that a search led by a predictor measures
GOAL = 0.9
GOAL_BY_LAYER = 0.8

Shares = Mapping[str, Mapping[str, Mapping[str, float]]]  # "seed0/union" -> domain -> by predictor, or "measured"
Layers = Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]  # "seed0/union" -> domain -> layer -> change


def rank_agreement(values: Shares, predictor: str, seed: str, domain: str) -> float:
    """Spearman's correlation of a predictor with the share that test rows measured, over one seed's combinations."""
    mine = [d[domain] for name, d in values.items() if name.startswith(f"{seed}/")]
    return float(spearmanr([v[predictor] for v in mine], [v["measured"] for v in mine]).statistic)


def searched(values: Shares, predictor: str, seed: str) -> tuple[float, float, int]:
    """Lowest share on validation rows of the best combination: of all, and of the few that the predictor puts first."""
    mine = {name: d for name, d in values.items() if name.startswith(f"{seed}/")}

    def lowest(name: str, by: str) -> float:
        return min(v[by] for v in mine[name].values())

    few = sorted(mine, key=lambda n: -lowest(n, predictor))[: max(1, round(TRIED * len(mine)))]
    return max(lowest(n, "validation") for n in mine), max(lowest(n, "validation") for n in few), len(few)


def agreement_table(values: Shares) -> list[str]:
    seeds, domains = _seeds(values), _domains(values)
    rows, met = [], []
    for p in PREDICTORS:
        cells = [[rank_agreement(values, p, s, d) for s in seeds] for d in domains]
        rows.append([p, *(", ".join(f"{c:.2f}" for c in of) for of in cells), f"{np.mean(cells):.2f}"])
        good = [LONG.get(d, d) for d, of in zip(domains, cells, strict=True) if np.mean(of) >= GOAL]
        met += [f"{p} ({', '.join(good)})"] if good else []
    counts = ", ".join(str(len([n for n in values if n.startswith(f"{s}/")])) for s in seeds)
    head = ["predictor", *(LONG.get(d, d) for d in domains), "mean"]
    said = f"Combinations, by seed: {counts}. The goal of {GOAL} is met by: {'; '.join(met) or 'none'}."
    return [*markdown_table(head, rows), "", said]


def side_by_side(values: Shares) -> list[str]:
    """Predicted and measured shares of some combinations, mean over seeds."""
    domains, rows = _domains(values), []
    for combination in SHOWN:
        mine = [d for name, d in values.items() if name.split("/", 1)[1] == combination]
        if mine:
            means = [[np.mean([m[d][which] for m in mine]) for which in ("second order", "measured")] for d in domains]
            cells = [f"{100 * said:.0f} / {100 * seen:.0f}" for said, seen in means]
            rows.append([combination, *cells])
    return markdown_table(["predicted / measured, %", *(LONG.get(d, d) for d in domains)], rows)


def search_table(values: Shares) -> list[str]:
    rows = []
    for p in PREDICTORS:
        found = [searched(values, p, s) for s in _seeds(values)]
        rows.append([p, *(f"{100 * few:.0f} of {100 * best:.0f} %" for best, few, _ in found)])
    return markdown_table(
        ["best of the fifth that a predictor puts first, against the best of all", *_seeds(values)], rows
    )


def layer_points(found: Layers, seed: str, domain: str) -> list[Mapping[str, float]]:
    """Of one seed and domain: every layer of every combination, as "predicted", "measured" and "error"."""
    return [one for name, d in found.items() if name.startswith(f"{seed}/") for one in d[domain].values()]


def layer_agreement(found: Layers, seed: str, domain: str) -> float:
    """Spearman's correlation of predicted and measured change over layers and combinations."""
    points = layer_points(found, seed, domain)
    return float(spearmanr([p["predicted"] for p in points], [p["measured"] for p in points]).statistic)


def layer_table(found: Layers) -> list[str]:
    """Agreement by seed and domain."""
    seeds, domains = _seeds(found), _domains(found)
    cells = [[layer_agreement(found, s, d) for d in domains] for s in seeds]
    rows = [[s, *(f"{c:.2f}" for c in of), f"{np.mean(of):.2f}"] for s, of in zip(seeds, cells, strict=True)]
    points = [p for s in seeds for d in domains for p in layer_points(found, s, d)]
    clear = sum(abs(p["measured"]) > 2 * p["error"] for p in points)
    met = "met" if np.mean(cells) >= GOAL_BY_LAYER else "not met"
    said = (
        f"{len(layer_points(found, seeds[0], domains[0]))} layers of combinations a domain; {clear} of {len(points)} "
        f"measured changes are beyond two standard errors. The goal of {GOAL_BY_LAYER} is {met} by the mean."
    )
    return [*markdown_table(["", *(LONG.get(d, d) for d in domains), "mean"], rows), "", said]


def layers_side_by_side(found: Layers) -> list[str]:
    """Predicted and measured changes of the loss by layer, mean over seeds, in thousandths of a nat."""
    rows = []
    for combination in dict.fromkeys(n.split("/", 1)[1] for n in found):
        mine = [d for name, d in found.items() if name.split("/", 1)[1] == combination]
        for domain in _domains(found):
            cells = []
            for layer in mine[0][domain]:
                said, seen = (np.mean([m[domain][layer][k] for m in mine]) for k in ("predicted", "measured"))
                cells.append(f"{1000 * said:+.0f} / {1000 * seen:+.0f}")
            rows.append([combination, LONG.get(domain, domain), *cells])
    layers = [f"layer {n}" for n in next(iter(next(iter(found.values())).values()))]
    return markdown_table(["predicted / measured, 0.001 nats", "", *layers], rows)


def _seeds(values: Mapping[str, Any]) -> list[str]:
    return sorted({n.split("/")[0] for n in values})


def _domains(values: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(next(iter(values.values())))


def tables() -> str:
    values = json.loads(RESULT.read_text(encoding="utf-8"))
    layers = json.loads(LAYERS.read_text(encoding="utf-8"))
    parts: Sequence[list[str]] = (
        ["Spearman's correlation of predicted and measured shares over the combinations, one number a seed:"],
        agreement_table(values),
        ["What the product's predictor (second order) says of some combinations, beside what was measured:"],
        side_by_side(values),
        ["Lowest share over domains, on validation rows, found by a search that measures a fifth of the combinations:"],
        search_table(values),
        [
            "Spearman's correlation of predicted and measured change of the loss where one layer of the own mask, and "
            f"no other, is the combination's ({ROWS_BY_LAYER} test rows):"
        ],
        layer_table(layers),
        ["What is predicted and measured by layer, mean over seeds:"],
        layers_side_by_side(layers),
    )
    return "\n\n".join("\n".join(p) for p in parts) + "\n"


def page(text: str) -> str:
    """The page with its tables made again."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + tables() + END + rest.split(END, 1)[1]


def write() -> None:
    """Make the page's tables again."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write()

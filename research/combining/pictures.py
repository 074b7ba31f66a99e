"""The pictures of the results page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from research.combining.tables import Study

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # distinguishable without colour vision (Okabe and Ito)
GOAL = 0.8


def picture_of_shares(study: Study, names: Sequence[str], path: Path) -> None:
    """A dot for each domain and combination: the share of the own mask's gain that is kept, with its interval."""
    names = list(reversed(names))
    figure, axes = plt.subplots(figsize=(9, 0.3 * len(names) + 1.4), layout="constrained")
    for i, domain in enumerate(study.domains):
        values = [study.share(n, domain) for n in names]
        places = [y + 0.22 * (1 - i) for y in range(len(names))]
        middle = [v[0] for v in values]
        errors = [[max(0.0, v[0] - v[1]) for v in values], [max(0.0, v[2] - v[0]) for v in values]]
        axes.errorbar(middle, places, xerr=errors, fmt="os^D"[i], color=COLOURS[i], ms=4, lw=1, label=domain)
    axes.axvline(GOAL, color="#555555", lw=1, ls="--")
    axes.axvline(0, color="#555555", lw=1)
    axes.text(GOAL, len(names) - 0.35, " goal: 80 %", fontsize=8, color="#555555")
    axes.set_xlim(max(-1.0, axes.get_xlim()[0]), min(1.5, axes.get_xlim()[1]))
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(-0.6, len(names) + 0.1)
    axes.set_xlabel("share of the gain of the domain's own mask (0 = the base, 1 = the own mask), 95 % over test rows")
    axes.grid(axis="y", lw=0.3)
    axes.legend(loc="upper left", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def picture_of_transfer(study: Study, path: Path) -> None:
    """Bars: what the own mask, the combined mask and the own task vector change on models they were not made for."""
    targets = sorted({n.rsplit("/", 1)[0] for n in study.names()})
    figure, places = plt.subplots(1, len(targets), figsize=(3.2 * len(targets), 3), sharey=True, layout="constrained")
    for axes, target in zip(places, targets, strict=True):
        bare = f"{target}/no mask"
        for i, kind in enumerate(("own mask", "combined mask", "own task vector", "untrained mask")):
            names = [f"{target}/{kind.replace('own', d)}" for d in study.domains]
            found = [study.difference(n, bare, d) for n, d in zip(names, study.domains, strict=True)]
            x = [j + 0.2 * (i - 1.5) for j in range(len(study.domains))]
            means, errors = [f[0] for f in found], [2 * f[1] for f in found]
            axes.bar(x, means, 0.2, yerr=errors, color=COLOURS[i], label=kind, error_kw={"lw": 0.8})
        axes.axhline(0, color="#333333", lw=0.8)
        axes.set_title(target, fontsize=9)
        axes.set_xticks(range(len(study.domains)), study.domains, fontsize=8)
    places[0].set_ylabel("nats against the model\nwithout a mask (± 2 SE)", fontsize=8)
    places[-1].legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)

"""A picture of a `GridResult`: how far each row is from the reference on each domain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mftmerge.errors import BadInput
from mftmerge.evaluate import pairing
from mftmerge.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mftmerge.evaluate.results import GridResult


def heat_map(result: GridResult, path: str | Path | None = None) -> Figure:
    """Rows x columns of differences from the reference row, blue better and red worse; a star beyond two errors.

    Colours are scaled within a column, because a loss and a share of right answers have no common unit.
    path: .png, .svg or .pdf to write, whole or not at all.
    """
    from matplotlib.figure import Figure

    rows, columns = list(result.models), result.metrics
    better, texts = np.full((len(rows), len(columns)), np.nan), {}
    for i, row in enumerate(rows):
        for j, (domain, metric) in enumerate(columns):
            if (row, domain, metric) in result.cells:
                difference = result.difference(row, domain, metric)
                better[i, j] = -difference.mean if metric == "loss" else difference.mean
                star = "*" if result.verdict(row, domain, metric) in ("gain", "worse") else ""
                texts[i, j] = _text(result, row, domain, metric, difference, star)
    scale = np.nan_to_num(np.nanmax(np.abs(better), axis=0, initial=0))
    figure = Figure(figsize=(2.4 + 1.9 * len(columns), 1.4 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(better / np.where(scale > 0, scale, 1), cmap="RdBu", vmin=-1.6, vmax=1.6, aspect="auto")
    axes.set_xticks(range(len(columns)), [f"{domain}\n{metric}" for domain, metric in columns])
    axes.set_yticks(range(len(rows)), rows)
    for (i, j), text in texts.items():
        axes.text(j, i, text, ha="center", va="center", fontsize=8)
    axes.set_title(
        f"Difference from {result.reference}: blue better, red worse\n± one paired SE, * beyond two", fontsize=9
    )
    if path is not None:
        _save(figure, Path(path))
    return figure


def _text(
    result: GridResult, row: str, domain: str, metric: str, difference: pairing.PairedDifference, star: str
) -> str:
    value = result.mean(row, domain, metric)
    if metric == "loss":
        top, unit, low = f"{value:.3f}", f"{difference.mean:+.4f}", f"{difference.standard_error:.4f}"
    else:
        top, unit, low = f"{value:.1%}", f"{100 * difference.mean:+.1f}", f"{100 * difference.standard_error:.1f}"
    return top if row == result.reference else f"{top}\n{unit} ± {low}{star}"


def _save(figure: Figure, path: Path) -> None:
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=150)
    except ValueError as e:  # matplotlib's word for a suffix that it cannot write
        raise BadInput(f"{path}: {str(e).splitlines()[0]}") from None

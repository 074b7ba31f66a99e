"""Pictures of masks: density by layer and module, and how much masks overlap in what they prune."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mftmerge.errors import BadInput
from mftmerge.files import refuse_existing, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mftmerge.inspection import Inspection
    from mftmerge.overlap import Comparison

KINDS = (".png", ".svg", ".pdf")


def check(path: str | Path) -> None:
    """Raise BadInput where a picture cannot be written: another ending than .png, .svg or .pdf, or no directory."""
    if Path(path).suffix.lower() not in KINDS:
        raise BadInput(f"{path}: a picture ends with one of {', '.join(KINDS)}")
    refuse_existing(path, overwrite=True)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as .png, .svg or .pdf, whole or not at all. Raises BadInput for another ending."""
    check(path)
    path = Path(path)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lower()[1:], dpi=150, bbox_inches="tight")


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def density_by_layer(found: Inspection, title: str | None = None) -> Figure:
    """A heat map of the density of each module (rows) in each layer (columns), and that of whole layers above."""
    modules, layers, cells = found.table()
    values = np.full((len(modules), len(layers)), np.nan)
    for (module, layer), share in cells.items():
        values[modules.index(module), layers.index(layer)] = share.density
    figure = _figure(max(4.0, 2.2 + 0.45 * len(layers)), max(3.0, 2.0 + 0.32 * len(modules)))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[1, max(1.0, len(modules) / 4)])
    upper.bar(range(len(layers)), [s.density for s in found.by_layer().values()], color="#4477aa")
    upper.axhline(found.total.density, color="#222222", linewidth=0.8, linestyle="--")
    upper.set_ylabel("density")
    upper.set_title(title or f"{Path(found.path).name}: density {found.total.density:.4f}")
    span = [v for v in values.ravel() if np.isfinite(v)] or [1.0]
    upper.set_ylim(max(0.0, min(span) - 0.02), min(1.0, max(span) + 0.02) + 1e-6)
    image = lower.imshow(values, aspect="auto", cmap="viridis")
    lower.set_yticks(range(len(modules)), modules)
    lower.set_xticks(range(len(layers)), ["other" if n is None else str(n) for n in layers])
    lower.set_xlabel("layer")
    figure.colorbar(image, ax=lower, label="density")
    return figure


def overlap(comparison: Comparison) -> Figure:
    """Left: Jaccard of the pruned sets of each pair. Right: the same by layer, with the two baselines dashed/dotted."""
    names, pairs = comparison.names, comparison.pairs
    figure = _figure(6.5 + 0.6 * len(names), max(3.2, 1.5 + 0.5 * len(names)))
    left, right = figure.subplots(1, 2, width_ratios=[len(names) + 1, 5])
    _matrix(figure, left, names, np.array(comparison.matrix(lambda p: p.total.jaccard)))
    layers = sorted({n for p in pairs for n in p.by_layer}, key=lambda n: (n is None, n or 0))
    place = {n: i for i, n in enumerate(layers)}
    for i, pair in enumerate(pairs):
        at, colour = [place[n] for n in pair.by_layer], f"C{i % 10}"
        every = pair.by_layer.values()
        right.plot(at, [o.jaccard for o in every], "o-", color=colour, label=f"{pair.a}, {pair.b}", markersize=3)
        right.plot(at, [o.jaccard_independent for o in every], "--", color=colour, linewidth=0.8)
        if pair.total.jaccard_from_start is not None:
            right.plot(at, [o.jaccard_from_start for o in every], ":", color=colour)
    right.set_xticks(range(len(layers)), ["other" if n is None else str(n) for n in layers])
    right.set_xlabel("layer")
    right.set_ylabel("Jaccard of pruned sets")
    right.set_ylim(bottom=0)
    if len(pairs) <= 10:
        right.legend(
            fontsize=7,
            title="dashed: independent\ndotted: from a common start",
            title_fontsize=7,
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
        )
    return figure


def _matrix(figure: Figure, axes: Any, names: list[str], values: Any) -> None:
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title("pruned sets, Jaccard", fontsize=9)
    for i in range(len(names)):
        for j in range(len(names)):
            shade = "white" if values[i, j] < 0.6 else "black"
            axes.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", color=shade, fontsize=7)
    figure.colorbar(image, ax=axes, shrink=0.7)

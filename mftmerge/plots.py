"""Pictures: files of them, and a mask's density by layer and module."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mftmerge.errors import BadInput, shown
from mftmerge.files import refuse_existing, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mftmerge.inspection import Inspection

KINDS = (".png", ".svg", ".pdf")
MARKERS = "osD^vPX*"  # lines and points are told apart by more than colour


def check(path: str | Path, inputs: Iterable[object] = ()) -> None:
    """Raise BadInput where a picture cannot be written: another ending than .png, .svg or .pdf, no directory, an input.

    A picture that is there is replaced, as matplotlib does.
    """
    if Path(path).suffix.lower() not in KINDS:
        raise BadInput(f"{path}: a picture ends with one of {', '.join(KINDS)}")
    refuse_existing(path, overwrite=True, inputs=inputs)


def labels(names: Iterable[object]) -> list[str]:
    """Names from files, as text that a picture can show."""
    return [shown(str(name)) for name in names]


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as .png, .svg or .pdf, whole or not at all. Raises BadInput for another ending."""
    from matplotlib.text import Text

    check(path)
    path = Path(path)
    for text in figure.findobj(Text):
        if isinstance(text, Text):
            text.set_parse_math(False)  # a $ in a tensor's name is a $
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lower()[1:], dpi=150, bbox_inches="tight")


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def density_by_layer(found: Inspection, title: str | None = None) -> Figure:
    """A heat map of the density of each module (rows) in each layer (columns), and that of whole layers above."""
    modules, layers, cells = found.table()
    values = np.full((len(modules), len(layers)), np.nan)
    for (module, layer), share in cells.items():
        values[modules.index(module), layers.index(layer)] = share.density
    figure = new_figure(max(4.0, 2.2 + 0.45 * len(layers)), max(3.0, 2.0 + 0.32 * len(modules)))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[1, max(1.0, len(modules) / 4)])
    upper.bar(range(len(layers)), [s.density for s in found.by_layer().values()], color="#4477aa")
    upper.axhline(found.total.density, color="#222222", linewidth=0.8, linestyle="--")
    upper.set_ylabel("density")
    upper.set_title(shown(title or f"{Path(found.path).name}: density {found.total.density:.4f}"))
    span = [v for v in values.ravel() if np.isfinite(v)] or [1.0]
    upper.set_ylim(max(0.0, min(span) - 0.02), min(1.0, max(span) + 0.02) + 1e-6)
    image = lower.imshow(values, aspect="auto", cmap="viridis")
    lower.set_yticks(range(len(modules)), labels(modules))
    lower.set_xticks(range(len(layers)), ["other" if n is None else str(n) for n in layers])
    lower.set_xlabel("layer")
    figure.colorbar(image, ax=lower, label="density")
    return figure

"""Pictures: files of them, and a mask's density by layer and module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mftmerge.errors import BadInput, shown
from mftmerge.files import refuse_existing, replacing
from mftmerge.names import layer_name, layer_of, module_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mftmerge.inspection import Inspection

KINDS = (".png", ".svg", ".pdf")
MARKERS = "osD^vPX*"  # lines and points are told apart by more than colour


def require_kind(path: str | Path | None) -> None:
    """Raise BadInput for the name of a picture, if one is wanted, that ends with none of .png, .svg and .pdf."""
    if path is not None and Path(path).suffix.lower() not in KINDS:
        raise BadInput(f"{path}: a picture ends with one of {', '.join(KINDS)}")


def labels(names: Iterable[object]) -> list[str]:
    """Names from files, as text that a picture can show."""
    return [shown(str(name)) for name in names]


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as .png, .svg or .pdf, whole or not at all. Raises BadInput for another ending.

    A picture that is there is replaced, as matplotlib does; a command asks first, by `files.refuse_outputs`.
    """
    from matplotlib.text import Text

    require_kind(path)
    refuse_existing(path, overwrite=True)
    path = Path(path)
    for text in figure.findobj(Text):
        if isinstance(text, Text):
            text.set_parse_math(False)  # a $ in a tensor's name is a $
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lower()[1:], dpi=150, bbox_inches="tight")


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def density_by_layer(found: Inspection) -> Figure:
    """A heat map of the density of each module (rows) in each layer (columns), and that of whole layers above.

    The scale is fixed, from 0 to 1: densities that a cut made equal look equal.
    """
    modules, layers, cells = found.table()
    values = {key: share.density for key, share in cells.items()}
    means = [s.density for s in found.by_layer().values()]
    whole = f"{Path(found.path).name}: density {found.total.density:.4f}"
    return _by_layer(modules, layers, values, means, found.total.density, "density", whole)


def exchanged_by_layer(found: Inspection, exchanged: Mapping[str, int]) -> Figure:
    """The same of what training changed: of the weights that are dropped, the share that was kept before it.

    exchanged: tensor -> number of weights that the mask drops and the untrained mask keeps. A mask's density is the
    same everywhere by construction; this is where it learnt something. The scale is fixed, from 0 to 1.
    """
    modules, layers, _ = found.table()
    sums: dict[tuple[str, int | None], list[int]] = {}
    for name, share in found.tensors.items():
        cell = sums.setdefault((module_of(name), layer_of(name)), [0, 0])
        cell[0], cell[1] = cell[0] + exchanged[name], cell[1] + share.size - share.kept
    values = {key: new / dropped if dropped else 0.0 for key, (new, dropped) in sums.items()}
    rows = [[s for (_, n), s in sums.items() if n == layer] for layer in layers]
    means = [sum(a for a, _ in row) / max(1, sum(b for _, b in row)) for row in rows]
    total = sum(exchanged.values()) / max(1, found.total.size - found.total.kept)
    said = f"{Path(found.path).name}: training exchanged {total:.1%} of the dropped weights"
    return _by_layer(modules, layers, values, means, total, "share exchanged", said)


def _by_layer(
    modules: Sequence[str],
    layers: Sequence[int | None],
    values: Mapping[tuple[str, int | None], float],
    means: Sequence[float],
    total: float,
    label: str,
    title: str,
) -> Figure:
    """Shares from 0 to 1 by module and layer, written into the cells, and by whole layers above."""
    table = np.full((len(modules), len(layers)), np.nan)
    for (module, layer), value in values.items():
        table[modules.index(module), layers.index(layer)] = value
    figure = new_figure(max(5.0, 2.6 + 0.5 * len(layers)), max(3.4, 2.2 + 0.32 * len(modules)))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[1, max(1.0, len(modules) / 4)])
    upper.bar(range(len(layers)), means, color="#4477aa")
    upper.axhline(total, color="#222222", linewidth=0.8, linestyle="--", label=f"all: {total:.3f}")
    upper.set_ylabel(label)
    upper.set_ylim(0, 1)
    upper.set_title(title)
    upper.legend(fontsize=8, loc="best")
    image = lower.imshow(table, aspect="auto", cmap="cividis", vmin=0, vmax=1)
    for i, j in np.argwhere(np.isfinite(table)) if len(layers) <= 16 else ():
        shade = "white" if table[i, j] < 0.5 else "black"
        lower.text(j, i, f"{table[i, j]:.2f}", ha="center", va="center", color=shade, fontsize=7)
    lower.set_yticks(range(len(modules)), modules)
    lower.set_xticks(range(len(layers)), [layer_name(n) for n in layers])
    lower.set_xlabel("layer")
    figure.colorbar(image, ax=lower, label=label)
    return figure

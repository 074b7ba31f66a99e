"""Density by layer and module, as tables whose cells are coloured."""

from __future__ import annotations

from collections.abc import Sequence

from mftmerge.inspection import Share
from mftmerge.names import layer_name
from mftmerge.report.blocks import Bold, Cell, Content, Details, Paragraph, Row, Section, Table, heat, note
from mftmerge.report.collect import Collection, MaskHere

EVEN = 1e-3  # densities that differ by less look alike: small matrices cannot have any density exactly


def density_section(found: Collection) -> Section | None:
    """Density of each mask by layer and by module, and of each matrix where they differ."""
    if not found.masks:
        return None
    even = [m for m in found.masks if _is_even(m)]
    uneven = [m for m in found.masks if m not in even]
    parts: list[Content] = []
    if even:  # by construction: nothing to look at
        listed = ", ".join(f"{m.name} {m.found.total.density:.4f}" for m in even)
        parts.append(Paragraph([f"The same density in every matrix, within {EVEN}: ", listed, "."]))
    if uneven:
        layers = {m.name: {layer_name(k): s for k, s in m.found.by_layer().items()} for m in uneven}
        modules = {m.name: m.found.by_module() for m in uneven}
        parts += [
            _densities("Density by layer, over all its covered matrices", layers, uneven, "layer"),
            _densities("Density by module, over all layers", modules, uneven, "module"),
            note("The share of weights kept; the stronger the colour, the more is pruned."),
        ]
    for mask in uneven:
        parts.append(Details([Bold(mask.name), ": density of each module in each layer"], _matrix(mask)))
    return Section("density", "Density", parts)


def _is_even(mask: MaskHere) -> bool:
    densities = [s.density for s in mask.found.tensors.values() if s.size]
    return not densities or max(densities) - min(densities) < EVEN


def _densities(caption: str, shares: dict[str, dict[str, Share]], masks: Sequence[MaskHere], kind: str) -> Table:
    every = list(dict.fromkeys(k for own in shares.values() for k in own))
    if kind == "layer":
        every.sort(key=lambda k: (not k.isdigit(), int(k) if k.isdigit() else 0))
    span = _span([s for own in shares.values() for s in own.values()])
    totals = {m.name: m.found.total for m in masks}
    rows: list[Row] = [
        [name, f"{totals[name].density:.4f}", *(_share(own.get(k), span) for k in every)]
        for name, own in shares.items()
    ]
    return Table(caption, [["mask", "all", *(f"{kind} {k}" if k.isdigit() else k for k in every)]], rows, "heatmap")


def _matrix(mask: MaskHere) -> Table:
    modules, layers, cells = mask.found.table()
    span = _span(list(cells.values()))
    rows: list[Row] = [[module, *(_share(cells.get((module, n)), span) for n in layers)] for module in modules]
    return Table(
        f"{mask.name}: density",
        [["module", *(layer_name(n, "layer ") for n in layers)]],
        rows,
        "heatmap",
    )


def _span(shares: Sequence[Share]) -> tuple[float, float]:
    pruned = [1 - s.density for s in shares if s.size]
    low, high = min(pruned, default=0.0), max(pruned, default=0.0)
    return (low, high) if high - low > EVEN else (0.0, 1.0)


def _share(share: Share | None, span: tuple[float, float]) -> Cell | str:
    if share is None or not share.size:
        return ""
    return heat(1 - share.density, f"{share.density:.4f}", *span, title=f"{share.kept:,} of {share.size:,} kept")

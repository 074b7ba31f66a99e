"""Overlap of what masks prune, as tables whose cells are coloured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from mftmerge.errors import BadInput
from mftmerge.mask import Mask
from mftmerge.names import in_order, layer_name
from mftmerge.overlap import Comparison, Overlap, Pair, compare
from mftmerge.report.blocks import Bold, Cell, Content, Details, Paragraph, Row, Section, Small, Table, heat, note
from mftmerge.report.collect import Collection, MaskHere

MOST_COMPARED = 16  # masks of one matrix: 120 pairs


def comparisons(found: Collection, say: Callable[[str], None] = lambda text: None) -> list[Comparison]:
    """Masks that fit each other compared pairwise, a group for each set of shapes; adds what went wrong to `found`."""
    results = []
    for group in _groups(found.masks):
        chosen = group[:MOST_COMPARED]
        if len(chosen) < 2:
            continue
        say(f"comparing {len(chosen)} masks")
        names = [m.name for m in chosen]
        try:
            results.append(compare([_start_known(Mask.load(found.directory / m.path)) for m in chosen], names))
        except (BadInput, OSError, ValueError) as e:
            found.problems.append((", ".join(names), f"cannot be compared ({' '.join(str(e).split())})"))
    return results


def _groups(masks: Sequence[MaskHere]) -> list[list[MaskHere]]:
    """Masks by model: those that share a tensor's name share its shape."""
    groups: list[tuple[dict[str, tuple[int, ...]], list[MaskHere]]] = []
    for mask in masks:
        for shapes, members in groups:
            common = shapes.keys() & mask.found.shapes.keys()
            if common and all(shapes[n] == mask.found.shapes[n] for n in common):
                shapes |= mask.found.shapes
                members.append(mask)
                break
        else:
            groups.append((dict(mask.found.shapes), [mask]))
    return [members for _, members in groups]


def _start_known(mask: Mask) -> Mask:
    """The mask, without a start that only torch could draw again: the page does not load torch for a baseline."""
    if mask.info.training.get("init") == "normal" and not mask.has_initial_scores:
        mask.info = dataclasses.replace(mask.info, training={})
    return mask


def overlap_section(found: Collection, compared: Sequence[Comparison]) -> Section | None:
    """Overlap of what masks prune, against chance and a common start."""
    if not compared:
        return None
    ancestors = {m.name: {p.digest for _, p in m.found.info.family()} for m in found.masks}
    digests = {m.name: m.found.digest for m in found.masks}

    def relation(pair: Pair) -> str:
        descends = digests[pair.a] in ancestors[pair.b] or digests[pair.b] in ancestors[pair.a]
        return "one made from the other" if descends else ""

    parts: list[Content] = [
        Paragraph(
            "Jaccard: weights pruned by both masks over weights pruned by either. Below it the two baselines: what two "
            "masks of these densities share by chance, and, where the mask that they started from is known, what two "
            "masks share that left it independently of each other.",
        )
    ]
    for comparison in compared:
        parts += [_overlap_matrix(comparison), _pairs(comparison, relation), _by_layer(comparison)]
        if comparison.moved:
            moved = ", ".join(f"{name} {o.jaccard:.4f}" for name, o in comparison.moved.items())
            parts.append(note("Overlap of each mask with the one that its training started from: ", moved, "."))
    left = [m.name for group in _groups(found.masks) for m in group[MOST_COMPARED:]]
    if left:
        parts.append(
            note(f"Not compared here ({MOST_COMPARED} masks at most): ", ", ".join(left), ". Use mftmerge compare.")
        )
    return Section("overlap", "Overlap", parts)


def _overlap_matrix(comparison: Comparison) -> Table:
    totals: dict[frozenset[str], Pair] = {frozenset((p.a, p.b)): p for p in comparison.pairs}
    rows: list[Row] = []
    for a in comparison.names:
        row: Row = [a]
        for b in comparison.names:
            pair = totals.get(frozenset((a, b)))
            row.append(Cell("·", "n self") if a == b or pair is None or not pair.tensors else _overlap(pair.total))
        rows.append(row)
    caption = "Overlap of what masks prune: Jaccard, and below it by chance / from a common start"
    return Table(caption, [["mask", *comparison.names]], rows, "heatmap overlap")


def _overlap(o: Overlap) -> Cell:
    start = "" if o.jaccard_from_start is None else f" / {o.jaccard_from_start:.3f}"
    shown: Content = [f"{o.jaccard:.3f}", Small(f"{o.jaccard_independent:.3f}{start}")]
    return heat(o.jaccard, shown, 0.0, 1.0)


def _pairs(comparison: Comparison, relation: Callable[[Pair], str]) -> Details:
    heads: list[Row] = [
        ["masks", "Jaccard", "by chance", "common start", "agreement", "by chance", "matrices", Cell("remark", "word")]
    ]
    rows: list[Row] = []
    for p in comparison.pairs:
        o = p.total
        start = "unknown" if o.jaccard_from_start is None else f"{o.jaccard_from_start:.4f}"
        numbers = [f"{o.jaccard:.4f}", f"{o.jaccard_independent:.4f}", start]
        numbers += [f"{o.agreement:.4f}", f"{o.agreement_independent:.4f}", str(p.tensors)]
        rows.append([f"{p.a}, {p.b}", *numbers, Cell(relation(p), "word")])
    caption = "All pairs. Agreement: share of the weights on which both masks say the same"
    return Details([Bold(f"All {len(rows)} pairs"), " with exact numbers"], Table(caption, heads, rows))


def _by_layer(comparison: Comparison) -> Details:
    layers = in_order(n for p in comparison.pairs for n in p.by_layer)
    rows: list[Row] = []
    for p in comparison.pairs:
        cells = [heat(o.jaccard, f"{o.jaccard:.4f}", 0.0, 1.0) if (o := p.by_layer.get(n)) else "" for n in layers]
        rows.append([f"{p.a}, {p.b}", *cells])
    heads: list[Row] = [["masks", *(layer_name(n, "layer ") for n in layers)]]
    shown = Table("Jaccard of the pruned sets by layer", heads, rows, "heatmap")
    return Details(Bold("Overlap by layer"), shown)

"""`mftmerge compare`: overlap of masks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mftmerge.cli.options import MASKS, files
from mftmerge.cli.reporting import print_json, print_table, say


def command(
    masks: Annotated[list[Path], typer.Argument(help="Two or more mask files.", autocompletion=files(*MASKS))],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything, with the values by layer, as JSON.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture: overlap of the pairs, and by layer.")] = None,
) -> None:
    """Compare masks pairwise: overlap (Jaccard) of what they prune and agreement, against two baselines.

    \b
    independent: what two masks of these densities overlap by chance.
    common start: what two masks overlap that left the same untrained mask (same scores)
    independently; shown where that mask is known.
    Example:
      mftmerge compare code.mask math.mask --plot overlap.png
    """
    from mftmerge.mask import Mask
    from mftmerge.overlap import compare, picture

    names = [p.name if [q.name for q in masks].count(p.name) == 1 else str(p) for p in masks]
    found = compare([Mask.load(p) for p in masks], names)
    if plot is not None:
        from mftmerge import plots

        plots.save(picture(found), plot)
    if as_json:
        print_json(found.to_json())
        return
    heads = ["masks", "tensors", "Jaccard", "independent", "common start", "agreement", "independent"]
    rows = []
    for p in found.pairs:
        t = p.total
        begun = "unknown" if t.jaccard_from_start is None else f"{t.jaccard_from_start:.4f}"
        values = f"{t.jaccard:.4f}", f"{t.jaccard_independent:.4f}", begun
        rows.append([f"{p.a}, {p.b}", str(p.tensors), *values, f"{t.agreement:.4f}", f"{t.agreement_independent:.4f}"])
    print_table(heads, rows)
    for p in found.pairs:
        layers = {"other" if layer is None else str(layer): o for layer, o in p.by_layer.items()}
        print_table(
            ["layer", "Jaccard", "independent", "agreement"],
            [[n, f"{o.jaccard:.4f}", f"{o.jaccard_independent:.4f}", f"{o.agreement:.4f}"] for n, o in layers.items()],
            title=f"{p.a}, {p.b}",
        )
    for name, o in found.moved.items():
        say(f"{name}: Jaccard {o.jaccard:.4f} with its own untrained mask")
    if plot is not None:
        say(f"wrote {plot}")

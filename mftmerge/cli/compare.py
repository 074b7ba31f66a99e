"""`mftmerge compare`: overlap of masks."""

from __future__ import annotations

from pathlib import Path

import typer

from mftmerge.cli.completing import MASKS, files
from mftmerge.cli.reporting import print_json


def command(
    masks: list[Path] = typer.Argument(help="Two or more mask files.", autocompletion=files(*MASKS)),
    as_json: bool = typer.Option(False, "--json", help="Print everything, with the values by layer, as JSON."),
    plot: Path | None = typer.Option(None, "--plot", help="Write a picture: overlap of the pairs, and by layer."),
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
    from mftmerge.overlap import compare

    names = [p.name if [q.name for q in masks].count(p.name) == 1 else str(p) for p in masks]
    found = compare([Mask.load(p) for p in masks], names)
    if plot is not None:
        from mftmerge import plots

        plots.save(plots.overlap(found), plot)
    if as_json:
        print_json(found.to_json())
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(width=1000)
    table = Table("masks", "tensors", "Jaccard", "independent", "common start", "agreement", "independent", box=None)
    for p in found.pairs:
        begun = "unknown" if p.total.jaccard_from_start is None else f"{p.total.jaccard_from_start:.4f}"
        shares = f"{p.total.agreement:.4f}", f"{p.total.agreement_independent:.4f}"
        chance = f"{p.total.jaccard_independent:.4f}"
        table.add_row(f"{p.a}, {p.b}", str(p.tensors), f"{p.total.jaccard:.4f}", chance, begun, *shares)
    console.print(table)
    for pair in found.pairs:
        layers = Table("layer", "Jaccard", "independent", "agreement", title=f"{pair.a}, {pair.b}", box=None)
        for layer, o in pair.by_layer.items():
            name = "other" if layer is None else str(layer)
            layers.add_row(name, f"{o.jaccard:.4f}", f"{o.jaccard_independent:.4f}", f"{o.agreement:.4f}")
        console.print(layers)
    for name, o in found.moved.items():
        print(f"{name}: Jaccard {o.jaccard:.4f} with its own untrained mask")
    if plot is not None:
        print(f"wrote {plot}")

"""`mftmerge inspect`: what is in a mask file."""

from __future__ import annotations

from pathlib import Path

import typer

from mftmerge.cli.completing import MASKS, files
from mftmerge.cli.reporting import print_json


def command(
    mask: Path = typer.Argument(help="The mask file.", autocompletion=files(*MASKS)),
    as_json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
    plot: Path | None = typer.Option(None, "--plot", help="Write a picture of the density by layer and module."),
) -> None:
    """Show a mask's size, density by layer and module, provenance and family tree; checks every bit on the way.

    \b
    Example:
      mftmerge inspect code.mask --plot code.png
    """
    from mftmerge import inspection as inspecting

    found = inspecting.inspect(mask)
    if plot is not None:
        from mftmerge import plots

        plots.save(plots.density_by_layer(found), plot)
    if as_json:
        print_json(found.to_json())
        return
    kind = "archived" if found.archive else "raw"
    print(f"{mask}: {len(found.tensors)} tensors, {found.total.size:,} weights, density {found.total.density:.4f}")
    print(f"file {found.file_bytes:,} bytes, {kind}, {found.bits_per_weight:.3f} bits a weight; digest {found.digest}")
    if found.scores:
        print(f"scores: {found.scores}{', with those before training' if found.initial_scores else ''}")
    _table(found)
    for what, value in inspecting.provenance(found.info):
        print(f"{what}: {value}")
    if found.info.parents:
        print("\n".join(["", *inspecting.family_tree(mask.name, found.info)]))
    if plot is not None:
        print(f"wrote {plot}")


def _table(found: object) -> None:
    """Density of each module (rows) in each layer (columns), in blocks of layers that fit a terminal."""
    from rich.console import Console
    from rich.table import Table

    from mftmerge.inspection import Inspection, Share

    assert isinstance(found, Inspection)
    modules, layers, cells = found.table()
    by_module, by_layer, empty = found.by_module(), found.by_layer(), Share(0, 0)
    for start in range(0, len(layers), 8):
        some = layers[start : start + 8]
        table = Table("module", *("other" if n is None else str(n) for n in some), "all", box=None)
        for module in modules:
            row = [cells.get((module, n), empty) for n in some]
            if any(share.size for share in row):
                table.add_row(module, *(_cell(share) for share in row), _cell(by_module[module]))
        table.add_row("all", *(_cell(by_layer[n]) for n in some), _cell(found.total))
        Console(width=1000).print(table)


def _cell(share: object) -> str:
    from mftmerge.inspection import Share

    assert isinstance(share, Share)
    return f"{share.density:.3f}" if share.size else ""

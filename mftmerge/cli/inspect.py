"""`mftmerge inspect`: what is in a mask file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mftmerge.cli.options import YAML, AsJson, MaskFile, ReplacePictures
from mftmerge.cli.reporting import print_json, print_table, say
from mftmerge.errors import BadInput
from mftmerge.names import layer_name

if TYPE_CHECKING:
    from mftmerge.inspection import Inspection, Share

COLUMNS = 8  # layers beside each other in the table


def command(
    mask: MaskFile,
    as_json: AsJson = False,
    plot: Annotated[
        Path | None, typer.Option(help="Write a picture of what training changed, by layer and module.")
    ] = None,
    overwrite: ReplacePictures = False,
) -> None:
    """Show a mask's size, density by layer and module, provenance and family tree; checks every bit on the way.

    Of a recipe with merge_method: select, the share of each tensor's weights that each parent has.

    \b
    Example:
      mftmerge inspect code.mask --plot code.png
      mftmerge inspect learnt/recipe.yml
    """
    if mask.suffix in YAML:
        if plot is not None:
            raise BadInput("--plot shows what is in a mask; a recipe has none")
        _parents(mask, as_json)
        return
    from mftmerge import inspection

    if plot is not None:
        from mftmerge import plots
        from mftmerge.files import refuse_existing

        plots.require_kind(plot)
        refuse_existing(plot, overwrite, [mask])
    found = inspection.inspect(mask)
    if plot is not None:
        from mftmerge.mask import Mask
        from mftmerge.overlap import learnt_picture

        plots.save(learnt_picture(Mask.load(mask)), plot)
    if as_json:
        print_json(found.to_json())
        return
    kind = "archived" if found.archive else "raw"
    say(f"{mask}: {len(found.tensors)} tensors, {found.total.size:,} weights, density {found.total.density:.4f}")
    say(f"file {found.file_bytes:,} bytes; the mask in it {kind}, {found.bits_per_weight:.3f} bits a weight")
    if found.scores:
        before = ", and those before training" if found.initial_scores else ""
        say(f"scores: {found.scores}{before}, 4 bytes a weight each (combine writes none)")
    say(f"digest {found.digest}")
    _table(found)
    for what, value in inspection.provenance(found.info):
        say(f"{what}: {value}")
    if found.info.parents:
        say("", *inspection.family_tree(mask.name, found.info))
    if plot is not None:
        say(f"wrote {plot}")


def _parents(recipe: Path, as_json: bool) -> None:
    """Whose the weights of a selection are."""
    from mftmerge.recipe.parents import parents

    found = parents(recipe)
    shares = found.shares()
    if as_json:
        print_json({"parents": found.names, "shares": shares})
        return
    rows = [[name, *(f"{share:.3f}" for share in each)] for name, each in shares.items()]
    print_table(["tensor", *(Path(name).name for name in found.names)], rows)


def _table(found: Inspection) -> None:
    """Density of each module (rows) in each layer (columns), in blocks of layers that fit a terminal."""
    modules, layers, cells = found.table()
    if len({_cell(share) for share in cells.values()}) == 1:  # as a cut for each tensor gives
        say(f"density {found.total.density:.3f} in each module of each layer")
        return
    by_module, by_layer = found.by_module(), found.by_layer()
    for start in range(0, len(layers), COLUMNS):
        some = layers[start : start + COLUMNS]
        heads = ["module", *(layer_name(n) for n in some), "all"]
        rows = []
        for module in modules:
            shares = [cells.get((module, n)) for n in some]
            if any(share and share.size for share in shares):
                rows.append([module, *map(_cell, shares), _cell(by_module[module])])
        rows.append(["all", *(_cell(by_layer[n]) for n in some), _cell(found.total)])
        print_table(heads, rows)


def _cell(share: Share | None) -> str:
    return f"{share.density:.3f}" if share and share.size else ""

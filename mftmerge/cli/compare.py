"""`mftmerge compare`: overlap of masks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mftmerge.cli.options import MASKS, ReplacePictures, files
from mftmerge.cli.reporting import print_json, print_table, say
from mftmerge.errors import BadInput
from mftmerge.names import layer_name, layer_of

if TYPE_CHECKING:
    from mftmerge.conflict import Dispute
    from mftmerge.overlap import Comparison


def command(
    masks: Annotated[
        list[Path],
        typer.Argument(help="Two or more mask files, or checkpoints with --base.", autocompletion=files(*MASKS)),
    ],
    base: Annotated[
        str | None, typer.Option(help="Compare fine-tuned checkpoints of this base instead, by their task vectors.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything, with the values by layer, as JSON.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture: overlap of the pairs, and by layer.")] = None,
    conflict_plot: Annotated[
        Path | None, typer.Option(help="Write a map of opposed evidence, layers by modules, for each pair.")
    ] = None,
    overwrite: ReplacePictures = False,
) -> None:
    """Compare masks pairwise: overlap (Jaccard) of what they prune and agreement, against two baselines.

    \b
    independent: what two masks of these densities overlap by chance.
    common start: what two masks overlap that left the same untrained mask (same scores)
    independently; shown where that mask is known.
    Masks with scores, and checkpoints with --base, are also compared by their evidence: how much of it
    both ask for, how much opposes the other's, and which matrices carry that.
    Examples:
      mftmerge compare code.mask math.mask --plot overlap.png
      mftmerge compare fft-code fft-math --base base --conflict-plot conflict.png
    """
    from mftmerge import conflict, plots
    from mftmerge.checkpoint import resolve
    from mftmerge.files import refuse_outputs
    from mftmerge.mask import Mask
    from mftmerge.overlap import compare
    from mftmerge.overlap import picture as picture_of

    for picture in (plot, conflict_plot):
        plots.require_kind(picture)
    refuse_outputs((plot, conflict_plot), overwrite, (masks, base))
    if base is not None:
        if plot is not None:
            raise BadInput("--plot shows the overlap of masks; with --base give --conflict-plot")
        if len(masks) < 2:
            raise BadInput("give two checkpoints or more, fine-tuned from the --base")
        origin = resolve(base)
        disputes = conflict.of_checkpoints(origin, {str(p): resolve(p) for p in masks})
        if as_json:
            print_json({"base": base, "conflicts": [d.to_json() for d in disputes]})
    else:
        found = compare(masks)
        disputes = conflict.of_masks({n: Mask.load(p) for n, p in zip(found.names, masks, strict=True)})
        if plot is not None:
            plots.save(picture_of(found), plot)
        if as_json:
            print_json(found.to_json() | {"conflicts": [d.to_json() for d in disputes]})
        else:
            _show_overlap(found)
    if conflict_plot is not None:
        if not disputes:
            raise BadInput("--conflict-plot needs masks with scores (train --scores), at least two")
        plots.save(conflict.picture(disputes), conflict_plot)
    if not as_json:
        for dispute in disputes:
            _show_conflict(dispute)
        for picture in (plot, conflict_plot):
            if picture is not None:
                say(f"wrote {picture}")


def _show_overlap(found: Comparison) -> None:
    print_table(*found.rows())
    for p in found.pairs:
        layers = {layer_name(layer): o for layer, o in p.by_layer.items()}
        print_table(
            ["layer", "Jaccard", "independent", "agreement"],
            [[n, f"{o.jaccard:.4f}", f"{o.jaccard_independent:.4f}", f"{o.agreement:.4f}"] for n, o in layers.items()],
            title=f"{p.a}, {p.b}",
        )
    for name, o in found.moved.items():
        say(f"{name}: Jaccard {o.jaccard:.4f} with its own untrained mask")


def _show_conflict(dispute: Dispute) -> None:
    """One pair's evidence: the whole, then layer by layer, and the matrices that carry most of what is opposed."""
    parts = ("agreed", "agreed_by_chance", "opposed", "opposed_by_chance", "ignored")
    lines = {"all": dispute.total} | {layer_name(k): c for k, c in dispute.by(layer_of).items()}
    print_table(
        ["layer", "agreed", "by chance", "opposed", "by chance", "one alone"],
        [[name, *(f"{c.share(p):.1%}" for p in parts)] for name, c in lines.items()],
        title=f"evidence of {dispute.a}, {dispute.b}",
    )
    worst = ", ".join(f"{name} ({share:.0%})" for name, share in dispute.worst(3))
    if worst:
        say(f"most of what is opposed: {worst}")

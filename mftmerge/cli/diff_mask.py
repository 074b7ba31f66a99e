"""`mftmerge diff-mask`: masks in closed form, from checkpoints alone."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from mftmerge.cli.options import Archive, AsJson, MaskOut, Overwrite
from mftmerge.cli.reporting import new_mask


def command(
    base: Annotated[str, typer.Argument(help="The checkpoint before fine-tuning (directory or hub id).")],
    fine_tuned: Annotated[str, typer.Argument(help="The checkpoint after it.")],
    out: MaskOut,
    method: Annotated[
        Literal["magnitude", "tall", "sign"],
        typer.Option(help="magnitude: largest changes; tall: TALL-mask rule; sign: the multi-task vector's sign."),
    ] = "magnitude",
    keep: Annotated[str | None, typer.Option(help="magnitude: share of each tensor to keep, such as 0.1.")] = None,
    strength: Annotated[
        float, typer.Option("--lambda", help="tall: keep where |tau| >= lambda |tau_mtl - tau|.")
    ] = 0.4,
    merged: Annotated[str | None, typer.Option(help="tall, sign: the multi-task checkpoint.")] = None,
    others: Annotated[
        list[str] | None,
        typer.Option(help="tall, sign: in its place the other fine-tuned checkpoints, whose changes are added."),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(help="Regular expression for tensor names (default: all of 2 or more dimensions)."),
    ] = None,
    archive: Archive = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Derive a mask from what fine-tuning changed, without training. Apply it to the delta (apply --base).

    \b
    Example:
      mftmerge diff-mask ./base ./math-model --keep 0.1 -o math.mask
      mftmerge diff-mask ./base ./math-model --method tall --others ./code-model -o math.mask
    """
    from mftmerge.derive import DiffSettings, diff_mask
    from mftmerge.files import refuse_existing

    refuse_existing(out, overwrite, (base, fine_tuned, merged, others))
    notes: list[str] = []
    settings = DiffSettings(method, keep, strength, merged, tuple(others or ()), only)
    mask = diff_mask(base, fine_tuned, settings, note=notes.append)
    mask.save(out, archive=archive, overwrite=overwrite)
    new_mask(mask, out, notes, as_json)

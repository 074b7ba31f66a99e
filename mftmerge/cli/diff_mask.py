"""`mftmerge diff-mask`: masks in closed form, from checkpoints alone."""

from __future__ import annotations

from pathlib import Path

import typer

from mftmerge.cli.completing import choices
from mftmerge.cli.reporting import new_mask


def command(
    base: str = typer.Argument(help="The checkpoint before fine-tuning (directory or hub id)."),
    fine_tuned: str = typer.Argument(help="The checkpoint after it."),
    out: Path = typer.Option(..., "--out", "-o", help="The mask file to write."),
    method: str = typer.Option(
        "magnitude",
        help="magnitude: largest changes; tall: TALL-mask rule; sign: the multi-task vector's sign.",
        autocompletion=choices("magnitude", "tall", "sign"),
    ),
    keep: str = typer.Option(None, "--keep", help="magnitude: share of each tensor to keep, such as 0.1."),
    strength: float = typer.Option(0.4, "--lambda", help="tall: keep where |tau| >= lambda |tau_mtl - tau|."),
    merged: str = typer.Option(None, "--merged", help="tall, sign: the multi-task checkpoint."),
    others: list[str] = typer.Option(
        [], "--others", help="tall, sign: in its place the other fine-tuned checkpoints, whose changes are added."
    ),
    only: str = typer.Option(
        None, "--only", help="Regular expression for tensor names (default: all of 2 or more dimensions)."
    ),
    archive: bool = typer.Option(False, "--archive", help="Compress the result (about half the size)."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the output where it exists."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Derive a mask from what fine-tuning changed, without training. Apply it to the delta (apply --base).

    \b
    Example:
      mftmerge diff-mask ./base ./math-model --keep 0.1 -o math.mask
      mftmerge diff-mask ./base ./math-model --method tall --others ./code-model -o math.mask
    """
    from mftmerge.derive import DiffSettings, diff_mask
    from mftmerge.files import refuse_existing

    refuse_existing(out, overwrite)
    settings = DiffSettings(method, keep, strength, merged, tuple(others), only)  # type: ignore[arg-type]
    mask, notes = diff_mask(base, fine_tuned, settings)
    mask.save(out, archive=archive, overwrite=overwrite)
    new_mask(mask, out, notes, as_json)

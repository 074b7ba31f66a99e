"""`mftmerge export`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from mftmerge.cli.lateimports import postpone
from mftmerge.cli.options import AsJson, Overwrite, Recipe
from mftmerge.cli.reporting import print_json, say


def command(
    recipe: Recipe,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for config.yml and its checkpoints.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Run stock mergekit on the export and compare every tensor.")
    ] = False,
    overwrite: Overwrite = False,
    allow_lost: Annotated[
        bool, typer.Option("--allow-lost", help="Export without tensors of an input that would reach no output.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Export a recipe to a form that stock mergekit runs with no plug-in.

    Masks become masked checkpoints, or a second merge over a K-mask; the cheapest form with exactly the same result is
    chosen and explained. The configuration names its checkpoints by absolute paths.

    \b
    Example:
      mftmerge export recipes/vote_mask_on_merge.yml -o exported --verify
    """
    postpone()
    from mftmerge.recipe.export import export

    report = export(
        recipe,
        out,
        verify=verify,
        overwrite=overwrite,
        allow_lost=allow_lost,
        notify=lambda text: say(text, error=True),
    )
    for warning in report.warnings:
        say(f"warning: {recipe}: {warning}", error=True)
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    say(f"{report.out}: {report.nbytes / 1e6:.1f} MB")
    for form in report.forms:
        say(f"  {form}")
    say(f"run with: {report.command}")
    if v := report.verification:
        equal = f"{v.tensors} tensors, {v.weights} weights equal"
        say(f"verified: {equal}; {v.different_bits} differ in the sign of zero")

"""`mftmerge export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mftmerge.cli.completing import YAML, files
from mftmerge.cli.reporting import print_json


def command(
    recipe: Annotated[Path, typer.Argument(help="Recipe: a mergekit YAML plus masks.", autocompletion=files(*YAML))],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for config.yml and its checkpoints.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Run stock mergekit on the export and compare every tensor.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output directory.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Export a recipe to a form that stock mergekit runs with no plug-in.

    Masks become masked checkpoints, or a second merge over a K-mask; the cheapest form with exactly the same result is
    chosen and explained. The configuration names its checkpoints by absolute paths.

    \b
    Example:
      mftmerge export recipes/vote_mask_on_merge.yml -o exported --verify
    """
    import dataclasses
    import sys

    from mftmerge.recipe.export import export

    report = export(recipe, out, verify=verify, overwrite=overwrite, notify=lambda text: print(text, file=sys.stderr))
    for warning in report.warnings:
        print(f"warning: {recipe}: {warning}", file=sys.stderr)
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    print(f"{report.out}: {report.nbytes / 1e6:.1f} MB")
    for form in report.forms:
        print(f"  {form}")
    print(f"run with: {report.command}")
    if report.verification:
        v = report.verification
        print(
            f"verified: {v.tensors} tensors, {v.weights} weights equal; {v.different_bits} differ in the sign of zero"
        )

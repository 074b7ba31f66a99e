"""`mftmerge build`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from mftmerge.cli.lateimports import postpone
from mftmerge.cli.options import AsJson, Recipe, options
from mftmerge.cli.progress import shown_progress
from mftmerge.cli.reporting import print_json, say
from mftmerge.errors import BadInput
from mftmerge.machine import set_large_pages
from mftmerge.recipe.settings import BuildSettings

DEVICES = ("cpu", "cuda", "mps", "xpu")


@options(given=BuildSettings)
def command(
    *,
    recipe: Recipe,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Directory for the built model.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    given: dict[str, Any],
    as_json: AsJson = False,
) -> None:
    """Build a model from a recipe: a mergekit YAML plus masks on its inputs and its result.

    All that is wrong with the recipe is reported first, with line numbers; the output appears whole or not at all.

    \b
    Example:
      mftmerge build recipes/masked_task_arithmetic.yml -o merged
      mftmerge build recipes/masked_task_arithmetic.yml --dry-run
    """
    postpone()
    set_large_pages()
    from mftmerge.recipe.build import build
    from mftmerge.recipe.plan import plan

    settings = BuildSettings.make(given)
    if dry_run:
        planned = plan(recipe, settings)
        if as_json:
            print_json(dataclasses.asdict(planned))
        else:
            print(planned.text())
        return
    if settings.device.partition(":")[0] not in DEVICES:
        raise BadInput(f"--device {settings.device}: give one of {', '.join(DEVICES)}, such as cuda or cuda:1")
    if out is None:
        raise BadInput("no output directory; give -o DIR, or --dry-run to see the plan")
    with shown_progress(quiet=as_json) as show:
        report = build(recipe, out, progress=show, **given)
    for warning in report.warnings:
        say(f"warning: {recipe}: {warning}", error=True)
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    size = f"{report.tensors} tensors, {report.nbytes / 1e6:.1f} MB in {report.seconds:.1f} s"
    odd = f"; {report.not_finite} weights are not finite" if report.not_finite else ""
    say(f"{report.out}: {size}{odd}")
    say(f"next: mftmerge eval --model {report.out} --data NAME=FILE")

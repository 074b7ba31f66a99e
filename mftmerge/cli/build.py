"""`mftmerge build`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mftmerge.cli.completing import YAML, files
from mftmerge.cli.reporting import print_json

DEVICES = ("cpu", "cuda", "mps", "xpu")


def command(
    recipe: Annotated[Path, typer.Argument(help="Recipe: a mergekit YAML plus masks.", autocompletion=files(*YAML))],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Directory for the built model.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output directory.")] = False,
    executor: Annotated[
        Literal["auto", "stream", "mergekit"], typer.Option(help="Who merges; stream: linear, task_arithmetic, ties.")
    ] = "auto",
    seed: Annotated[int | None, typer.Option(help="Seed of methods that draw random numbers (dare, della).")] = None,
    device: Annotated[str, typer.Option(help="Where mergekit does arithmetic: cpu, cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Build a model from a recipe: a mergekit YAML plus masks on its inputs and its result.

    All that is wrong with the recipe is reported first, with line numbers; the output appears whole or not at all.

    \b
    Example:
      mftmerge build recipes/masked_task_arithmetic.yml -o merged
      mftmerge build recipes/masked_task_arithmetic.yml --dry-run
    """
    import dataclasses
    import sys

    from mftmerge.errors import BadInput
    from mftmerge.recipe.build import build
    from mftmerge.recipe.plan import plan

    if dry_run:
        planned = plan(recipe, executor=executor)
        if as_json:
            print_json(dataclasses.asdict(planned))
        else:
            print(planned.text())
        return
    if device.partition(":")[0] not in DEVICES:
        raise BadInput(f"--device {device}: give one of {', '.join(DEVICES)}, such as cuda or cuda:1")
    if out is None:
        raise BadInput("no output directory; give -o DIR, or --dry-run to see the plan")
    from mftmerge.cli.progress import bytes_bar

    with bytes_bar("build", quiet=as_json) as progress:
        report = build(recipe, out, overwrite=overwrite, executor=executor, seed=seed, device=device, progress=progress)
    for warning in report.warnings:
        print(f"warning: {recipe}: {warning}", file=sys.stderr)
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        print(
            f"{report.out}: {report.tensors} tensors, {report.nbytes / 1e6:.1f} MB in {report.seconds:.1f} s"
            f" ({', '.join(report.executors)})"
        )

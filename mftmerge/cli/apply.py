"""`mftmerge apply`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from mftmerge.cli.options import AsJson, MaskFile, ModelOut, Overwrite
from mftmerge.cli.progress import shown_progress
from mftmerge.cli.reporting import print_json


def command(
    mask: MaskFile,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Checkpoint directory or hub id that the mask is applied to.")
    ],
    out: ModelOut,
    base: Annotated[
        str | None, typer.Option(help="Apply to the delta: dropped weights get this checkpoint's values.")
    ] = None,
    overwrite: Overwrite = False,
    require_base: Annotated[
        bool,
        typer.Option("--require-base", help="Refuse a model whose covered tensors are not those of the mask's base."),
    ] = False,
    check_base: Annotated[
        bool, typer.Option(help="Say how much the model differs from the mask's base (hashes it).")
    ] = True,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue what a killed run left; keep finished shards.")
    ] = False,
    include: Annotated[
        list[str] | None, typer.Option(help="Copy further files too, e.g. '*.py'. May be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Apply a mask to a checkpoint and write the result as a complete one.

    Dropped weights become 0, or with --base the base's value; every other bit stays. Weights, index, configuration,
    tokenizer, chat template and licence come along; pickles and code do not.

    \b
    mftmerge apply general.mask --model HuggingFaceTB/SmolLM2-135M-Instruct -o masked
    """
    from mftmerge.apply import apply_mask

    with shown_progress(quiet=as_json) as show:
        report = apply_mask(
            mask,
            model,
            out,
            base=base,
            overwrite=overwrite,
            require_base=require_base,
            check_base=check_base,
            resume=resume,
            include=include or [],
            progress=show,
        )
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    share = report.dropped / report.covered if report.covered else 0.0
    dropped = f"{report.dropped:,} of {report.covered:,} weights dropped ({share:.2%})"
    print(f"{out}: {report.tensors} tensors masked, {dropped}")
    if report.difference:
        print(report.difference)
    if report.continued:
        print(f"continued: {len(report.continued)} shards were already there")
    for note in report.notes:
        print(f"note: {note}")

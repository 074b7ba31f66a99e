"""`mftmerge apply`."""

from __future__ import annotations

from pathlib import Path

import typer

from mftmerge.cli.completing import MASKS, files
from mftmerge.cli.progress import bytes_bar
from mftmerge.cli.reporting import print_json


def command(
    mask: Path = typer.Argument(
        ..., help="The .mask file, here or as hf://owner/name/file.mask.", autocompletion=files(*MASKS)
    ),
    model: str = typer.Option(..., "--model", "-m", help="Checkpoint directory or hub id that the mask is applied to."),
    out: Path = typer.Option(..., "--out", "-o", help="Directory to write."),
    base: str = typer.Option(None, "--base", help="Apply to the delta: dropped weights get this checkpoint's values."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing checkpoint at OUT."),
    require_base: bool = typer.Option(
        False, "--require-base", help="Refuse a model whose covered tensors are not those the mask was made for."
    ),
    check_base: bool = typer.Option(
        True, "--check-base/--no-check-base", help="Say how much the model differs from the mask's base (hashes it)."
    ),
    resume: bool = typer.Option(False, "--resume", help="Continue what a killed run left; keep finished shards."),
    include: list[str] = typer.Option([], "--include", help="Copy further files too, e.g. '*.py'. May be repeated."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Apply a mask to a checkpoint and write the result as a complete one.

    Dropped weights become 0, or with --base the base's value; every other bit stays. Weights, index, configuration,
    tokenizer, chat template and licence come along; pickles and code do not.

    \b
    mftmerge apply general.mask --model HuggingFaceTB/SmolLM2-135M-Instruct -o masked
    """
    from mftmerge.apply import apply_mask

    with bytes_bar("apply", quiet=as_json) as progress:
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
            progress=progress and (lambda step: progress(step.done, step.total)),
        )
    if as_json:
        import dataclasses

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

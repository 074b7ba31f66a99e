"""`mftmerge apply`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from mftmerge.applysettings import ApplySettings
from mftmerge.cli.options import AsJson, MaskFile, ModelOut, options
from mftmerge.cli.progress import shown_progress
from mftmerge.cli.reporting import print_json, say


@options(given=ApplySettings)
def command(
    *,
    mask: MaskFile,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Checkpoint directory or hub id that the mask is applied to.")
    ],
    out: ModelOut,
    given: dict[str, Any],
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
        report = apply_mask(mask, model, out, progress=show, **given)
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    share = report.dropped / report.covered if report.covered else 0.0
    dropped = f"{report.dropped:,} of {report.covered:,} weights dropped ({share:.2%})"
    say(f"{out}: {report.tensors} tensors masked, {dropped}")
    if report.difference:
        say(str(report.difference))
    if report.continued:
        say(f"continued: {len(report.continued)} shards were already there")
    for note in report.notes:
        say(f"note: {note}")
    say(f"next: load {out} with transformers or vLLM, or mftmerge push {out} OWNER/NAME")

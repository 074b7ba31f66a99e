"""`mftmerge rebase`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from mftmerge.cli.options import ROWS, AsJson, MaskFile, MaskOut, Overwrite, files, options
from mftmerge.cli.progress import shown_progress
from mftmerge.cli.reporting import print_json, quiet, say
from mftmerge.learn.rebasesettings import RebaseSettings


@options(given=RebaseSettings)
def command(
    mask: MaskFile,
    out: MaskOut,
    model: Annotated[str, typer.Option("--model", "-m", help="The model to fit the mask to: directory or hub id.")],
    data: Annotated[
        list[str], typer.Option("--data", "-d", help="Rows of the mask's domain.", autocompletion=files(*ROWS))
    ],
    base: Annotated[
        Path | None, typer.Option("--base", help="Of a mask over a delta: the model that dropped weights return to.")
    ] = None,
    guard: Annotated[
        list[str] | None,
        typer.Option(
            "--guard",
            help="Rows of another domain that is not to lose by the mask; may be given again.",
            autocompletion=files(*ROWS),
        ),
    ] = None,
    *,
    given: dict[str, Any],
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Fit a mask to a merged or further-tuned model, with some 32 rows of its domain.

    Kept dropped is what the new model's gradient confirms and validation rows find better than no mask. Where that is
    nothing, the mask that keeps everything is written, and said. Rows of one domain say nothing of what others pay:
    `--guard` takes rows of another that is not to lose.

    \b
    mftmerge rebase code.mask --model TUNED --data rows.jsonl -o code-tuned.mask
    """
    quiet()
    from mftmerge.learn.rebase import rebase_mask

    with shown_progress(quiet=as_json) as show:
        result = rebase_mask(
            mask,
            model,
            data,
            out,
            base=base,
            guards={name: name for name in guard or []},
            settings=given,
            overwrite=overwrite,
            progress=show,
            note=lambda line: say(line, error=as_json),
        )
    if as_json:
        facts = {"chosen": result.chosen, "gained": result.gained, "dropped": result.dropped, "seconds": result.seconds}
        tried = {name: dataclasses.asdict(d) for name, d in result.candidates.items()}
        guards = {name: dataclasses.asdict(d) for name, d in result.guards.items()}
        print_json({"out": str(out), "digest": result.mask.digest, **facts, "candidates": tried, "guards": guards})
        return
    say(f"{out}: {len(result.mask.names)} tensors, density {result.mask.density():.4f}, {result.seconds:.0f} s")
    say(f"next: mftmerge eval --model {model} --mask {out} --data NAME=FILE")

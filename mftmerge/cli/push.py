"""`mftmerge push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mftmerge.cli.options import MASKS, AsJson, files
from mftmerge.cli.reporting import print_json, say


def command(
    what: Annotated[
        Path, typer.Argument(help="A .mask file, or a checkpoint's directory.", autocompletion=files(*MASKS))
    ],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Model repository on the Hub.")],
    base: Annotated[str | None, typer.Option(help="Hub id of the mask's base, where the mask names a path.")] = None,
    license: Annotated[str | None, typer.Option(help="For the card, such as apache-2.0.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the card and the files; upload nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a mask or a checkpoint to the Hugging Face Hub, with a card: base model, family tree, how to use it.

    \b
    Example:
      mftmerge push code.mask me/code-mask --base HuggingFaceTB/SmolLM2-135M-Instruct --dry-run
    """
    from mftmerge.push import push

    done = push(what, repository, base=base, license=license, private=private, dry_run=dry_run)
    if as_json:
        print_json({"repository": done.repository, "files": list(done.files), "card": done.card, "url": done.url})
        return
    if done.url is None:
        print(done.card)
    say(f"{'would upload' if done.url is None else done.url + ':'} {', '.join(done.files)}")
    if done.url is None:
        say("next: the same without --dry-run")

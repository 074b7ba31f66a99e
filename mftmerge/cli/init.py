"""`mftmerge init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mftmerge.cli.options import AsJson, Overwrite
from mftmerge.cli.reporting import print_json, say


def command(
    out: Annotated[Path, typer.Argument(help="The job file to write.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The fine-tuned model.")] = "my-model",
    domains: Annotated[list[str] | None, typer.Option("--domain", help="A domain's name; may be repeated.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a commented file that says a whole job: train a mask a domain, choose, evaluate, report.

    \b
    Example:
      mftmerge init job.yml --model my-model --domain code --domain math
    """
    from mftmerge.files import refuse_existing, write_text
    from mftmerge.job import template

    refuse_existing(out, overwrite)
    write_text(out, template(out.name, model, domains or ["code", "math", "chat"], "job"))
    if as_json:
        print_json({"out": str(out)})
        return
    say(f"wrote {out}", f"next: put the names of your files into it, then mftmerge run {out}")

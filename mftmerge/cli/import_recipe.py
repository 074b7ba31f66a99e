"""`mftmerge import-recipe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mftmerge.cli.lateimports import postpone
from mftmerge.cli.options import YAML, AsJson, Overwrite, files
from mftmerge.cli.reporting import print_json, say


def command(
    config: Annotated[Path, typer.Argument(help="A mergekit YAML.", autocompletion=files(*YAML))],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Recipe to write; default: print it.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Read any mergekit YAML as a recipe.

    Keys and parameters that mergekit silently ignores are removed and listed, since a recipe refuses them.

    \b
    Example:
      mftmerge import-recipe mergekit_config.yml -o recipe.yml
    """
    postpone()
    from mftmerge.files import refuse_existing, write_text
    from mftmerge.recipe.importing import import_recipe

    if out is not None:
        refuse_existing(out, overwrite, (config,))
    report = import_recipe(config, folder=out.parent if out else None)
    if out is not None:
        write_text(out, report.text)
    if as_json:
        print_json({"out": out and str(out), "recipe": report.text, "notes": report.notes})
        return
    for note in report.notes:
        say(f"note: {note}", error=True)
    if out is None:
        print(report.text, end="")
    else:
        say(f"wrote {out}", f"next: mftmerge build {out} -o DIR")

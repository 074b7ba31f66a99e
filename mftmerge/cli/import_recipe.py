"""`mftmerge import-recipe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mftmerge.cli.completing import YAML, files
from mftmerge.cli.reporting import print_json


def command(
    config: Annotated[Path, typer.Argument(help="A mergekit YAML.", autocompletion=files(*YAML))],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Recipe to write; default: print it.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the recipe and the notes as JSON.")] = False,
) -> None:
    """Read any mergekit YAML as a recipe.

    Keys and parameters that mergekit silently ignores are removed and listed, since a recipe refuses them.

    \b
    Example:
      mftmerge import-recipe mergekit_config.yml -o recipe.yml
    """
    import sys

    from mftmerge.errors import BadInput
    from mftmerge.files import replacing
    from mftmerge.recipe.importing import import_recipe

    if out is not None and out.exists() and not overwrite:
        raise BadInput(f"{out}: already exists; give --overwrite to replace it")
    report = import_recipe(config, folder=out.parent if out else None)
    if out is not None:
        with replacing(out) as temporary:
            temporary.write_text(report.text, encoding="utf-8")
    if as_json:
        print_json({"out": out and str(out), "recipe": report.text, "notes": report.notes})
        return
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    print(report.text if out is None else f"{out}\n", end="")

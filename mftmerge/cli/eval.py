"""`mftmerge eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from mftmerge.cli.options import MASKS, ROWS, files, named, options
from mftmerge.cli.progress import shown_progress
from mftmerge.cli.reporting import quiet, say
from mftmerge.evaluate.measures import Measures, Opening


@options(opening=Opening, given=Measures)
def command(
    models: list[str] = typer.Option(
        ..., "--model", "-m", metavar="[NAME=]MODEL", help="Checkpoint directory or hub id; may be repeated."
    ),
    masks: list[str] = typer.Option(
        [], "--mask", metavar="[NAME=]FILE", help="A .mask file; may be repeated.", autocompletion=files(*MASKS)
    ),
    data: list[str] = typer.Option(
        ...,
        "--data",
        "-d",
        metavar="[NAME=]FILE",
        help="Rows of one domain: JSONL, JSON, Parquet or a hub id.",
        autocompletion=files(*ROWS),
    ),
    more: list[str] = typer.Argument(None, metavar="[NAME=FILE]...", help="Further domains after --data."),
    reference: str = typer.Option(
        None, "--reference", help="Row that differences are taken against; the first model by default."
    ),
    opening: dict[str, Any] | None = None,
    given: dict[str, Any] | None = None,
    out: Path = typer.Option(None, "--out", "-o", help="Write everything as JSON; a run that was stopped goes on."),
    markdown: Path = typer.Option(None, "--markdown", help="Write the table as Markdown."),
    plot: Path = typer.Option(None, "--plot", help="Write a heat map of the differences (.png, .svg, .pdf)."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace existing output files."),
    as_json: bool = typer.Option(False, "--json", help="Print what --out writes, in place of the table."),
) -> None:
    """Compare models and masks on held-out rows of several domains.

    Loss per assistant token on every row of every domain, with the paired difference from a reference row and its
    standard error, and in words where a mask did not help. Each model is loaded once; masks are switched in memory.

    \b
    mftmerge eval --model fft --mask math.mask --mask code.mask --data math=math.jsonl --data code=code.jsonl
    """
    from mftmerge.files import refuse_outputs
    from mftmerge.plots import require_kind

    domains = named([*data, *(more or [])], "--data")
    inputs = named(models, "--model"), named(masks, "--mask"), domains
    refuse_outputs((out, markdown, plot), overwrite, inputs)
    require_kind(plot)
    from rich.console import Console

    from mftmerge.evaluate.files import evaluate_files

    quiet()
    journal = Path(f"{out}.answers") if out else None
    measures, opened = Measures.make(given or {}), Opening.make(opening or {}).model_dump()
    with shown_progress(quiet=as_json) as show:
        result = evaluate_files(
            *inputs,
            reference=reference,
            measures=measures,
            **opened,
            journal=journal,
            progress=show,
        )
    if out:
        result.to_json(out, overwrite=overwrite)
        Path(f"{out}.answers").unlink(missing_ok=True)
    if markdown:
        result.to_markdown(markdown, overwrite=overwrite)
    if plot:
        result.plot(plot, overwrite=overwrite)
    if as_json:
        print(result.to_json(), end="")
        return
    result.show(Console())
    for path in (out, markdown, plot):
        if path is not None:
            say(f"wrote {path}")
    say("next: mftmerge report . makes a page of it" if out else "next: --out results.json keeps every row's numbers")

"""`mftmerge choose`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from mftmerge.cli.options import MASKS, ROWS, files, named, options
from mftmerge.cli.progress import shown_progress
from mftmerge.cli.reporting import print_json, quiet, say
from mftmerge.evaluate.measures import Measuring, Opening
from mftmerge.evaluate.searchsettings import SearchSettings
from mftmerge.files import refuse_outputs


@options(opening=Opening, measuring=Measuring, given=SearchSettings)
def command(
    masks: list[str] = typer.Argument(
        metavar="[DOMAIN=]FILE...",
        help="One .mask file a domain; without DOMAIN the file's name stands in.",
        autocompletion=files(*MASKS),
    ),
    model: str = typer.Option(..., "--model", "-m", help="Checkpoint directory or hub id of the base."),
    data: list[str] = typer.Option(
        ...,
        "--data",
        "-d",
        metavar="[DOMAIN=]FILE",
        help="Validation rows of a domain: JSONL, JSON, Parquet or a hub id. Once for each mask.",
        autocompletion=files(*ROWS),
    ),
    out: Path = typer.Option(None, "--out", "-o", help="Write the chosen combination; without it, only report."),
    candidates: list[str] = typer.Option(
        [],
        "--try",
        metavar="OP[@DENSITY][,OPTION=VALUE]",
        help="A combination to try in place of the usual ones, e.g. score@0.93 or vote,threshold=2; may be repeated.",
    ),
    results: Path = typer.Option(
        None, "--results", help="Also write every measurement, as `eval --out` does: `report` makes a page of it."
    ),
    opening: dict[str, Any] | None = None,
    measuring: dict[str, Any] | None = None,
    archive: bool = typer.Option(False, "--archive", help="Compress the result (about half the size)."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the output where it exists."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
    given: dict[str, Any] | None = None,
) -> None:
    """Combine masks in several ways and write the one that keeps most of every domain's gain on validation rows.

    Of each combination and domain: the share of the own mask's gain over the base that is left. Chosen is the
    combination whose lowest share is highest. The model is loaded once; masks are combined and switched in memory.

    \b
    mftmerge choose math.mask code.mask --model fft -d math=math-val.jsonl -d code=code-val.jsonl -o general.mask
    ... --search 20 also measures 20 combinations that optuna proposes, predictions as its guide
    """
    own, rows = named(masks, "masks"), named(data, "--data")
    refuse_outputs((out, results), overwrite, (own, rows))

    from rich.console import Console

    from mftmerge.evaluate.choosing import choose_combination

    quiet()
    how = Opening.make(opening or {}).model_dump() | Measuring.make(measuring or {}).model_dump()
    with shown_progress(quiet=as_json) as show:
        choice = choose_combination(
            model,
            own,
            rows,
            out,
            candidates=candidates,
            archive=archive,
            overwrite=overwrite,
            **how,
            searching=SearchSettings.make(given or {}),
            progress=show,
        )
    if results is not None:
        choice.grid.to_json(results, overwrite=overwrite)
    if as_json:
        print_json(choice.to_json())
        return
    choice.show(Console())
    say(f"chosen: {choice.chosen}, density {choice.mask.density():.4f}; the same mask again:", f"  {choice.command}")
    if results is not None:
        say(f"wrote {results}: mftmerge report {results.parent} makes a page of it")
    if choice.out:
        say(f"wrote {choice.out} ({Path(choice.out).stat().st_size:,} bytes)")
        say(f"next: mftmerge eval --model {model} --mask {choice.out} with test rows")
    else:
        say("next: the same with -o FILE.mask writes the chosen combination")

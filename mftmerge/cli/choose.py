"""`mftmerge choose`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from mftmerge.cli.options import COLUMNS, MASKS, ROWS, SKIP_BAD_ROWS, files, named, options, pairs
from mftmerge.cli.progress import shown_progress
from mftmerge.cli.reporting import print_json, quiet, say
from mftmerge.errors import BadInput
from mftmerge.evaluate.searchsettings import SearchSettings
from mftmerge.files import refuse_existing

DTYPES = ("auto", "float32", "bfloat16", "float16")


@options(given=SearchSettings)
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
    base: str = typer.Option(
        None, "--base", help="Dropped weights take the values of this checkpoint (default: what each mask says)."
    ),
    exact: list[str] = typer.Option(
        [],
        "--exact",
        metavar="DOMAIN=RULE",
        help="Right answers choose there; RULE is number, text, sql or re:PATTERN.",
    ),
    max_new_tokens: int = typer.Option(256, "--max-new-tokens", min=1, help="Length of a generated answer."),
    columns: list[str] = COLUMNS,
    skip_bad_rows: bool = SKIP_BAD_ROWS,
    limit: int = typer.Option(None, "--limit", min=1, help="Use the first rows of each domain only."),
    max_length: int = typer.Option(1024, "--max-length", min=2, help="Tokens of a row; the rest is cut off."),
    dtype: str = typer.Option("auto", "--dtype", help="auto (as stored, or what is fast here), float32 or bfloat16."),
    device: str = typer.Option(None, "--device", help="cpu, cuda, ...; by default a GPU when there is one."),
    batch_tokens: int = typer.Option(4096, "--batch-tokens", min=1, help="Padded tokens in one forward pass."),
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
    if dtype not in DTYPES:
        raise BadInput(f"--dtype {dtype}: give {', '.join(DTYPES)}")
    own, rows = named(masks, "masks"), named(data, "--data")
    if results is not None:
        refuse_existing(results, overwrite, (own, rows, out))

    from rich.console import Console

    from mftmerge.evaluate.choosing import choose_combination

    quiet()
    with shown_progress(quiet=as_json) as show:
        choice = choose_combination(
            model,
            own,
            rows,
            out,
            candidates=candidates,
            archive=archive,
            overwrite=overwrite,
            limit=limit,
            max_length=max_length,
            batch_tokens=batch_tokens,
            dtype=dtype,
            device=device,
            base=base,
            exact=pairs(exact, "--exact", "DOMAIN=RULE"),
            max_new_tokens=max_new_tokens,
            columns=pairs(columns, "--columns"),
            skip_bad_rows=skip_bad_rows,
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

"""`mftmerge eval`."""

from __future__ import annotations

from pathlib import Path

import typer

from mftmerge.cli.options import COLUMNS, MASKS, ROWS, SKIP_BAD_ROWS, files, named, pairs
from mftmerge.cli.progress import shown_progress
from mftmerge.cli.reporting import quiet, say
from mftmerge.errors import BadInput

BASE = "Dropped weights take the values of this checkpoint (default: what each mask says)."


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
    base: str = typer.Option(None, "--base", help=BASE),
    columns: list[str] = COLUMNS,
    skip_bad_rows: bool = SKIP_BAD_ROWS,
    limit: int = typer.Option(None, "--limit", min=1, help="Use the first rows of each domain only."),
    max_length: int = typer.Option(1024, "--max-length", min=2, help="Tokens of a row; the rest is cut off."),
    exact: list[str] = typer.Option(
        [],
        "--exact",
        metavar="DOMAIN=RULE",
        help="Let the model answer; RULE is number (#### N), text, sql or re:PATTERN.",
    ),
    run_tests: bool = typer.Option(
        False, "--run-tests", help='pass@1 on rows with "tests": runs Python that the model wrote, in a sandbox.'
    ),
    trusted: bool = typer.Option(
        False, "--i-trust-this-code", help="Run tests even where the system cannot isolate them."
    ),
    max_new_tokens: int = typer.Option(256, "--max-new-tokens", min=1, help="Length of a generated answer."),
    answers: int = typer.Option(
        None, "--answers", min=1, help="Rows of a domain that are answered, the first ones; the loss is on all."
    ),
    bootstrap: int = typer.Option(0, "--bootstrap", min=0, help="Resamples for paired 95 % intervals; 0 for none."),
    lm_eval: str = typer.Option(None, "--lm-eval", metavar="TASKS", help="Also run lm-evaluation-harness tasks."),
    lm_eval_limit: int = typer.Option(None, "--lm-eval-limit", min=1, help="Documents a harness task at most."),
    dtype: str = typer.Option("auto", "--dtype", help="auto (as stored, or what is fast here), float32 or bfloat16."),
    device: str = typer.Option(None, "--device", help="cpu, cuda, ...; by default a GPU when there is one."),
    batch_tokens: int = typer.Option(4096, "--batch-tokens", min=1, help="Padded tokens in one forward pass."),
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
    from mftmerge.files import refuse_existing
    from mftmerge.plots import check

    domains = named([*data, *(more or [])], "--data")
    inputs = named(models, "--model"), named(masks, "--mask"), domains
    for path in (out, markdown, plot):
        if path is not None:
            refuse_existing(path, overwrite, inputs)
    if plot is not None:
        check(plot)
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise BadInput(f"--dtype {dtype}: give auto, float32, bfloat16 or float16")
    from rich.console import Console

    from mftmerge.evaluate.files import Measures, evaluate_files

    quiet()
    journal = Path(f"{out}.answers") if out else None
    with shown_progress(quiet=as_json) as show:
        result = evaluate_files(
            *inputs,
            reference=reference,
            measures=Measures(
                exact=pairs(exact, "--exact", "DOMAIN=RULE"),
                run_tests=run_tests,
                trusted=trusted,
                max_new_tokens=max_new_tokens,
                batch_tokens=batch_tokens,
                resamples=bootstrap,
                lm_eval=tuple(t.strip() for t in lm_eval.split(",") if t.strip()) if lm_eval else (),
                lm_eval_limit=lm_eval_limit,
                base=base,
                answers=answers,
                journal=journal,
                columns=pairs(columns, "--columns"),
                skip_bad_rows=skip_bad_rows,
            ),
            max_length=max_length,
            limit=limit,
            dtype=dtype,
            device=device,
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

"""`mftmerge sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mftmerge.cli.options import YAML, AsJson, Overwrite, files, options
from mftmerge.cli.progress import shown_progress
from mftmerge.cli.reporting import print_json, quiet, say
from mftmerge.errors import BadInput
from mftmerge.jobs import RunnerSettings
from mftmerge.progress import Step
from mftmerge.settings import in_words


@options(given=RunnerSettings)
def command(
    plan: Annotated[
        Path, typer.Argument(metavar="SWEEP.YML", help="The sweep file, as above.", autocompletion=files(*YAML))
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Directory for results.jsonl and masks/; continued if there.")
    ],
    markdown: Annotated[Path | None, typer.Option(help="Write both tables as Markdown.")] = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and stop.")] = False,
    as_json: AsJson = False,
    given: dict[str, Any] | None = None,
) -> None:
    """Train a mask for every combination of settings and every seed; choose on validation rows, report on test rows.

    The three sets of rows must share no row, and only the chosen settings meet the test rows. A sweep that was stopped
    continues with the same command. With --runner each run is a job of its own: of this machine, or of a Slurm cluster.

    \b
    model: fft
    train: math.jsonl[0:512]
    validation: math.jsonl[512:640]
    test: {math: "math.jsonl[-256:]"}
    settings: {steps: 60}
    grid: {lr: [0.0002, 0.001], keep: [0.9, 0.95]}
    seeds: [0, 1, 2]

    \b
    mftmerge sweep sweep.yml --out sweep
    """
    if not plan.is_file():
        raise BadInput(f"{plan}: no such sweep file")
    from rich.console import Console

    from mftmerge.files import refuse_existing
    from mftmerge.sweep import RESULTS, run_sweep, show, write_markdown
    from mftmerge.sweepplan import load_plan, plan_runs

    runner = RunnerSettings.make(given or {})
    wanted = load_plan(plan)
    if markdown is not None:
        inputs = (plan, wanted.model, wanted.train, wanted.validation, wanted.test)
        refuse_existing(markdown, overwrite, inputs)
    if dry_run:
        runs = plan_runs(wanted)
        if as_json:
            print_json([{"combination": r.combination, "seed": r.settings.seed} for r in runs])
            return
        for run in runs:
            say(f"{in_words(run.combination)}, seed {run.settings.seed}")
        return
    quiet()
    with shown_progress(quiet=as_json) as progress:
        result = run_sweep(wanted, out, runner=runner, progress=lambda what: progress(Step(what, 0, 0)))
    if markdown is not None:
        write_markdown(result, markdown, overwrite=overwrite)
    if as_json:
        print_json({"out": str(out), **result.to_json()})
        return
    show(result, Console())
    say(f"wrote {out / RESULTS}: {len(result.runs)} runs", f"next: mftmerge report {out}")

"""`mftmerge run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mftmerge.cli.options import YAML, AsJson, files
from mftmerge.cli.progress import shown_progress
from mftmerge.cli.reporting import quiet, say


def command(
    job: Annotated[Path, typer.Argument(help="A job file, see `mftmerge init`.", autocompletion=files(*YAML))],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="In the place of the job's own directory.")] = None,
    as_json: AsJson = False,
) -> None:
    """Do a whole job: learn a mask for each domain, choose a combination, evaluate it on test rows, write a page.

    Run it again after a stop or a change: only what is missing or has changed is done.

    \b
    Example:
      mftmerge run job.yml
    """
    from mftmerge.job import load_job, run_job

    loaded = load_job(job)
    if out is not None:
        loaded = loaded.model_copy(update={"out": str(out)})
    quiet()
    with shown_progress(quiet=as_json) as show:
        result = run_job(loaded, progress=show, note=lambda line: say(line, error=as_json))
    if as_json:
        print(result.to_json(), end="")
        return
    from rich.console import Console

    result.show(Console())
    names = [f"{name}.mask" for name in (*loaded.domains, *(["general"] if len(loaded.domains) > 1 else []))]
    say(f"wrote in {loaded.out}: {', '.join((*names, 'results.json', 'report.html'))}")
    best = Path(loaded.out) / names[-1]
    say(f"next: open {loaded.out}/report.html; mftmerge chat --model {loaded.model} --mask {best}")
    say(f"next: mftmerge apply {best} --model {loaded.model} -o DIR")

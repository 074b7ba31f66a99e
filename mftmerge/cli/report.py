"""`mftmerge report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mftmerge.cli.options import Overwrite
from mftmerge.cli.progress import shown_progress
from mftmerge.cli.reporting import print_json, say
from mftmerge.progress import Step


def command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory with masks and results, at any depth.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page; DIR/report.html by default.")] = None,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Also print what is on the page as JSON.")] = False,
) -> None:
    """Write one self-contained HTML page about the masks and results in a directory.

    It shows every .mask file, results of `mftmerge eval --out` and `mftmerge sweep`: what each mask is, gains with
    standard errors, densities, overlaps against two baselines, family trees and settings. The page needs no network
    and no other file. A file that cannot be read is named on the page, and the rest is shown.

    \b
    Example:
      mftmerge report . -o report.html
    """
    from mftmerge.report.page import write_report

    with shown_progress(quiet=as_json) as show:
        report = write_report(directory, out, overwrite=overwrite, say=lambda what: show(Step(what, 0, 0)))
    for name, problem in report.found.problems:
        say(f"mftmerge: note: {name}: {problem}", error=True)
    if as_json:
        print_json(report.to_json())
        return
    say(f"wrote {report.path}: {report.summary()}")
    say("next: open it in a browser; it needs no other file")

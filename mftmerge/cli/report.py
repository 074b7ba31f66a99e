"""`mftmerge report`."""

from __future__ import annotations

from pathlib import Path

import typer

from mftmerge.cli.reporting import print_json


def command(
    directory: Path = typer.Argument(..., metavar="DIR", help="Directory with masks and results, at any depth."),
    out: Path = typer.Option(None, "--out", "-o", help="The page; DIR/report.html by default."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing page."),
    as_json: bool = typer.Option(False, "--json", help="Also print what is on the page as JSON."),
) -> None:
    """Write one self-contained HTML page about the masks and results in a directory.

    It shows every .mask file, results of `mftmerge eval --out` and `mftmerge sweep`: what each mask is, gains with
    standard errors, densities, overlaps against two baselines, family trees and settings. The page needs no network
    and no other file. A file that cannot be read is named on the page, and the rest is shown.

    \b
    Example:
      mftmerge report . -o report.html
    """
    import sys

    from rich.console import Console
    from rich.text import Text

    from mftmerge.errors import shown
    from mftmerge.report.page import write_report

    with Console(stderr=True).status("starting") as status:
        report = write_report(directory, out, overwrite=overwrite, say=lambda what: status.update(Text(shown(what))))
    for name, problem in report.found.problems:
        print(shown(f"mftmerge: note: {name}: {problem}"), file=sys.stderr)
    if as_json:
        print_json(report.to_json())
        return
    print(f"{report.path}: {report.summary()}")

"""How far the work is, on stderr: a bar on a terminal, elsewhere a line every few percent."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from mftmerge.cli.reporting import verbosity
from mftmerge.errors import shown
from mftmerge.progress import Progress, Step

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

SHARE = 0.05  # of the work between two lines
QUIET = 5.0  # seconds without a line at the start: short work says nothing, and errors stand alone
APART = 2.0  # seconds between two lines at least


@contextmanager
def shown_progress(*, quiet: bool = False) -> Iterator[Progress]:
    """Gives the function that long work reports to. quiet: show nothing, as with --quiet."""
    if quiet or verbosity() < 0:
        yield lambda step: None
    elif sys.stderr.isatty():
        with _bars() as bars:
            yield _on_terminal(bars)
    else:
        yield Lines(sys.stderr)


def amount(step: Step) -> str:
    """`12 of 60 steps`, `1.2 of 3.4 GB`; nothing where the total is not known."""
    if not step.total:
        return ""
    if step.unit != "bytes":
        return f"{step.done:,} of {step.total:,} {step.unit}"
    size, unit = next((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")) if step.total >= s)
    return f"{step.done / size:.1f} of {step.total / size:.1f} {unit}"


def facts(step: Step) -> str:
    """`loss 1.2345, flipped 1,024`."""
    words = []
    for name, value in step.facts.items():
        if value is not None:
            words.append(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4g}")
    return ", ".join(words)


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


class Lines:
    """A line when a further share of the work is done, with the time that is left; for logs."""

    def __init__(self, file: TextIO, now: Callable[[], float] = time.monotonic) -> None:
        self._file, self._now = file, now
        self._next = now() + QUIET  # earliest time of the next line
        self._work = ""
        self._first = self._last = (now(), 0.0)  # time and share done: where this work began, and the last line

    def __call__(self, step: Step) -> None:
        here = (self._now(), step.done / step.total if step.total else 0.0)
        if step.what != self._work:  # what is left is reckoned from the pace of this work alone
            self._work, self._first, self._last = step.what, here, here
        further = here[1] - self._last[1]
        if here[0] < self._next or further <= 0 or (further < SHARE and here[1] < 1):
            return
        self._next, self._last = here[0] + APART, here
        left = (here[0] - self._first[0]) / (here[1] - self._first[1]) * (1 - here[1])
        words = (
            f"{step.what}: {amount(step)}",
            step.detail,
            facts(step),
            f"{duration(left)} left" if here[1] < 1 else "",
        )
        print(shown(", ".join(w for w in words if w)), file=self._file, flush=True)


def _bars() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[amount]}", markup=False),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[facts]}", markup=False),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _on_terminal(bars: Bars) -> Progress:
    task = bars.add_task("starting", total=None, amount="", facts="")
    work = [""]

    def show(step: Step) -> None:
        if step.what != work[0]:  # other work has another pace
            work[0] = step.what
            bars.reset(task, total=step.total or None, completed=step.done)
        total = max(step.done, step.total) or None
        more = ", ".join(w for w in (step.detail, facts(step)) if w)
        what, much = shown(step.what), amount(step)
        bars.update(task, completed=step.done, total=total, description=what, amount=much, facts=more)

    return show

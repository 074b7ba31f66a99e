"""A sweep's `results.jsonl`, read without the libraries that made it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mftmerge.errors import BadInput
from mftmerge.files import refuse_pointer
from mftmerge.settings import in_words


@dataclass(frozen=True)
class Combination:
    """Settings that a sweep tried. mask, deviation: validation loss, mean and standard deviation over seeds."""

    settings: str
    seeds: int
    mask: float
    deviation: float
    base: float
    failed: str = ""
    chosen: bool = False


@dataclass(frozen=True)
class SweepHere:
    """masks: file (relative to the sweep's directory) -> settings and seed. tests: the result lines of the choice."""

    path: str
    head: dict[str, Any]
    combinations: list[Combination]
    tests: list[dict[str, Any]]
    masks: dict[str, str] = field(default_factory=dict)


def read_sweep(path: Path) -> SweepHere | None:
    """The sweep in a file, None for a JSONL file that holds something else. Raises BadInput for a damaged one."""
    if path.name != "results.jsonl":
        return None
    raw = path.read_bytes()
    refuse_pointer(path, raw)
    head, _, rest = raw.partition(b"\n")
    if b'"sweep"' not in head:
        return None
    whole = rest[: rest.rfind(b"\n") + 1]  # a line that a crash cut off is no line
    first, *lines = (json.loads(line) for line in (head, *whole.splitlines()))
    runs = {line["id"]: line for line in lines if line["kind"] == "run"}
    chosen = [i for i, line in enumerate(lines) if line["kind"] == "choice"]
    choice = lines[chosen[-1]]["combination"] if chosen else None
    tests = [line for line in lines[chosen[-1] :] if line["kind"] == "test"] if chosen else []
    for line in tests:
        _numbers(line, str(line.get("metric", "loss")), "difference")
    masks = {
        str(r["mask"]): f"{in_words(r['combination'])}, seed {r['seed']}" for r in runs.values() if "failed" not in r
    }
    return SweepHere(str(path), first, _combinations(list(runs.values()), choice), tests, masks)


def _combinations(runs: list[dict[str, Any]], choice: object) -> list[Combination]:
    found = []
    distinct: list[Any] = []
    for run in runs:
        if run["combination"] not in distinct:
            distinct.append(run["combination"])
    for settings in distinct:
        own = [r for r in runs if r["combination"] == settings]
        failed = next((str(r["failed"]) for r in own if "failed" in r), "")
        losses = [_numbers(r["validation"], "base", "mask") for r in own if "failed" not in r]
        base, mask = np.mean(losses, axis=0) if losses else (np.nan, np.nan)
        deviation = float(np.std([m for _, m in losses], ddof=1)) if len(losses) > 1 else np.nan
        found.append(
            Combination(in_words(settings), len(own), float(mask), deviation, float(base), failed, settings == choice)
        )
    return found


def _numbers(line: dict[str, Any], *names: str) -> tuple[float, ...]:
    """Entries of a line that must be numbers."""
    for name in names:
        if not isinstance(line[name], int | float):
            raise BadInput(f"not the results of a sweep ({name} is not a number)")
    return tuple(float(line[name]) for name in names)

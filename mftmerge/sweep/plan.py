"""What a sweep is to do: the file that says it, its runs, and the check that no row is used for two purposes."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mftmerge import data as rows_of
from mftmerge.errors import BadInput
from mftmerge.train.settings import TrainSettings
from mftmerge.yamltext import read_document

FIXED = ("seed", "dtype", "max_length", "eval_rows", "eval_share", "weights", "base")  # one value for a whole sweep
Sources = str | list[str]


class SweepPlan(BaseModel):
    """A sweep file. Data files may carry a range of rows, as in `math.jsonl[0:512]` or `math.jsonl[-256:]`."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="checkpoint directory or hub id of the base model")
    train: Sources = Field(description="rows to train on: a file or a list of files")
    validation: Sources = Field(
        description="rows that settings are chosen on, and that each run keeps its best step by"
    )
    test: dict[str, Sources] = Field(
        min_length=1, description="domain -> rows that the chosen settings are reported on"
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="training settings that all runs share")
    grid: dict[str, list[Any]] = Field(default_factory=dict, description="setting -> values to try, all combinations")
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1, description="one run a seed and combination")


@dataclass(frozen=True)
class Run:
    """One training run of a sweep: its identity, the combination of grid values, and all settings."""

    id: str
    combination: dict[str, Any]
    settings: TrainSettings


def load_plan(path: str | Path) -> SweepPlan:
    """Read a sweep file; relative data paths and model directories are relative to it.

    Raises BadInput for unknown or missing entries and for settings that training does not know.
    """
    path = Path(path)
    given = read_document(path)
    if not isinstance(given, dict):
        raise BadInput(f"{path}: a sweep is a mapping with model, train, validation and test")
    try:
        plan = SweepPlan(**given)
    except ValidationError as e:
        first = e.errors()[0]
        raise BadInput(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    def near(source: Any) -> Any:
        if isinstance(source, list):
            return [near(s) for s in source]
        beside = path.parent / source.partition("[")[0]
        return str(path.parent / source) if beside.exists() else source

    placed = {"model": near(plan.model), "train": near(plan.train), "validation": near(plan.validation)}
    plan = plan.model_copy(update=placed | {"test": {name: near(s) for name, s in plan.test.items()}})
    try:
        plan_runs(plan)
    except BadInput as e:
        raise BadInput(f"{path}: {e}") from None
    return plan


def plan_runs(plan: SweepPlan, identity: str = "", validation_rows: int = 1) -> list[Run]:
    """All runs, seeds innermost. identity: digest of model and data, part of each run's id.

    Raises BadInput for settings that training does not know and for those that a sweep does not vary.
    """
    wrong = sorted({*plan.grid} & {*FIXED})
    if wrong:
        raise BadInput(f"grid: {wrong[0]} must be the same in all runs; put it under settings (seeds: under seeds)")
    unknown = sorted({*plan.settings} & {"seed", "weights", "eval_rows", "eval_share"})
    if unknown:
        raise BadInput(f"settings: {unknown[0]} follows from the sweep's data and seeds; leave it out")
    runs = []
    for values in itertools.product(*plan.grid.values()):
        combination = dict(zip(plan.grid, values, strict=True))
        for seed in plan.seeds:
            settings = TrainSettings.make({**plan.settings, **combination, "seed": seed, "eval_rows": validation_rows})
            text = json.dumps([identity, settings.model_dump()], sort_keys=True)
            runs.append(Run(hashlib.blake2b(text.encode(), digest_size=6).hexdigest(), combination, settings))
    return runs


def read_slice(sources: Sources) -> list[rows_of.Row]:
    """Rows of files, each with an optional range of rows: `rows.jsonl[10:20]`."""
    rows: list[rows_of.Row] = []
    for source in [sources] if isinstance(sources, str) else sources:
        match = re.fullmatch(r"(.*?)(?:\[(-?\d*):(-?\d*)\])?", source)
        assert match is not None
        start, stop = (int(x) if x else None for x in match.group(2, 3))
        part = rows_of.load_rows(match[1])[start:stop]
        if not part:
            raise BadInput(f"{source}: no rows in this range")
        rows += part
    return rows


def row_digest(row: rows_of.Row) -> str:
    """Hash of what a row says, whatever its shape, other fields and white space."""
    if "messages" in row:
        said = [m["content"] for m in row["messages"]]
    elif "prompt" in row:
        parts = (row["prompt"], row["completion"])
        said = [m if isinstance(m, str) else m["content"] for p in parts for m in ([p] if isinstance(p, str) else p)]
    else:
        said = [row["text"]]
    text = "\0".join(" ".join(str(s).split()) for s in said)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def require_disjoint(parts: Mapping[str, Sequence[rows_of.Row]]) -> None:
    """Raise BadInput when two parts, such as validation and test, share a row. Test domains may overlap each other."""
    digests = {name: [row_digest(row) for row in rows] for name, rows in parts.items()}
    for (a, first), (b, second) in itertools.combinations(digests.items(), 2):
        shared = set(first) & set(second)
        if shared and not (a.startswith("test ") and b.startswith("test ")):
            where = next(i for i, d in enumerate(second, 1) if d in shared)
            raise BadInput(
                f"{a} and {b} share rows ({len(shared)}; the first is row {where} of {b}); remove them from one"
            )


def describe(combination: Mapping[str, Any]) -> str:
    """A combination in words."""
    return ", ".join(f"{name} {value}" for name, value in combination.items()) or "the settings given"

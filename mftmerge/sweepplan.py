"""A sweep file: what is to be trained, on which rows, and the runs that follow from it."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from mftmerge.contents import Contents
from mftmerge.errors import BadInput
from mftmerge.nearby import beside, model_beside, settings_beside
from mftmerge.settings import Seed, Settings
from mftmerge.train.settings import TrainSettings

# One value for a whole sweep.
FIXED = ("seed", "dtype", "max_length", "eval_rows", "eval_share", "weights", "base", "metric", "max_new_tokens")
Sources = str | list[str]


class SweepPlan(Settings):
    """A sweep file. Data files may carry a range of rows, as in `math.jsonl[0:512]` or `math.jsonl[-256:]`."""

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
    seeds: list[Seed] = Field(default=[0, 1, 2], min_length=1, description="one run a seed and combination")


@dataclass(frozen=True)
class Run:
    """One training run of a sweep: its identity, the combination of grid values, and all settings."""

    id: str
    combination: dict[str, Any]
    settings: TrainSettings


def load_plan(path: str | Path) -> SweepPlan:
    """Read a sweep file; relative data paths and model directories are relative to it,
    those of `base` and `start` too.

    Raises BadInput for unknown or missing entries and for settings that training does not know.
    """
    path = Path(path)
    plan = SweepPlan.read(path, "a sweep is a mapping with model, train, validation and test")

    def near(source: Any) -> Any:
        return [near(s) for s in source] if isinstance(source, list) else beside(path.parent, source)

    placed = {
        "model": model_beside(path.parent, plan.model),
        "train": near(plan.train),
        "validation": near(plan.validation),
        "settings": settings_beside(path.parent, plan.settings),
    }
    plan = plan.model_copy(update=placed | {"test": {name: near(s) for name, s in plan.test.items()}})
    try:
        plan_runs(plan)
    except BadInput as e:
        raise BadInput(f"{path}: {e}") from None
    return plan


def plan_runs(plan: SweepPlan, identity: str = "", validation_rows: int = 1) -> list[Run]:
    """All runs, seeds innermost. identity: digest of model and data, part of each run's id; so is, where it is given,
    what the files hold that the settings name.

    Raises BadInput for settings that training does not know and for those that a sweep does not vary.
    """
    wrong = sorted({*plan.grid} & {*FIXED})
    if wrong:
        raise BadInput(f"grid: {wrong[0]} must be the same in all runs; put it under settings (seeds: under seeds)")
    unknown = sorted({*plan.settings} & {"seed", "weights", "eval_rows", "eval_share"})
    if unknown:
        raise BadInput(f"settings: {unknown[0]} follows from the sweep's data and seeds; leave it out")
    runs, contents = [], Contents()
    for values in itertools.product(*plan.grid.values()):
        combination = dict(zip(plan.grid, values, strict=True))
        for seed in plan.seeds:
            settings = TrainSettings.make({**plan.settings, **combination, "seed": seed, "eval_rows": validation_rows})
            inputs = contents.of_inputs(settings.base, settings.start) if identity else {}
            # Where nothing is named the ids are those of earlier versions: what is done stays done.
            text = json.dumps([identity, settings.model_dump(), *([inputs] if inputs else [])], sort_keys=True)
            runs.append(Run(hashlib.blake2b(text.encode(), digest_size=6).hexdigest(), combination, settings))
    return runs

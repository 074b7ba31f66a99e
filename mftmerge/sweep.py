"""Settings x seeds: train a mask for each, choose settings on validation rows, report the choice on test rows.

Training, validation and test rows must be disjoint, and only the chosen settings ever meet the test rows. Everything
goes to one file, `results.jsonl`, a line as soon as it is known; a sweep that was stopped continues where it was.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from mftmerge import data as rows_of
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.evaluate import grid as grids
from mftmerge.evaluate import pairing
from mftmerge.evaluate.files import load_model
from mftmerge.evaluate.results import LOSS, GridResult, finite, markdown_table, rich_table, write_whole
from mftmerge.files import protect
from mftmerge.mask import Mask
from mftmerge.prefix import PrefixCache
from mftmerge.settings import Settings, in_words
from mftmerge.train import targets
from mftmerge.train.run import train_mask
from mftmerge.train.settings import TrainSettings
from mftmerge.yamltext import read_document

if TYPE_CHECKING:
    from rich.console import Console

# -- what is to be done: the file that says it, and its runs -----------------------------------------------------------

FIXED = ("seed", "dtype", "max_length", "eval_rows", "eval_share", "weights", "base")  # one value for a whole sweep
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
        plan = SweepPlan.make(given)
    except BadInput as e:
        raise BadInput(f"{path}: {e}") from None

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


# -- the runs ----------------------------------------------------------------------------------------------------------

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found.

    runs: the lines of the training runs. chosen: the combination with the lowest validation loss, mean over seeds.
    test: rows "base", one a seed of the choice, and "mean" (the mean loss over seeds, row by row) on the test domains.
    """

    runs: list[dict[str, Any]]
    chosen: dict[str, Any]
    test: GridResult

    def to_json(self) -> dict[str, Any]:
        """Runs, choice and test results as plain JSON values; the last as `mftmerge eval --json` prints them."""
        return {"runs": self.runs, "chosen": self.chosen, "test": json.loads(self.test.to_json())}


class Results:
    """The lines of `results.jsonl`; a line that a crash cut off is dropped."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, list[dict[str, Any]]()
        if not path.exists():
            return
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        try:
            self.lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError as e:
            raise BadInput(f"{path}: not the results of a sweep ({e}); give another output directory") from None
        if len(whole) < len(raw):
            os.truncate(path, len(whole))

    def add(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
            f.flush()
            os.fsync(f.fileno())
        self.lines.append(line)

    def runs(self) -> dict[str, dict[str, Any]]:
        return {line["id"]: line for line in self.lines if line["kind"] == "run"}


def run_sweep(plan: SweepPlan, out: str | Path, *, progress: Callable[[str], None] | None = None) -> SweepResult:
    """Train what is not in `out` yet, choose, and report.

    out: directory for `results.jsonl` and `masks/`; an existing one is continued when model and data are the same.
    Raises BadInput for shared rows or another sweep's directory, MftmergeError when no settings finished all seeds.
    """
    say = progress or (lambda text: None)
    inputs = (plan.model, plan.train, plan.validation, plan.test, plan.settings)
    protect(Path(out) / "masks", inputs)
    protect(Path(out) / RESULTS, inputs, directory=False)
    raw = {"train": rows_of.load_rows(plan.train), "validation": rows_of.load_rows(plan.validation)}
    raw |= {f"test {name}": rows_of.load_rows(source) for name, source in plan.test.items()}
    rows_of.require_disjoint(raw)
    shared = TrainSettings.make(plan.settings)
    say("loading the model")
    trusted = shared.trust_remote_code or None
    model, tokenizer = load_model(plan.model, dtype=shared.dtype, trust_remote_code=trusted)
    tokens = {name: rows_of.tokenize(rows, tokenizer, shared.max_length) for name, rows in raw.items()}
    out = Path(out)
    (out / "masks").mkdir(parents=True, exist_ok=True)
    results = Results(out / RESULTS)
    identity = _continue(results, model, tokens, plan)
    runs = plan_runs(plan, identity, len(tokens["validation"]))
    _train_missing(runs, results, model, tokenizer, tokens, out, say)
    done = results.runs()
    lines = [done[run.id] for run in runs]
    chosen = choose(lines)
    say(f"testing {in_words(chosen)}")
    test = _test(chosen, lines, model, tokens, plan, out)
    results.add({"kind": "choice", "combination": chosen, "validation": validation_mean(lines, chosen)})
    for name, _ in test.metrics:
        for row in test.models:
            results.add({"kind": "test", "combination": chosen, "row": row, **_cell(test, row, name)})
    return SweepResult(lines, chosen, test)


def _continue(results: Results, model: Any, tokens: Mapping[str, Any], plan: SweepPlan) -> str:
    """The sweep's identity; the first line of the file says it, and must say the same when a sweep is continued."""
    facts = grids.model_facts(model)
    head = {"kind": "sweep", "model": plan.model, "weights": facts["weights"], "dtype": facts["dtype"]}
    head |= {"data": {name: {"rows": len(t), "digest": rows_of.digest(t)} for name, t in tokens.items()}}
    identity = hashlib.blake2b(json.dumps([head["weights"], head["data"]]).encode(), digest_size=16).hexdigest()
    if not results.lines:
        results.add({**head, "identity": identity, "versions": grids.versions()})
    elif results.lines[0].get("identity") != identity:
        raise BadInput(f"{results.path}: holds a sweep of another model or other rows; give another output directory")
    return identity


def _train_missing(
    runs: Sequence[Run],
    results: Results,
    model: Any,
    tokenizer: Any,
    tokens: Mapping[str, Any],
    out: Path,
    say: Callable[[str], None],
) -> None:
    caches: dict[int, PrefixCache] = {}
    for number, run in enumerate(runs, 1):
        path = out / "masks" / f"{run.id}.mask"
        if run.id in results.runs() and (path.exists() or "failed" in results.runs()[run.id]):
            continue
        say(f"run {number} of {len(runs)}: {in_words(run.combination)}, seed {run.settings.seed}")
        try:
            found = train_mask(
                model,
                tokens["train"],
                path,
                settings=run.settings,
                eval_data=tokens["validation"],
                tokenizer=tokenizer,
                prefix=_cache(model, run.settings, caches),
                resume=Path(f"{path}.run").exists(),
                overwrite=True,
                note=lambda text: None,
            )
        except BadInput:
            raise
        except MftmergeError as e:
            results.add({"kind": "run", "id": run.id, "combination": run.combination, "failed": str(e)})
            continue
        results.add(_run_line(run, found, path.relative_to(out)))


def _cache(model: Any, settings: TrainSettings, caches: dict[int, PrefixCache]) -> PrefixCache | None:
    """One cache of hidden states for all runs over the same layers; only the last one is kept."""
    first = min(target.layer for target in targets.find(model, settings.layers, settings.modules))
    if settings.prefix != "memory" or not first:
        return None
    if first not in caches:
        caches.clear()
        caches[first] = PrefixCache(model, first)
    return caches[first]


def _run_line(run: Run, found: Any, mask: Path) -> dict[str, Any]:
    line: dict[str, Any] = {"kind": "run", "id": run.id, "combination": run.combination, "seed": run.settings.seed}
    line |= {"settings": run.settings.model_dump(), "best_step": found.best_step, "gained": bool(found.gained)}
    line["validation"] = {name: pairing.mean(np.asarray(rows)) for name, rows in found.losses.items()}
    difference = pairing.paired(found.losses["mask"], found.losses["base"])
    line["difference"] = {
        "mean": difference.mean,
        "standard_error": finite(difference.standard_error),
        "n": difference.n,
    }
    return line | {"seconds": round(found.seconds, 3), "mask": str(mask), "digest": found.mask.digest}


def choose(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The combination with the lowest validation loss, mean over seeds; one with a failed seed is out.

    Raises MftmergeError when every combination has a failed seed.
    """
    failed = [line["combination"] for line in lines if "failed" in line]
    tried: list[dict[str, Any]] = [line["combination"] for line in lines if line["combination"] not in failed]
    if not tried:
        raise MftmergeError(f"every combination failed; the first: {next(x['failed'] for x in lines if 'failed' in x)}")
    best = min(tried, key=lambda combination: validation_mean(lines, combination)["mask"])
    return best


def validation_mean(lines: Sequence[Mapping[str, Any]], combination: Mapping[str, Any]) -> dict[str, float]:
    """Mean over seeds of the base's and the mask's validation loss, and the standard deviation over seeds."""
    own = [line["validation"] for line in lines if line["combination"] == combination and "failed" not in line]
    masks = [v["mask"] for v in own]
    spread = float(np.std(masks, ddof=1)) if len(masks) > 1 else 0.0
    return {"base": float(np.mean([v["base"] for v in own])), "mask": float(np.mean(masks)), "seed_deviation": spread}


def _test(
    chosen: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    model: Any,
    tokens: Mapping[str, Any],
    plan: SweepPlan,
    out: Path,
) -> GridResult:
    own = [line for line in lines if line["combination"] == chosen]
    masks = {f"seed {line['seed']}": Mask.load(out / line["mask"]) for line in own}
    result = grids.grid(model, masks, {name: tokens[f"test {name}"] for name in plan.test})
    if len(masks) > 1:
        result.models["mean"] = {"mask": None, "of": list(masks)}
        for name in plan.test:
            cells = [result.values(row, name) for row in masks]
            result.cells["mean", name, LOSS] = np.mean(cells, axis=0)
    return result


def _cell(test: GridResult, row: str, domain: str) -> dict[str, Any]:
    difference = test.difference(row, domain)
    cell = {"domain": domain, "loss": test.mean(row, domain), "difference": difference.mean}
    return cell | {
        "standard_error": finite(difference.standard_error),
        "n": difference.n,
        "verdict": test.verdict(row, domain),
    }


# -- in words and tables -----------------------------------------------------------------------------------------------

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
            rows.append([in_words(combination), str(len(own)), "-", "-", "-", f"failed: {failed}"])
            continue
        mean = validation_mean(result.runs, combination)
        numbers = [
            f"{mean['mask']:.4f}",
            f"{mean['seed_deviation']:.4f}" if len(own) > 1 else "-",
            f"{mean['base']:.4f}",
        ]
        remark = "chosen" if combination == result.chosen else ""
        rows.append([in_words(combination), str(len(own)), *numbers, remark])
    return rows


def verdict(result: SweepResult) -> str:
    """One sentence: did the chosen settings gain on the validation rows at all?"""
    mean = validation_mean(result.runs, result.chosen)
    if mean["mask"] < mean["base"]:
        return f"Chosen on validation rows: {in_words(result.chosen)}."
    return f"No settings lowered the validation loss; the least bad: {in_words(result.chosen)}."


def show(result: SweepResult, console: Console) -> None:
    """Print the combinations, the choice, and its result on the test rows."""
    console.print(rich_table(HEADINGS, _rows(result)))
    console.print(verdict(result), markup=False, highlight=False)
    result.test.show(console)


def write_markdown(result: SweepResult, path: str | Path, *, overwrite: bool = False) -> None:
    """The same as Markdown."""
    lines = [*markdown_table(HEADINGS, _rows(result)), "", verdict(result), "", "On the test rows:", ""]
    write_whole("\n".join(lines) + "\n" + result.test.to_markdown(), path, overwrite)

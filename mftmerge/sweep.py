"""Settings x seeds: train a mask for each, choose settings on validation rows, report the choice on test rows.

Training, validation and test rows must be disjoint, and only the chosen settings ever meet the test rows. Everything
goes to one file, `results.jsonl`, a line as soon as it is known; a sweep that was stopped continues where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mftmerge import data as rows_of
from mftmerge import notebook
from mftmerge.data import Tokens
from mftmerge.errors import BadInput, MftmergeError, shown
from mftmerge.evaluate import grid as grids
from mftmerge.evaluate import pairing
from mftmerge.evaluate.generation import Marker
from mftmerge.evaluate.results import GridResult, finite, in_markdown, markdown_table, rich_table, write_whole
from mftmerge.files import protect, writing
from mftmerge.jobs import RunnerSettings, run_jobs
from mftmerge.loading import load_model
from mftmerge.locks import locked
from mftmerge.mask import Mask
from mftmerge.prefix import PrefixCache
from mftmerge.settings import in_words
from mftmerge.sweepplan import Run, SweepPlan, load_plan, plan_runs
from mftmerge.train import targets
from mftmerge.train.inputs import tokens_of, within_positions
from mftmerge.train.run import TrainResult, train_mask
from mftmerge.train.settings import TrainSettings

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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

    def _repr_html_(self) -> str:
        """In a notebook: the combinations, the choice, and its result on the test rows."""
        return notebook.table(_headings(self), _rows(self), verdict(self)) + self.test._repr_html_()

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

    def add(self, line: dict[str, object]) -> None:
        with writing(self.path), self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
            f.flush()
            os.fsync(f.fileno())
        self.lines.append(line)

    def runs(self) -> dict[str, dict[str, Any]]:
        return {line["id"]: line for line in self.lines if line["kind"] == "run"}


def run_sweep(
    plan: SweepPlan | Mapping[str, object] | str | Path,
    out: str | Path,
    *,
    runner: RunnerSettings | None = None,
    progress: Callable[[str], None] | None = None,
) -> SweepResult:
    """Train what is not in `out` yet, choose, and report.

    plan: a sweep, its entries, or the file that has them.
    out: directory for `results.jsonl` and `masks/`; an existing one is continued when model and data are the same.
    runner: hand the runs to an engine instead of training them one after the other here.
    Raises BadInput for shared rows or another sweep's directory, MftmergeError when no settings finished all seeds.
    """
    say = progress or (lambda text: None)
    if not isinstance(plan, SweepPlan):
        plan = SweepPlan.make(plan) if isinstance(plan, Mapping) else load_plan(plan)
    inputs = (plan.model, plan.train, plan.validation, plan.test, plan.settings)
    protect(Path(out) / "masks", inputs)
    protect(Path(out) / RESULTS, inputs, directory=False)
    shared = TrainSettings.make(plan.settings)
    sources = {"train": plan.train, "validation": plan.validation}
    sources |= {f"test {name}": source for name, source in plan.test.items()}
    raw = {name: rows_of.load_rows(source, **shared.reading) for name, source in sources.items()}
    rows_of.require_disjoint(raw)
    say("loading the model")
    trusted = shared.trust_remote_code or None
    model, tokenizer = load_model(plan.model, dtype=shared.dtype, trust_remote_code=trusted)
    tokens = {}
    for name, rows in raw.items():
        read = rows_of.tokenize(rows, tokenizer, shared.max_length, skip_bad=shared.skip_bad_rows)
        tokens[name] = within_positions(read, model, say)
    out = Path(out)
    with locked(out):
        (out / "masks").mkdir(exist_ok=True)
        results = Results(out / RESULTS)
        identity = _continue(results, model, tokens, plan)
        runs = plan_runs(plan, identity, len(tokens["validation"]))
        if runner is None or runner.runner == "here":
            _train_missing(runs, results, model, tokenizer, tokens, out, say)
        else:
            _hand_out(plan, runs, results, out, runner, say)
        done = results.runs()
        lines = [done[run.id] for run in runs]
        chosen = choose(lines)
        say(f"testing {in_words(chosen)}")
        test = _test(chosen, lines, model, tokenizer, tokens, plan, out)
        results.add({"kind": "choice", "combination": chosen, "validation": validation_mean(lines, chosen)})
        for name, metric in test.metrics:
            for row in test.models:
                results.add({"kind": "test", "combination": chosen, "row": row, **_cell(test, row, name, metric)})
        return SweepResult(lines, chosen, test)


def _continue(results: Results, model: PreTrainedModel, tokens: Mapping[str, Sequence[Tokens]], plan: SweepPlan) -> str:
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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Mapping[str, Sequence[Tokens]],
    out: Path,
    say: Callable[[str], None],
) -> None:
    caches: dict[int, PrefixCache] = {}
    for number, run in enumerate(runs, 1):
        if _is_done(run, results, out):
            continue
        say(f"run {number} of {len(runs)}: {in_words(run.combination)}, seed {run.settings.seed}")
        results.add(train_one(run, model, tokenizer, tokens, out, _cache(model, run.settings, caches)))


def _is_done(run: Run, results: Results, out: Path) -> bool:
    return run.id in results.runs() and (_mask(run, out).exists() or "failed" in results.runs()[run.id])


def _mask(run: Run, out: Path) -> Path:
    return out / "masks" / f"{run.id}.mask"


def train_one(
    run: Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Mapping[str, Sequence[Tokens]],
    out: Path,
    cache: PrefixCache | None,
) -> dict[str, Any]:
    """Train or continue one run's mask into `out`; its line of the results, which says so where training failed."""
    path = _mask(run, out)
    try:
        found = train_mask(
            model,
            tokens["train"],
            path,
            settings=run.settings,
            eval_data=tokens["validation"],
            tokenizer=tokenizer,
            prefix=cache,
            resume=Path(f"{path}.run").exists(),
            overwrite=True,
            note=lambda text: None,
        )
    except BadInput:
        raise
    except MftmergeError as e:
        return {"kind": "run", "id": run.id, "combination": run.combination, "failed": str(e)}
    return _run_line(run, found, path.relative_to(out))


def _job(plan: SweepPlan, run: Run, out: Path) -> dict[str, object]:
    """One run in a process of its own, which loads model and rows anew."""
    shared = TrainSettings.make(plan.settings)
    model, tokenizer = load_model(plan.model, dtype=shared.dtype, trust_remote_code=shared.trust_remote_code or None)
    sources = {"train": plan.train, "validation": plan.validation}
    tokens = {name: tokens_of(source, tokenizer, shared) for name, source in sources.items()}
    return train_one(run, model, tokenizer, tokens, out, None)


def _hand_out(
    plan: SweepPlan,
    runs: Sequence[Run],
    results: Results,
    out: Path,
    runner: RunnerSettings,
    say: Callable[[str], None],
) -> None:
    """The same through an engine: each missing run is a job."""
    missing = {run.id: (plan, run, out.resolve()) for run in runs if not _is_done(run, results, out)}
    say(f"{len(missing)} of {len(runs)} runs go to {runner.runner}, {runner.at_once} at once")
    for number, (_, line) in enumerate(run_jobs(_job, missing, out / "jobs", runner, say), 1):
        results.add(line)
        say(f"{number} of {len(missing)} runs are done")


def _cache(model: PreTrainedModel, settings: TrainSettings, caches: dict[int, PrefixCache]) -> PrefixCache | None:
    """One cache of hidden states for all runs over the same layers; only the last one is kept."""
    first = min(target.layer for target in targets.find(model, settings.layers, settings.modules))
    if settings.prefix != "memory" or not first:
        return None
    if first not in caches:
        caches.clear()
        caches[first] = PrefixCache(model, first)
    return caches[first]


def _run_line(run: Run, found: TrainResult, mask: Path) -> dict[str, object]:
    line: dict[str, object] = {"kind": "run", "id": run.id, "combination": run.combination, "seed": run.settings.seed}
    line |= {"settings": run.settings.model_dump(), "best_step": found.best_step, "gained": bool(found.gained)}
    line["validation"] = {name: pairing.mean(np.asarray(rows)) for name, rows in found.losses.items()}
    line["answers"] = {name: pairing.mean(marks) for name, marks in found.marks.items()}
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
    tried: list[dict[str, object]] = [line["combination"] for line in lines if line["combination"] not in failed]
    if not tried:
        raise MftmergeError(f"every combination failed; the first: {next(x['failed'] for x in lines if 'failed' in x)}")

    def key(combination: dict[str, object]) -> tuple[float, float]:
        mean = validation_mean(lines, combination)
        return -mean.get("mask answers", 0.0), mean["mask"]

    return min(tried, key=key)


def validation_mean(lines: Sequence[Mapping[str, Any]], combination: Mapping[str, object]) -> dict[str, float]:
    """Means over seeds: validation losses (base, mask, and with `control` weights, random and magnitude), shares of
    right answers (the same names and "answers"), and the standard deviation of the mask's over seeds."""
    own = [line for line in lines if line["combination"] == combination and "failed" not in line]
    names = [name for name in own[0]["validation"] if name != "initial"]
    mean = {name: float(np.mean([line["validation"][name] for line in own])) for name in names}
    if own[0].get("answers"):
        mean |= {f"{name} answers": float(np.mean([line["answers"][name] for line in own])) for name in names}
    of = "answers" if own[0].get("answers") else "validation"
    spread = float(np.std([line[of]["mask"] for line in own], ddof=1)) if len(own) > 1 else 0.0
    return mean | {"seed_deviation": spread}


def _test(
    chosen: Mapping[str, object],
    lines: Sequence[Mapping[str, Any]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Mapping[str, Sequence[Tokens]],
    plan: SweepPlan,
    out: Path,
) -> GridResult:
    own = [line for line in lines if line["combination"] == chosen]
    masks = {f"seed {line['seed']}": Mask.load(out / line["mask"]) for line in own}
    rows = {name: tokens[f"test {name}"] for name in plan.test}
    shared = TrainSettings.make(plan.settings)
    rule, most = shared.exact, shared.max_new_tokens
    scorers = {n: Marker(r, tokenizer, exact=rule, max_new_tokens=most) for n, r in rows.items()} if rule else None
    result = grids.grid(model, masks, rows, scorers=scorers)
    if len(masks) > 1:
        result.models["mean"] = {"mask": None, "of": list(masks)}
        for name, metric in result.metrics:
            cells = [result.values(row, name, metric) for row in masks]
            result.cells["mean", name, metric] = np.mean(cells, axis=0)
    return result


def _cell(test: GridResult, row: str, domain: str, metric: str) -> dict[str, object]:
    difference = test.difference(row, domain, metric)
    cell = {"domain": domain, "metric": metric, metric: test.mean(row, domain, metric), "difference": difference.mean}
    return cell | {
        "standard_error": finite(difference.standard_error),
        "n": difference.n,
        "verdict": test.verdict(row, domain, metric),
    }


# -- in words and tables -----------------------------------------------------------------------------------------------


def _headings(result: SweepResult) -> list[str]:
    """Of the columns: numbers of the mask, of the base, and of the weights' control where it was trained."""
    mean = validation_mean(result.runs, result.chosen)
    first = ["settings", "seeds", *["right answers"] * ("mask answers" in mean), "validation loss", "± over seeds"]
    return [*first, "base", *["weights"] * ("weights" in mean), ""]


def _rows(result: SweepResult) -> list[list[str]]:
    """One row a combination: means over seeds on the validation rows, and which was chosen."""
    rows, seen = [], []
    for line in result.runs:
        combination = line["combination"]
        if combination in seen:
            continue
        seen.append(combination)
        own = [run for run in result.runs if run["combination"] == combination]
        failed = next((run["failed"] for run in own if "failed" in run), None)
        if failed:
            unknown = ["-"] * (len(_headings(result)) - 3)
            rows.append([in_words(combination), str(len(own)), *unknown, f"failed: {failed}"])
            continue
        numbers = _numbers(validation_mean(result.runs, combination), len(own))
        rows.append([in_words(combination), str(len(own)), *numbers, "chosen" * (combination == result.chosen)])
    return rows


def _numbers(mean: Mapping[str, float], seeds: int) -> list[str]:
    """The columns in between; spread, base and weights are of what was chosen by."""
    answers = "mask answers" in mean

    def text(value: float) -> str:
        return f"{value:.1%}" if answers else f"{value:.4f}"

    own = {name: mean[f"{name} answers" if answers else name] for name in ("mask", "base", "weights") if name in mean}
    first = [*[text(own["mask"])] * answers, f"{mean['mask']:.4f}", text(mean["seed_deviation"]) if seeds > 1 else "-"]
    return [*first, text(own["base"]), *map(text, [own["weights"]] if "weights" in own else [])]


def verdict(result: SweepResult) -> str:
    """One sentence: did the chosen settings gain on the validation rows at all?"""
    mean = validation_mean(result.runs, result.chosen)
    if "mask answers" in mean:
        what, gained = "raised the share of right answers", mean["mask answers"] > mean["base answers"]
    else:
        what, gained = "lowered the validation loss", mean["mask"] < mean["base"]
    if gained:
        return f"Chosen on validation rows: {in_words(result.chosen)}."
    return f"No settings {what}; the least bad: {in_words(result.chosen)}."


def show(result: SweepResult, console: Console) -> None:
    """Print the combinations, the choice, and its result on the test rows."""
    console.print(rich_table(_headings(result), _rows(result)))
    console.print(shown(verdict(result)), markup=False, highlight=False)
    result.test.show(console)


def write_markdown(result: SweepResult, path: str | Path, *, overwrite: bool = False) -> None:
    """The same as Markdown."""
    table = markdown_table(_headings(result), _rows(result))
    lines = [*table, "", in_markdown(verdict(result)), "", "On the test rows:", ""]
    write_whole("\n".join(lines) + "\n" + result.test.to_markdown(), path, overwrite)

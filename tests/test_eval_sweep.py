"""`mftmerge sweep`: what is refused, what is chosen, that it continues, and that test rows decide nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.tiny_models import scaled

from mftmerge import sweep
from mftmerge.cli import main
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.mask import Mask
from mftmerge.sweepplan import SweepPlan, load_plan, plan_runs


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return int(stop.value.code or 0)


@pytest.fixture
def kitchen(tiny: Callable[..., Path], tmp_path: Path) -> SimpleNamespace:
    """A tiny model, 20 rows in one file, and a sweep over two learning rates and two seeds."""
    rows = [{"prompt": f"say {i}", "completion": f"{i} and {i + 1} and {i + 2}"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    plan = {
        "model": str(tiny("llama", layers=2)),
        "train": "rows.jsonl[0:8]",
        "validation": "rows.jsonl[8:12]",
        "test": {"near": "rows.jsonl[12:16]", "far": "rows.jsonl[-4:]"},
        "settings": {"steps": 2, "batch_size": 2, "layers": "1", "init": "normal", "max_length": 64},
        "grid": {"lr": [0.001, 0.1]},
        "seeds": [0, 1],
    }
    made = SimpleNamespace(plan=plan, path=tmp_path / "sweep.yml", out=tmp_path / "out", rows=rows)
    made.path.write_text(json.dumps(plan))
    made.results = made.out / "results.jsonl"
    return made


def lines(path: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, path.read_text().splitlines()) if line["kind"] == kind]


def test_a_sweep_from_file_to_report(kitchen: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    markdown = kitchen.out.parent / "report.md"
    assert run("sweep", kitchen.path, "--out", kitchen.out, "--markdown", markdown) == 0
    runs = lines(kitchen.results, "run")
    assert [(r["combination"]["lr"], r["seed"]) for r in runs] == [(0.001, 0), (0.001, 1), (0.1, 0), (0.1, 1)]
    for r in runs:
        mask = Mask.load(kitchen.out / r["mask"])
        assert mask.digest == r["digest"]
        assert r["difference"]["mean"] == pytest.approx(r["validation"]["mask"] - r["validation"]["base"])
        assert r["difference"]["n"] == 4
    mean = {lr: np.mean([r["validation"]["mask"] for r in runs if r["combination"]["lr"] == lr]) for lr in (0.001, 0.1)}
    choice = lines(kitchen.results, "choice")[0]
    assert choice["combination"] == {"lr": min(mean, key=lambda lr: mean[lr])}
    assert choice["validation"]["mask"] == pytest.approx(min(mean.values()))
    tests = lines(kitchen.results, "test")
    assert {(t["domain"], t["row"]) for t in tests} == {
        (domain, row) for domain in ("near", "far") for row in ("base", "seed 0", "seed 1", "mean")
    }
    losses = {(t["domain"], t["row"]): t["loss"] for t in tests}
    assert losses["near", "mean"] == pytest.approx((losses["near", "seed 0"] + losses["near", "seed 1"]) / 2)
    assert "chosen" in markdown.read_text()
    assert "4 runs" in capsys.readouterr().out


def test_a_stopped_sweep_continues_and_more_seeds_are_added(
    kitchen: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = sweep.train_mask, []

    def counted(*args: Any, **options: Any) -> Any:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(options["settings"])
        return real(*args, **options)

    monkeypatch.setattr(sweep, "train_mask", counted)
    with pytest.raises(KeyboardInterrupt):
        sweep.run_sweep(load_plan(kitchen.path), kitchen.out)
    first = kitchen.results.read_bytes()
    kitchen.results.write_bytes(first + b'{"kind": "run", "id": "cut o')  # a crash in the middle of a line
    calls.clear()
    result = sweep.run_sweep(load_plan(kitchen.path), kitchen.out)
    assert len(calls) == 1
    assert kitchen.results.read_bytes().startswith(first)
    assert len(result.runs) == 4

    calls.clear()
    kitchen.path.write_text(json.dumps(kitchen.plan | {"seeds": [0, 1, 2], "grid": {"lr": [0.001]}}))
    assert len(sweep.run_sweep(load_plan(kitchen.path), kitchen.out).runs) == 3
    assert [s.seed for s in calls] == [2]

    kitchen.path.write_text(json.dumps(kitchen.plan | {"test": {"near": "rows.jsonl[13:16]"}}))
    with pytest.raises(BadInput, match="another model or other rows"):
        sweep.run_sweep(load_plan(kitchen.path), kitchen.out)


def test_runs_over_another_base_or_start_are_other_runs(tiny: Callable[..., Path], tmp_path: Path) -> None:
    def ids(**settings: object) -> set[str]:
        plan = SweepPlan(model="m", train="t", validation="v", test={"x": "y"}, settings=settings, seeds=[0, 1])
        return {run.id for run in plan_runs(plan, "identity")}

    base, start = scaled(tiny("llama"), tmp_path / "base", 1), tmp_path / "start.mask"
    start.write_bytes(b"one")
    before = [ids(base=str(base)), ids(start=str(start)), ids()]
    assert [ids(base=str(base)), ids(start=str(start)), ids()] == before
    scaled(tiny("llama"), base, 2)
    start.write_bytes(b"two")
    assert not before[0] & ids(base=str(base))
    assert not before[1] & ids(start=str(start))


@pytest.mark.parametrize("part", ["train", "validation"])
def test_rows_used_for_two_purposes_are_refused(kitchen: SimpleNamespace, part: str) -> None:
    turns = [{"role": "user", "content": "say  13"}, {"role": "assistant", "content": "13 and 14\nand 15"}]
    hidden = kitchen.path.parent / "hidden.jsonl"  # test row 13 in another shape and spacing
    hidden.write_text(json.dumps({"prompt": "x", "completion": "y"}) + "\n" + json.dumps({"messages": turns}))
    plan = load_plan(kitchen.path).model_copy(update={part: str(hidden)})
    with pytest.raises(BadInput, match=f"{part} and test near share rows .* row 2 of test near"):
        sweep.run_sweep(plan, kitchen.out)
    assert not kitchen.out.exists()


def test_rows_longer_than_the_models_positions_are_cut(kitchen: SimpleNamespace, tiny: Callable[..., Path]) -> None:
    for row in kitchen.rows:
        row["completion"] += "y" * 60
    kitchen.path.with_name("rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kitchen.rows))
    plan = kitchen.plan | {"model": str(tiny("gpt2", layers=2, positions=48)), "grid": {}, "seeds": [0]}
    kitchen.path.write_text(json.dumps(plan))
    said: list[str] = []
    found = sweep.run_sweep(kitchen.path, kitchen.out, progress=said.append)
    assert said.count("4 of 4 rows are cut: the model has 48 positions") == 3
    assert np.isfinite(found.test.mean("seed 0", "far"))


def test_the_choice_is_by_validation_and_failed_settings_are_out() -> None:
    def line(lr: float, seed: int, **values: Any) -> dict[str, Any]:
        return {"combination": {"lr": lr}, "seed": seed, **values}

    good = [line(1, s, validation={"base": 1.0, "mask": m}) for s, m in enumerate((0.5, 0.9))]
    better = [line(2, s, validation={"base": 1.0, "mask": m}) for s, m in enumerate((0.65, 0.7))]
    failing = [line(3, 0, validation={"base": 1.0, "mask": 0.1}), line(3, 1, failed="not finite")]
    assert sweep.choose([*good, *better, *failing]) == {"lr": 2}
    with pytest.raises(MftmergeError, match="not finite"):
        sweep.choose(failing)


def test_a_run_that_fails_is_recorded_and_the_rest_goes_on(
    kitchen: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sweep.train_mask

    def failing(*args: Any, **options: Any) -> Any:
        if options["settings"].lr == 0.001:
            raise MftmergeError("step 1: gradient is not finite")
        return real(*args, **options)

    monkeypatch.setattr(sweep, "train_mask", failing)
    result = sweep.run_sweep(load_plan(kitchen.path), kitchen.out)
    assert result.chosen == {"lr": 0.1}
    assert [line["failed"] for line in result.runs[:2]] == ["step 1: gradient is not finite"] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": {"lrr": [1]}}, "lrr"),
        ({"grid": {"seed": [1]}}, "seed must be the same"),
        ({"grid": {"max_length": [8, 9]}}, "max_length must be the same"),
        ({"settings": {"eval_rows": 3}}, "eval_rows follows from"),
        ({"grid": {"keep": [2.0]}}, "keep"),
        ({"typo": 1}, "typo"),
        ({"test": {}}, "test"),
        ({"validation": "none.jsonl"}, "no such file"),
        ({"validation": "rows.jsonl[30:40]"}, "no rows in this range"),
        ({"seeds": []}, "seeds"),
    ],
)
def test_bad_sweeps_are_one_line(
    kitchen: SimpleNamespace, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kitchen.path.write_text(json.dumps(kitchen.plan | change))
    assert run("sweep", kitchen.path, "--out", kitchen.out) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_dry_run_lists_and_touches_nothing(kitchen: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sweep", kitchen.path, "--out", kitchen.out, "--dry-run") == 0
    assert capsys.readouterr().out.splitlines()[1] == "lr 0.001, seed 1"
    assert not kitchen.out.exists()


def test_runs_as_jobs_give_the_masks_that_runs_here_give(
    kitchen: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    kitchen.path.write_text(json.dumps(kitchen.plan | {"seeds": [0]}))  # each job is a process that imports torch
    assert run("sweep", kitchen.path, "--out", kitchen.out) == 0
    there = kitchen.out.parent / "jobs"
    assert run("sweep", kitchen.path, "--out", there, "--runner", "local", "--at-once", 2) == 0
    here = {r["id"]: (r["digest"], r["validation"]) for r in lines(kitchen.results, "run")}
    assert here == {r["id"]: (r["digest"], r["validation"]) for r in lines(there / "results.jsonl", "run")}
    before = (there / "results.jsonl").read_text()
    capsys.readouterr()
    assert run("sweep", kitchen.path, "--out", there, "--runner", "local") == 0, "nothing is trained twice"
    assert lines(there / "results.jsonl", "run") == [
        r for r in map(json.loads, before.splitlines()) if r["kind"] == "run"
    ]


def test_answers_choose_and_controls_stand_beside(kitchen: SimpleNamespace) -> None:
    """By exact match; every share is 0 in this toy, so that the loss decides, and the report has both."""
    settings = kitchen.plan["settings"] | {"metric": "exact:text", "max_new_tokens": 4, "control": True}
    kitchen.path.write_text(json.dumps(kitchen.plan | {"settings": settings | {"control_lr": [0.01]}, "seeds": [0]}))
    assert run("sweep", kitchen.path, "--out", kitchen.out, "--markdown", kitchen.out.parent / "report.md") == 0
    runs, choice = lines(kitchen.results, "run"), lines(kitchen.results, "choice")[0]
    assert all({"base", "mask", "weights", "random", "magnitude"} <= r["answers"].keys() for r in runs)
    best = min(runs, key=lambda r: (-r["answers"]["mask"], r["validation"]["mask"]))
    assert choice["combination"] == best["combination"]
    tests = lines(kitchen.results, "test")
    assert {t["metric"] for t in tests} == {"loss", "exact"}
    assert all(t["metric"] in t for t in tests)
    text = (kitchen.out.parent / "report.md").read_text()
    assert "| right answers | validation loss |" in text
    assert "| weights |" in text
    assert run("report", kitchen.out, "-o", kitchen.out.parent / "report.html") == 0
    kitchen.path.write_text(json.dumps(kitchen.plan | {"grid": {"metric": ["loss", "exact:text"]}}))
    assert run("sweep", kitchen.path, "--out", kitchen.out.parent / "other") == 2


def test_more_right_answers_win_over_a_lower_loss() -> None:
    def line(lr: float, loss: float, share: float) -> dict[str, Any]:
        return {
            "combination": {"lr": lr},
            "validation": {"base": 1.0, "mask": loss},
            "answers": {"base": 0.1, "mask": share},
        }

    assert sweep.choose([line(1, 0.5, 0.2), line(2, 0.9, 0.4), line(3, 0.8, 0.4)]) == {"lr": 3}

"""Jobs of an engine, in its local mode: killed ones start again, failed ones say why, nothing runs on afterwards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from helpers import engine

from mftmerge.errors import BadInput, MftmergeError
from mftmerge.jobs import RunnerSettings, run_jobs

LOCAL = RunnerSettings(runner="local", at_once=2, attempts=3, timeout=5)


@pytest.fixture(autouse=True)
def _found_by_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    submitit = pytest.importorskip("submitit")
    # It waits 15 s for a dead job's result: a cluster's file systems can be late, this machine's are not.
    monkeypatch.setattr(submitit.core.core.Job, "_results_timeout_s", 0)
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here.parent), str(here)]))


def run(arguments: dict[str, tuple[Any, ...]], folder: Path, function: Any = engine.work, settings: Any = LOCAL) -> Any:
    said: list[str] = []
    return dict(run_jobs(function, arguments, folder, settings, said.append)), said


def test_jobs_that_are_killed_start_again(tmp_path: Path) -> None:
    done, said = run({n: (tmp_path, n, d) for n, d in (("a", 0), ("b", 2), ("c", 1))}, tmp_path / "jobs")
    assert {k: v["name"] for k, v in done.items()} == {"a": "a", "b": "b", "c": "c"}
    assert {v["process"] for v in done.values()}.isdisjoint({os.getpid()})
    assert (tmp_path / "b").read_text() == "3"
    assert len(said) == 3
    assert all("starting it again" in s for s in said)


def test_a_job_that_is_killed_too_often_ends_the_run_and_the_others(tmp_path: Path) -> None:
    with pytest.raises(MftmergeError, match="was killed 3 times; its log is"):
        run({"a": (tmp_path, "a", 9), "b": (tmp_path, "b", 9)}, tmp_path / "jobs")


def test_what_a_job_raises_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="rows of another model") as e:
        run({"a": ("rows of another model",)}, tmp_path / "jobs", engine.fail)
    assert "\n" not in str(e.value)


def test_options_go_to_the_engine_as_they_are(tmp_path: Path) -> None:
    given = RunnerSettings.make({"runner": "local", "options": {"gpus_per_nod": "1"}})
    assert given.options == {"gpus_per_nod": 1}
    with pytest.raises(BadInput, match="gpus_per_nod"):
        run({"a": (tmp_path, "a", 0)}, tmp_path / "jobs", settings=given)

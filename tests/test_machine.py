"""Cores: affinity and a container's quota; the program sets how threads wait, the library does not."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mftmerge import machine


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("10000 100000", 1),
        ("9900000 100000", 8),
        ("", 8),
    ],
)
def test_cores_follow_affinity_and_quota(
    text: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(machine, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(machine, "QUOTA_V1", (tmp_path / "no", tmp_path / "no"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert machine.cores() == expected


def test_the_older_control_group_has_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "QUOTA", tmp_path / "no")
    monkeypatch.setattr(machine, "QUOTA_V1", (tmp_path / "quota", tmp_path / "period"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    (tmp_path / "period").write_text("100000\n")
    for quota, expected in (("-1", 8), ("300000", 3)):
        (tmp_path / "quota").write_text(f"{quota}\n")
        assert machine.cores() == expected


SHOW = "import os; print(os.environ.get('OMP_WAIT_POLICY'))"


def policy(code: str, **environment: str) -> str:
    rest = {k: v for k, v in os.environ.items() if k not in machine.WAITING}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=rest | environment)
    return done.stdout.splitlines()[-1]


def test_the_program_lets_threads_sleep_unless_told_otherwise() -> None:
    program = (
        f"import atexit\natexit.register(lambda: exec({SHOW!r}))\nfrom mftmerge.cli import main\nmain(['--version'])"
    )
    assert policy(program) == "passive"
    assert policy(program, OMP_WAIT_POLICY="active") == "active"
    assert policy(program, GOMP_SPINCOUNT="1000") == "None"
    assert policy(f"import mftmerge, mftmerge.mask, mftmerge.cli.main\n{SHOW}") == "None", "a library changes nothing"


@pytest.mark.parametrize(
    ("text", "lacks"),
    [
        ("processor : 0\nflags\t\t: fpu sse2 avx avx2 avx512f\n", True),
        ("flags\t\t: fpu avx512f avx512_bf16\n", False),
        ("flags\t\t: fpu amx_tile amx_bf16\n", False),
        ("Features\t: fp asimd asimddp\n", True),
        ("Features\t: fp asimd i8mm bf16\n", False),
        ("isa\t: rv64imafdc\n", False),
    ],
)
def test_a_processor_says_whether_it_has_bfloat16_arithmetic(
    text: str, lacks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert machine.lacks_bfloat16() is lacks
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "none")
    assert machine.lacks_bfloat16() is False, "nothing is known"


def test_work_in_order_begins_little_ahead_and_nothing_after_a_failure() -> None:
    taken = itertools.count()
    begun: list[int] = []

    def work(job: int) -> int:
        begun.append(job)
        if job == 7:
            raise ValueError("seven")
        return job * job

    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match="seven"):  # noqa: PT012
        for job, result in machine.in_order(pool, work, itertools.count(), ahead=3):
            assert (job, result) == (next(taken), job * job)
            assert max(begun) <= job + 3
    assert next(taken) == 7
    assert max(begun) <= 10

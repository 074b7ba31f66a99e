"""The runner of generated code: what passes, what does not, and what it keeps a program from."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from mftmerge.evaluate.sandbox import Limits, network_isolation, run_all, run_tests

QUICK = Limits(seconds=5, cpu_seconds=1, file_megabytes=1)


def test_a_right_program_passes_and_a_wrong_one_says_why() -> None:
    assert run_tests("def f(x):\n    return x + 1", "assert f(1) == 2").passed
    wrong = run_tests("def f(x):\n    return x", "assert f(1) == 2, 'off by one'")
    assert (wrong.passed, wrong.reason) == (False, "AssertionError: off by one")


@pytest.mark.parametrize("program", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"])
def test_leaving_early_is_not_passing(program: str) -> None:
    assert not run_tests(program, "assert False", QUICK).passed


def test_the_standard_library_and_temporary_files_work() -> None:
    program = """
import collections, dataclasses, decimal, heapq, itertools, json, math, random, re, shutil, string, tempfile, typing
Pair = collections.namedtuple("Pair", "a b")
@dataclasses.dataclass
class A:
    x: int = 1
with tempfile.TemporaryDirectory() as d:
    open(d + "/a", "w").write("z")
open("kept", "w").write("1")
"""
    outcome = run_tests(program, "assert A().x == 1 and Pair(1, 2).b == 2 and open('kept').read() == '1'", QUICK)
    assert outcome.passed, outcome.reason


def test_time_is_limited() -> None:
    start = time.monotonic()
    outcomes = run_all(
        [("while True: pass", ""), ("import time; time.sleep(60)", ""), ("x = 1", "assert x")],
        Limits(seconds=2.5, cpu_seconds=1),
        workers=3,
    )
    assert [o.reason for o in outcomes] == ["time", "time", "passed"]
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("x = bytearray(3 << 30)", "MemoryError"),
        ("f = open('x', 'wb')\nfor i in range(3): f.write(bytes(1 << 20)); f.flush()", "File too large"),
        ("f = [open('x%d' % i, 'w') for i in range(200)]", "Too many open files"),
        ("import os; os.fork()", "refuses os.fork"),
        ("import subprocess; subprocess.run(['true'])", "refuses subprocess"),
        ("import os; os.system('true')", "refuses os.system"),
        ("import ctypes; ctypes.CDLL(None)", "refuses ctypes"),
        ("import os; os.kill(os.getppid(), 9)", "refuses os.kill"),
    ],
)
def test_what_a_program_is_kept_from(program: str, reason: str) -> None:
    outcome = run_tests(program, "", QUICK)
    assert not outcome.passed
    assert reason in outcome.reason


def test_files_elsewhere_are_safe(tmp_path: Path) -> None:
    kept = tmp_path / "dir" / "file"
    kept.parent.mkdir()
    kept.write_text("mine")
    attempts = [
        f"open({str(kept)!r}, 'w').write('yours')",
        f"import os; os.remove({str(kept)!r})",
        f"import shutil; shutil.rmtree({str(kept.parent)!r})",
        f"import os; os.rename({str(kept)!r}, 'taken')",
        f"import os; os.symlink({str(kept)!r}, 'link'); open('link', 'a').write('more')",
        f"import os; d = os.open({str(kept.parent)!r}, os.O_RDONLY); os.unlink('file', dir_fd=d)",
        f"import os; os.chmod({str(kept)!r}, 0)",
    ]
    assert not any(outcome.passed for outcome in run_all([(a, "") for a in attempts], QUICK, workers=2))
    assert kept.read_text() == "mine"


def test_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        port = server.getsockname()[1]
        outcome = run_tests(f"import socket; socket.create_connection(('127.0.0.1', {port}))", "", QUICK)
        assert not outcome.passed
        with pytest.raises(BlockingIOError):
            server.accept()
    assert network_isolation() in ("network namespace and audit hook", "audit hook")


def test_a_network_namespace_alone_is_enough() -> None:
    if network_isolation() == "audit hook":
        pytest.skip("the system permits no network namespace")
    import subprocess
    import sys

    child = Path(__file__).parent.parent / "mftmerge" / "evaluate" / "sandbox_child.py"
    probe = (
        f"import runpy, socket; c = runpy.run_path({str(child)!r}); assert c['leave_network']()\n"
        "try: socket.create_connection(('127.0.0.1', 9), 1)\n"
        "except OSError as e: print(e.errno)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.stdout.strip() in ("101", "99"), done  # unreachable: not even the loopback is up

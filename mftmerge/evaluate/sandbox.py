"""Run a generated Python program with its tests in a separate, limited process; only "passed or why not" comes back.

What holds the program: limits of the operating system on CPU time, memory, file size, open files and new processes; a
time limit, after which the whole process group is killed; a temporary directory, removed afterwards; an empty
environment; no network, through a network namespace of its own where the system permits that; and a Python audit hook
(PEP 578) that refuses sockets, new processes, native libraries, and changes to files outside the temporary directory.
That stops accidents. Code written to break out needs a container or a virtual machine around the whole evaluation.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from mftmerge.errors import MftmergeError

CHILD = Path(__file__).with_name("sandbox_child.py")


@dataclass(frozen=True)
class Limits:
    """seconds: wall clock; cpu_seconds: CPU time; megabytes: address space; file_megabytes: a file's size;
    files: open files; processes: new processes."""

    seconds: float = 10.0
    cpu_seconds: int = 10
    megabytes: int = 1024
    file_megabytes: int = 16
    files: int = 64
    processes: int = 0


@dataclass(frozen=True)
class Outcome:
    """passed: the program and its tests ran to their end; reason: "passed", "time", or the last line of the error."""

    passed: bool
    reason: str


def run_tests(program: str, tests: str, limits: Limits | None = None) -> Outcome:
    """Run `program`, then `tests` in the same namespace; pass means that neither raised, exited or was stopped.

    A program that exits early, even with code 0, has not passed: the child reports the end of the tests with a secret
    that the program is not given. Raises MftmergeError where there is no such isolation (Windows).
    """
    limits = limits or Limits()
    if os.name != "posix":
        raise MftmergeError("running tests of generated code needs Linux or macOS; evaluate without --run-tests")
    secret = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="mftmerge-tests-") as directory:
        job = {"program": program, "tests": tests, "secret": secret, "limits": asdict(limits), "directory": directory}
        output, code = _run(json.dumps(job), directory, limits.seconds)
    if output is None or code == -signal.SIGXCPU:
        return Outcome(False, "time")
    if output.endswith(f"{secret}\n"):
        return Outcome(True, "passed")
    lines = [line for line in output.splitlines() if line.strip()]
    return Outcome(False, lines[-1][:300] if lines and code == 1 else f"ended with code {code} before its tests did")


def run_all(programs: list[tuple[str, str]], limits: Limits | None = None, *, workers: int = 1) -> list[Outcome]:
    """`run_tests` on many (program, tests), `workers` processes at a time, results in order."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        return list(pool.map(lambda job: run_tests(job[0], job[1], limits), programs))


@cache
def network_isolation() -> str:
    """How programs are kept from the network here: "network namespace and audit hook", or "audit hook" alone."""
    with tempfile.TemporaryDirectory(prefix="mftmerge-tests-") as directory:
        output, _ = _run(json.dumps({"report": True}), directory, 10.0)
    return "network namespace and audit hook" if output == "namespace\n" else "audit hook"


def _run(job: str, directory: str, seconds: float) -> tuple[str | None, int]:
    """Output (last 64 kB) of the child and its exit code; None for the output when it ran out of time.

    All of its process group is gone afterwards.
    """
    environment = {"PATH": os.defpath, "HOME": directory, "TMPDIR": directory, "PYTHONHASHSEED": "0"}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            [sys.executable, "-I", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env=environment,
            start_new_session=True,
        )
        try:
            child.communicate(job.encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return None, -signal.SIGKILL
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        output.seek(max(0, output.seek(0, os.SEEK_END) - 65536))
        return output.read().decode(errors="replace"), child.returncode

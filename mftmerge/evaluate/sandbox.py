"""Run programs that a model wrote with their tests, in processes that are kept from everything else.

Two processes a test: one runs the program, one the tests, and they talk through a socket (see `exchange`), because code
that shares a process with its tests can read what they expect and say that they passed. Each is in a jail (see `jail`).
Levels, the best that the system permits is taken:

- "namespaces": made here, where the system lets this user make namespaces;
- "bwrap": made by bubblewrap, which some systems permit alone (it is set-uid, or in a profile). Its /tmp has a limit on
  bytes and none on the number of files, which is why it comes second;
- "none": limits on processor time, memory, file sizes and open files only. The program can then read and write what
  the user can: `run_tests` refuses unless the code is trusted.

What no level keeps out: faults of the kernel that is shared. Code from an attacker wants a virtual machine around it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from mftmerge.errors import BadInput, MftmergeError
from mftmerge.machine import cores

Level = Literal["bwrap", "namespaces", "none"]

JAIL = Path(__file__).with_name("jail.py")
OURS = ("__init__", "jail", "exchange", "playing", "judging")
SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives")
POLL = 0.02  # seconds between looks at a running test
OUT_OF_TIME = (-signal.SIGXCPU, 128 + signal.SIGXCPU)  # directly, and through a namespace's first process
PATIENCE = 20  # a test may take this many times its seconds by the clock, whatever it did in them


@dataclass(frozen=True)
class Limits:
    """seconds: processor time, and time asleep; waiting for a busy machine's processors does not count. megabytes:
    address space; file_megabytes: a file's size; disk_megabytes: all files together; files: open files."""

    seconds: float = 10.0
    megabytes: int = 1024
    file_megabytes: int = 16
    disk_megabytes: int = 64
    files: int = 64


@dataclass(frozen=True)
class Outcome:
    """passed: the tests ran to their end; reason: "passed", "time", or the error."""

    passed: bool
    reason: str


@cache
def level() -> Level:
    """The best isolation that this system permits; found out by trying."""
    if os.name != "posix":
        raise MftmergeError("running tests of generated code needs Linux or macOS; evaluate without --run-tests")
    for found in ("namespaces", "bwrap"):
        if (found == "bwrap" and not shutil.which("bwrap")) or not sys.platform.startswith("linux"):
            continue
        with tempfile.TemporaryDirectory(prefix="mftmerge-jail-") as root:
            command = _command(found, "probe", root, Limits(), 0, 0)
            with contextlib.suppress(subprocess.TimeoutExpired):
                if subprocess.run(command, capture_output=True, text=True, timeout=20).stdout == "holds\n":
                    return found
    return "none"


def describe() -> str:
    """The level in words, for the remarks on a result."""
    return {
        "bwrap": "bubblewrap: own namespaces, no network, no files, program and tests in separate processes",
        "namespaces": "own namespaces, no network, no files, program and tests in separate processes",
        "none": "limits on time and memory alone: the code was trusted",
    }[level()]


def require(trusted: bool = False) -> None:
    """Raise BadInput where this system cannot hold a program and nobody has said that the code is trusted."""
    if level() == "none" and not trusted:
        raise BadInput(
            "--run-tests: this system permits no namespaces, so programs could read and change your files; install "
            "bubblewrap, run inside a container that permits them, or add --i-trust-this-code"
        )


def run_tests(program: str, tests: str, limits: Limits | None = None, *, trusted: bool = False) -> Outcome:
    """Run `program` in one process and `tests` in another; pass means that every test ran to its end without an error.

    Raises BadInput where nothing holds the program and it is not `trusted`.
    """
    require(trusted)
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="mftmerge-jail-") as one, tempfile.TemporaryDirectory() as two:
        ours, theirs = socket.socketpair()
        reading, writing = os.pipe()
        with ours, theirs, os.fdopen(reading) as verdict, _running() as start:
            start("program", one, limits, theirs.fileno(), 0)
            judge = start("tests", two, limits, ours.fileno(), writing)
            os.close(writing)
            ours.close()
            theirs.close()  # the processes' own copies remain: the death of one ends the other
            text = json.dumps({"program": program, "tests": tests}).encode(errors="surrogatepass")
            feeding = ThreadPoolExecutor(1)
            feeding.submit(_feed, judge, text)
            late = _wait(judge, limits, start.children)
            if not late:  # a program that has ended says why in its code: let it
                with contextlib.suppress(subprocess.TimeoutExpired):
                    start.children[0].wait(0.2)
            feeding.shutdown(wait=False)
            said = "" if late else verdict.read(4096)
    if late or judge.returncode in OUT_OF_TIME:
        return Outcome(False, "time")
    try:
        passed, reason = json.loads(said)
    except ValueError:
        return Outcome(False, f"ended with code {judge.returncode} before its tests did")
    if not passed and start.children[0].returncode in OUT_OF_TIME:
        return Outcome(False, "time")
    return Outcome(passed is True, str(reason))


def run_all(
    programs: Sequence[tuple[str, str]],
    limits: Limits | None = None,
    *,
    workers: int | None = None,
    trusted: bool = False,
) -> list[Outcome]:
    """`run_tests` on many (program, tests), results in order; by default as many at a time as there are cores."""
    require(trusted)
    with ThreadPoolExecutor(max(1, workers or cores())) as pool:
        return list(pool.map(lambda job: run_tests(job[0], job[1], limits, trusted=trusted), programs))


class _Start:
    """Starts the processes of a test and remembers them."""

    def __init__(self) -> None:
        self.children: list[subprocess.Popen[bytes]] = []

    def __call__(self, role: str, root: str, limits: Limits, channel: int, verdict: int) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            _command(level(), role, root, limits, channel, verdict),
            stdin=subprocess.PIPE if role == "tests" else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=root,
            env={"PATH": "/usr/bin:/bin", "HOME": root, "TMPDIR": root, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
            pass_fds=[fd for fd in (channel, verdict) if fd],
            start_new_session=True,
        )
        self.children.append(child)
        return child


@contextlib.contextmanager
def _running() -> Iterator[_Start]:
    """Whatever happens, the processes are gone afterwards, and with a level's first process all that it started."""
    start = _Start()
    try:
        yield start
    finally:
        for child in start.children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        for child in start.children:
            child.wait()
            if child.stdin:
                with contextlib.suppress(OSError):
                    child.stdin.close()


def _feed(child: subprocess.Popen[bytes], text: bytes) -> None:
    assert child.stdin is not None
    with contextlib.suppress(OSError, ValueError):
        child.stdin.write(text)
        child.stdin.close()


def _wait(judge: subprocess.Popen[bytes], limits: Limits, children: Sequence[subprocess.Popen[bytes]]) -> bool:
    """Wait for the tests to end; True when they took too long, not counting what they waited for a processor."""
    start = time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            judge.wait(POLL)
            return False
        passed = time.monotonic() - start
        if passed < limits.seconds:
            continue
        if passed > PATIENCE * limits.seconds or passed - sum(_queued(c.pid) for c in children) > limits.seconds + 0.5:
            return True
        time.sleep(POLL * 5)


def _queued(pid: int) -> float:
    """Seconds that a process and those below it were ready to run and another one had the processor (Linux)."""
    try:
        waited = int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, ValueError, IndexError):
        return 0.0
    return waited + sum(_queued(int(child)) for child in below)


def _visible() -> list[str]:
    """What a program may read: the Python installation and the system's libraries."""
    own = [
        sys.base_prefix,
        sys.prefix,
        *(sysconfig.get_path(n) for n in ("stdlib", "platstdlib", "purelib", "platlib")),
    ]
    real = [os.path.realpath(path) for path in own]
    candidates = [*SYSTEM, *own, *real]
    chosen: list[str] = []
    for path in sorted({os.path.abspath(p) for p in candidates if os.path.exists(p)}, key=len):
        # An installation at the root or at home would show everything there.
        if path not in ("/", os.path.expanduser("~")) and not any(path.startswith(c + "/") for c in chosen):
            chosen.append(path)
    return chosen


def _command(kind: str, role: str, root: str, limits: Limits, channel: int, verdict: int) -> list[str]:
    job: dict[str, object] = {"level": kind, "root": root, "visible": _visible(), "limits": asdict(limits)}
    job |= {"channel": channel, "verdict": verdict}
    python = [sys.executable, "-I", "-B"]
    if kind != "bwrap":
        return [*python, str(JAIL), role, json.dumps(job)]
    options = ["--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    options += ["--size", str(limits.disk_megabytes << 20), "--tmpfs", "/tmp"]  # what is visible may lie below it
    for path in [*_visible(), *(str(JAIL.with_name(f"{n}.py")) for n in OURS)]:
        options += ["--ro-bind", path, path]
    options += ["--proc", "/proc", "--dev", "/dev"]
    options += ["--remount-ro", "/proc", "--remount-ro", "/", "--chdir", "/tmp", "--uid", "65534", "--gid", "65534"]
    return [shutil.which("bwrap") or "bwrap", *options, *python, str(JAIL), role, json.dumps(job)]

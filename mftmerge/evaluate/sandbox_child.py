"""The other side of `sandbox`: runs as a program of its own, standard library only, and never as an import."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import traceback
from collections.abc import Callable
from typing import Any

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000

REFUSED = (
    *("socket.", "ctypes.", "subprocess.", "pty.", "syslog."),
    *("os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "signal.pthread_kill"),
)
PROCESSES = ("subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system")
# Audit events that change files: event -> which of its arguments are (path, directory descriptor or None).
CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    **dict.fromkeys(("os.remove", "os.rmdir"), ((0, 1),)),
    **dict.fromkeys(("os.mkdir", "os.chmod"), ((0, 2),)),
    **dict.fromkeys(("os.truncate", "os.setxattr", "os.removexattr", "os.chflags"), ((0, None),)),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((0, None), (1, 2)),
    "os.chown": ((0, 3),),
    "os.utime": ((0, 3),),
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def leave_network() -> bool:
    """Move into a network namespace without interfaces. False where the system does not permit that."""
    try:
        unshare = ctypes.CDLL(None, use_errno=True).unshare
    except (AttributeError, OSError):  # not Linux
        return False
    return unshare(CLONE_NEWNET) == 0 or unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0


def set_limits(limits: dict[str, Any]) -> None:
    """Limits that the operating system keeps. One that it lacks (address space on macOS) is left out."""
    megabyte = 1 << 20
    wanted = {
        "RLIMIT_CPU": limits["cpu_seconds"],
        "RLIMIT_AS": limits["megabytes"] * megabyte,
        "RLIMIT_FSIZE": limits["file_megabytes"] * megabyte,
        "RLIMIT_NOFILE": limits["files"],
        "RLIMIT_NPROC": limits["processes"],
        "RLIMIT_CORE": 0,
    }
    for name, value in wanted.items():
        number = getattr(resource, name, None)
        if number is not None:
            hard = resource.getrlimit(number)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            try:
                # One more second before the kill: SIGXCPU says why the program ended.
                resource.setrlimit(number, (value, value + (name == "RLIMIT_CPU" and hard != value)))
            except (ValueError, OSError):
                continue


def watch(directory: str, processes: int) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that refuses what a test needs not: network, processes, native code, files elsewhere."""
    root = os.path.realpath(directory)
    # The hook must not look anything up in a namespace that the program can change.
    realpath, join, fsdecode, readlink = os.path.realpath, os.path.join, os.fsdecode, os.readlink
    refused = tuple(event for event in REFUSED if not (processes and event in PROCESSES))
    changes, writing = dict(CHANGES), WRITING

    def inside(path: Any, descriptor: Any = None) -> bool:
        if isinstance(path, int):
            return path > 2  # a descriptor that was opened under this hook
        here = readlink(f"/proc/self/fd/{descriptor}") if isinstance(descriptor, int) and descriptor >= 0 else "."
        real = realpath(join(here, fsdecode(path)))
        return real == root or real.startswith(root + "/")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(refused):
            raise PermissionError(f"the sandbox refuses {event}")
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & writing and path != "/dev/null" and not inside(path):
                raise PermissionError(f"the sandbox refuses to write {path!r}")
        for at, place in changes.get(event, ()):
            if not inside(arguments[at], None if place is None else arguments[place]):
                raise PermissionError(f"the sandbox refuses {event} of {arguments[at]!r}")

    return hook


def main() -> None:
    job = json.load(sys.stdin)
    sys.stdin.close()
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)
    namespace = leave_network()
    if job.get("report"):
        print("namespace" if namespace else "none")
        return
    set_limits(job["limits"])
    secret, program, tests = job.pop("secret"), job["program"], job["tests"]
    done = os.dup(1)
    sys.addaudithook(watch(job["directory"], job["limits"]["processes"]))
    try:
        scope = {"__name__": "__main__", "__builtins__": __builtins__}
        exec(compile(program, "program.py", "exec"), scope)
        exec(compile(tests, "tests.py", "exec"), scope)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os.write(done, f"\n{secret}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    main()

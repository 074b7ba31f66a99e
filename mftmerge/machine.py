"""Cores and threads: how many this process may use, work on them in order, and how torch's threads wait."""

from __future__ import annotations

import ctypes
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

# cgroup v2: "max 100000" or "200000 100000" (microseconds of processor time in a period); v1: two files.
QUOTA = Path("/sys/fs/cgroup/cpu.max")
QUOTA_V1 = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
# Any of these in the environment means that the user has said how threads wait.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
LIBC = ctypes.CDLL(None) if os.name == "posix" else None
M_ARENA_MAX = -8  # of malloc.h
CPUINFO = Path("/proc/cpuinfo")
BFLOAT16 = {"flags": {"avx512_bf16", "amx_bf16"}, "Features": {"bf16", "svebf16"}}  # on x86-64 and on Arm


def cores() -> int:
    """The cores that this process may use: those of its affinity, and no more than a container's quota pays for."""
    allowed, quota = _affinity(), _quota()
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quota() -> float | None:
    """Cores' worth of processor time that the control group allows; None for no limit."""
    for texts in ((QUOTA,), QUOTA_V1):
        try:
            words = " ".join(p.read_text() for p in texts).split()
        except OSError:
            continue
        if len(words) == 2 and all(w.isdecimal() and int(w) for w in words):  # else "max" or -1: no limit
            return int(words[0]) / int(words[1])
    return None


def lacks_bfloat16() -> bool:
    """Whether the processor says what it can do, and bfloat16 arithmetic is not in it: there float32 is faster.

    Its flags and no measurement: a busy moment must not decide which masks a run gives.
    """
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    for key, _, value in (line.partition(":") for line in lines):
        if (known := BFLOAT16.get(key.strip())) is not None:
            return not known & set(value.split())
    return False


def in_order(pool: Executor, work: Callable[[T], R], jobs: Iterable[T], ahead: int) -> Iterator[tuple[T, R]]:
    """Each job with its result, in the order of the jobs; at most `ahead` others are begun meanwhile, or wait done.

    So memory stays small, whatever the number of jobs. After a failure, or when the caller stops, no more are begun.
    """
    waiting: deque[tuple[T, Future[R]]] = deque()
    try:
        for job in jobs:
            waiting.append((job, pool.submit(work, job)))
            if len(waiting) > ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def share_memory() -> None:
    """From now on threads take memory from one heap. glibc gives each its own, and each keeps holes the others fill."""
    if LIBC is not None and hasattr(LIBC, "mallopt"):
        LIBC.mallopt(M_ARENA_MAX, 1)


def give_back() -> None:
    """Give freed memory back to the system. glibc keeps what small blocks stand between, up to twice a large tensor."""
    if LIBC is not None and hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def set_threads() -> None:
    """For a program of its own, before torch is loaded: threads sleep while they wait, and are as many as the cores.

    OpenMP's threads spin by default, which takes the cores from busy neighbours, and know no quota. What the user has
    set stays.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"
    if cores() < _affinity():
        os.environ.setdefault("OMP_NUM_THREADS", str(cores()))


def set_large_pages() -> None:
    """For a program of its own, before torch is loaded: large tensors lie on large pages, where the system has some.

    A merge makes and drops tensors all the time, and the system clears each of their pages: fewer of them take a fifth
    less processor time, and a third less memory, since such blocks go back at once. What the user has set stays.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

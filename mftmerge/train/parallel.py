"""Work on many tensors on a CPU: one thread a tensor, instead of all threads on each operation in turn.

The step of an optimiser is some hundred short passes over memory. With OpenMP's threads inside each of them every pass
waits for the slowest thread, and on a busy machine that was measured to take 20 times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="mftmerge", initializer=lambda: torch.set_num_threads(1))


def each(work: Callable[[Item], Result], items: Sequence[Item], device: torch.device) -> list[Result]:
    """`[work(i) for i in items]` without gradients; on a CPU in as many single-threaded threads as torch may use."""
    threads = torch.get_num_threads()

    def quiet(item: Item) -> Result:
        with torch.no_grad():
            return work(item)

    if device.type != "cpu" or threads == 1 or len(items) < 2:
        return [quiet(i) for i in items]
    try:
        return list(_pool(threads).map(quiet, items))
    finally:
        torch.set_num_threads(threads)  # the pool's start sets it for the whole process

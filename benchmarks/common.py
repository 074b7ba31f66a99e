"""What all benchmarks share: interleaved timing, what the numbers depend on, and where they are written."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaConfig

RESULTS = Path(__file__).parent / "results"


def small_llama(vocabulary: int, layers: int) -> LlamaConfig:
    """SmolLM2-135M's shape with fewer layers."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )


def interleaved(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    before: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    warm: int = 1,
) -> dict[str, float]:
    """Median seconds of each way. The ways take turns, so that a change of the machine's load meets all of them.

    before: runs ahead of each turn and is not timed. clock: `time.thread_time` for work on one thread, which does not
    count what other programs do meanwhile. warm: rounds ahead of those that count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(warm + rounds):
        for name, way in ways.items():
            before()
            start = clock()
            way()
            if turn >= warm:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def bare_loop(sources: Sequence[Path], target: Path, threads: int) -> None:
    """The least that a program does which reads files and writes one of the size of the first, on so many threads.

    Each thread takes a stretch of the files in pieces that stay in the processor's cache: reads, one write, no more.
    """
    size, piece = sources[0].stat().st_size, 1 << 18
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("rb", buffering=0)).fileno() for path in sources]
        out = stack.enter_context(target.open("wb", buffering=0)).fileno()
        os.posix_fallocate(out, 0, size)

        def stretch(number: int) -> None:
            buffer = memoryview(bytearray(piece))
            for at in range(size * number // threads, size * (number + 1) // threads, piece):
                part = buffer[: min(piece, size * (number + 1) // threads - at)]
                for file in files:
                    os.preadv(file, [part], at)
                os.pwrite(out, part, at)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(stretch, range(threads)))


def machine() -> dict[str, Any]:
    """What the numbers depend on (no host name, no path)."""
    return {"cpu": cpu(), "cores": os.cpu_count(), "python": platform.python_version()}


def cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write(name: str, result: Mapping[str, Any]) -> None:
    """Write a result to `results/<name>.json`."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")

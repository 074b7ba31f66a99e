"""Timing and reporting shared by the training benchmarks."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def interleave(
    ways: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each way; the ways take turns, so that a change of the machine's load meets all of them.

    clock: `time.thread_time` for work on one thread, which does not count what other programs do meanwhile.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = clock()
            way()
            seconds[name].append(clock() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def machine() -> dict[str, Any]:
    """What the numbers depend on (no host name, no path)."""
    import torch

    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {p: version(p) for p in ("torch", "numpy", "transformers")}
    return {"cpu": cpu, "gpu": gpu, "threads": torch.get_num_threads(), "versions": versions}


def finish(
    name: str,
    what: Mapping[str, Any],
    seconds: Mapping[str, float],
    ratios: Mapping[str, float],
    targets: Mapping[str, tuple[str, float]],
) -> None:
    """Print ratios against targets and write them to results/<name>.json."""
    for key, value in ratios.items():
        sign, target = targets.get(key, ("", 0.0))
        met = "" if not sign else f"   target {sign} {target}: " + ("met" if _met(value, sign, target) else "NOT met")
        print(f"{key:48s} {value:8.2f}{met}")
    RESULTS.mkdir(exist_ok=True)
    result = {
        "what": dict(what),
        "median_seconds": {k: round(v, 5) for k, v in seconds.items()},
        "ratios": {k: round(v, 3) for k, v in ratios.items()},
        "targets": {k: {"target": f"{s} {t}", "met": _met(ratios[k], s, t)} for k, (s, t) in targets.items()},
        "machine": machine(),
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def _met(value: float, sign: str, target: float) -> bool:
    return value <= target if sign == "<=" else value >= target

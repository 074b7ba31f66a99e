"""What the benchmarks of bits and masks share: interleaved timing, and a record of the result."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mftmerge.masks.mask import Mask, MaskInfo

Side = Callable[[], object]


def quick() -> bool:
    """Whether --quick was given: small sizes, to see that the benchmark runs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    return bool(parser.parse_args().quick)


def interleaved(sides: dict[str, Side], rounds: int, before: Side = lambda: None) -> dict[str, float]:
    """Median seconds of each side, all sides once a round so that a busy machine hits them alike."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            before()
            start = time.perf_counter()
            side()
            if turn:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def record(file: str, claim: str, rows: list[dict[str, Any]]) -> None:
    """Print each row against its target and write all of it to `results/<name>.json`."""
    for row in rows:
        met = "" if "target" not in row else "  met" if row["met"] else "  NOT MET"
        target = f"  (target {row['target']})" if "target" in row else ""
        print(f"{row['case']}: {row['value']:.3g} {row['unit']}{target}{met}")
    out = Path(__file__).parent / "results" / f"{Path(file).stem}.json"
    out.parent.mkdir(exist_ok=True)
    machine: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    machine["busy"] = [round(load, 1) for load in os.getloadavg()]  # processes that ran or waited: 1, 5, 15 minutes
    out.write_text(json.dumps({"claim": claim, "machine": machine, "rows": rows}, indent=1) + "\n")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def at_least(case: str, value: float, target: float, unit: str = "x") -> dict[str, Any]:
    return {"case": case, "value": round(value, 4), "unit": unit, "target": f">= {target}", "met": value >= target}


def at_most(case: str, value: float, target: float, unit: str) -> dict[str, Any]:
    return {"case": case, "value": round(value, 4), "unit": unit, "target": f"<= {target}", "met": value <= target}


def plain(case: str, value: float, unit: str) -> dict[str, Any]:
    return {"case": case, "value": round(value, 4), "unit": unit}


def random_packed(size: int, seed: int, density: float = 0.9) -> np.ndarray:
    """Packed random bits of a density, made a stretch at a time."""
    rng = np.random.default_rng(seed)
    parts = []
    for start in range(0, size, 1 << 24):
        parts.append(np.packbits(rng.random(min(1 << 24, size - start), np.float32) < density, bitorder="little"))
    return np.concatenate(parts)


def random_mask(path: Path, size: int, seed: int, tensors: int = 28) -> None:
    """A mask file of about `size` random bits over `tensors` equal matrices, at density 0.9."""
    each = size // tensors // 4096 * 4096
    one = random_packed(each, seed)  # the same bits in each tensor, turned by some bytes: cheaper to make
    packed = {f"model.layers.{i}.mlp.up_proj.weight": np.roll(one, 8 * i) for i in range(tensors)}
    Mask(packed, dict.fromkeys(packed, (each // 4096, 4096)), MaskInfo(keep=0.9)).save(path)

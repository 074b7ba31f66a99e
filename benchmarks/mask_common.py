"""What the benchmarks of bits and masks share: random masks, and results against targets."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, write

from mftmerge.mask import Mask, MaskInfo


def quick() -> bool:
    """Whether --quick was given: small sizes, to see that the benchmark runs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    return bool(parser.parse_args().quick)


def record(file: str, claim: str, rows: list[dict[str, Any]]) -> None:
    """Print each row against its target and, without --quick, write all of it to `results/<name>.json`."""
    for row in rows:
        met = "" if "target" not in row else "  met" if row["met"] else "  NOT MET"
        target = f"  (target {row['target']})" if "target" in row else ""
        print(f"{row['case']}: {row['value']:.3g} {row['unit']}{target}{met}")
    about = machine() | {"numpy": np.__version__}
    about["busy"] = [round(load, 1) for load in os.getloadavg()]  # processes that ran or waited: 1, 5, 15 minutes
    if not quick():
        write(Path(file).stem, {"claim": claim, "machine": about, "rows": rows})


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

"""Reporting shared by the training benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import common


def machine() -> dict[str, Any]:
    """What the numbers depend on (no host name, no path)."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {p: version(p) for p in ("torch", "numpy", "transformers")}
    return {"cpu": common.cpu(), "gpu": gpu, "threads": torch.get_num_threads(), "versions": versions}


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
    result = {
        "what": dict(what),
        "median_seconds": {k: round(v, 5) for k, v in seconds.items()},
        "ratios": {k: round(v, 3) for k, v in ratios.items()},
        "targets": {k: {"target": f"{s} {t}", "met": _met(ratios[k], s, t)} for k, (s, t) in targets.items()},
        "machine": machine(),
    }
    common.write(name, result)


def _met(value: float, sign: str, target: float) -> bool:
    return value <= target if sign == "<=" else value >= target

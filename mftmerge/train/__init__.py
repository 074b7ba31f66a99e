"""Training a mask. `MaskOptimizer` is the method; `train_mask` is the whole run. Names are loaded when first used."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {"MaskOptimizer": "optimizer", "TrainSettings": "settings", "TrainResult": "run", "train_mask": "run"}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"mftmerge.train.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'mftmerge.train' has no attribute {name!r}")

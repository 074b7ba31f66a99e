"""mftmerge: learn, combine, apply and export weight masks. Names are loaded when first used."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> "module:name" that holds it. Importing mftmerge imports none of them.
_PUBLIC = {
    "BadInput": "errors:BadInput",
    "GridResult": "results:GridResult",
    "Mask": "mask:Mask",
    "MaskInfo": "mask:MaskInfo",
    "MaskOptimizer": "train.optimizer:MaskOptimizer",
    "MftmergeError": "errors:MftmergeError",
    "Parent": "mask:Parent",
    "TrainSettings": "train.settings:TrainSettings",
    "apply_mask": "apply:apply_mask",
    "attach": "live:attach",
    "build_recipe": "recipe.build:build",
    "combine_files": "combine:combine_files",
    "combine_masks": "combine:combine",
    "evaluate_grid": "evaluate:grid",
    "export_recipe": "recipe.export:export",
    "train_mask": "train.run:train_mask",
}

__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mftmerge' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(importlib.import_module(f"mftmerge.{module}"), attribute)


def __dir__() -> list[str]:
    return __all__

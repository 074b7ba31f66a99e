"""mftmerge: learn, combine, apply and export weight masks. Names are loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names as in _PUBLIC, for editors and type checkers
    from mftmerge.apply import apply_mask as apply_mask
    from mftmerge.combine import combine as combine_masks  # noqa: F401
    from mftmerge.combine import combine_files as combine_files
    from mftmerge.errors import BadInput as BadInput
    from mftmerge.errors import MftmergeError as MftmergeError
    from mftmerge.evaluate.choosing import choose_combination as choose_combination
    from mftmerge.evaluate.grid import grid as evaluate_grid  # noqa: F401
    from mftmerge.evaluate.results import GridResult as GridResult
    from mftmerge.live import attach as attach
    from mftmerge.mask import Mask as Mask
    from mftmerge.mask import MaskInfo as MaskInfo
    from mftmerge.mask import Parent as Parent
    from mftmerge.operations import operation as operation
    from mftmerge.recipe.build import build as build_recipe  # noqa: F401
    from mftmerge.recipe.export import export as export_recipe  # noqa: F401
    from mftmerge.recipe.extend import merge_method as merge_method
    from mftmerge.train.optimizer import MaskOptimizer as MaskOptimizer
    from mftmerge.train.run import train_mask as train_mask
    from mftmerge.train.settings import TrainSettings as TrainSettings

__version__ = "0.1.0"

# Public name -> "module:name" that holds it. Importing mftmerge imports none of them.
_PUBLIC = {
    "BadInput": "errors:BadInput",
    "GridResult": "evaluate.results:GridResult",
    "Mask": "mask:Mask",
    "MaskInfo": "mask:MaskInfo",
    "MaskOptimizer": "train.optimizer:MaskOptimizer",
    "MftmergeError": "errors:MftmergeError",
    "Parent": "mask:Parent",
    "TrainSettings": "train.settings:TrainSettings",
    "apply_mask": "apply:apply_mask",
    "attach": "live:attach",
    "build_recipe": "recipe.build:build",
    "choose_combination": "evaluate.choosing:choose_combination",
    "combine_files": "combine:combine_files",
    "combine_masks": "combine:combine",
    "evaluate_grid": "evaluate.grid:grid",
    "export_recipe": "recipe.export:export",
    "merge_method": "recipe.extend:merge_method",
    "operation": "operations:operation",
    "train_mask": "train.run:train_mask",
}

__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mftmerge' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    try:
        return getattr(importlib.import_module(f"mftmerge.{module}"), attribute)
    except ModuleNotFoundError as e:
        from mftmerge.errors import missing_extra

        if needed := missing_extra(e):
            raise ImportError(f"mftmerge.{name}: {needed}", name=e.name) from None
        raise


def __dir__() -> list[str]:
    return __all__

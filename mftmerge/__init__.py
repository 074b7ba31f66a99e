"""mftmerge: learn, combine, apply and export weight masks. Names are loaded when first used."""

from __future__ import annotations

import ast
import functools
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mftmerge.errors import missing_extra

if TYPE_CHECKING:  # the public names: importing mftmerge imports none of them, using one imports its module
    from mftmerge.apply import apply_mask as apply_mask
    from mftmerge.combine import combine as combine_masks  # noqa: F401
    from mftmerge.combine import combine_files as combine_files
    from mftmerge.derive import DiffSettings as DiffSettings
    from mftmerge.derive import diff_mask as diff_mask
    from mftmerge.derive import import_mask as import_mask
    from mftmerge.errors import BadInput as BadInput
    from mftmerge.errors import MftmergeError as MftmergeError
    from mftmerge.evaluate.choosing import Choice as Choice
    from mftmerge.evaluate.choosing import choose_combination as choose_combination
    from mftmerge.evaluate.files import evaluate_files as evaluate_files
    from mftmerge.evaluate.grid import grid as evaluate_grid  # noqa: F401
    from mftmerge.evaluate.measures import Measures as Measures
    from mftmerge.evaluate.results import GridResult as GridResult
    from mftmerge.inspection import inspect as inspect
    from mftmerge.job import run_job as run_job
    from mftmerge.learn.rebase import rebase_mask as rebase_mask
    from mftmerge.learn.run import LearnResult as LearnResult
    from mftmerge.learn.run import learn_merge as learn_merge
    from mftmerge.learn.settings import LearnSettings as LearnSettings
    from mftmerge.live import attach as attach
    from mftmerge.mask import Mask as Mask
    from mftmerge.mask import MaskInfo as MaskInfo
    from mftmerge.mask import Parent as Parent
    from mftmerge.operations import operation as operation
    from mftmerge.overlap import compare as compare
    from mftmerge.push import push as push_to_hub  # noqa: F401
    from mftmerge.recipe.build import build as build_recipe  # noqa: F401
    from mftmerge.recipe.export import export as export_recipe  # noqa: F401
    from mftmerge.recipe.extend import merge_method as merge_method
    from mftmerge.report.page import write_report as write_report
    from mftmerge.sweep import run_sweep as run_sweep
    from mftmerge.sweepplan import SweepPlan as SweepPlan
    from mftmerge.train.optimizer import MaskOptimizer as MaskOptimizer
    from mftmerge.train.ownloop import learnt_mask as learnt_mask
    from mftmerge.train.ownloop import mask_optimizer as mask_optimizer
    from mftmerge.train.results import TrainResult as TrainResult
    from mftmerge.train.run import train_mask as train_mask
    from mftmerge.train.settings import TrainSettings as TrainSettings

__version__ = "0.1.0"


@functools.cache
def _public() -> dict[str, tuple[str, str]]:
    """Public name -> module and name there: what the block above says, read from this file, so that it is said once."""
    (block,) = (node for node in ast.parse(Path(__file__).read_text(encoding="utf-8")).body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom) and node.module]
    return {a.asname or a.name: (str(node.module), a.name) for node in imports for a in node.names}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return __dir__()
    if name not in _public():
        raise AttributeError(f"module 'mftmerge' has no attribute {name!r}")
    module, attribute = _public()[name]
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as e:
        if needed := missing_extra(e):
            raise ImportError(f"mftmerge.{name}: {needed}", name=e.name) from None
        raise


def __dir__() -> list[str]:
    return sorted([*_public(), "__version__"])

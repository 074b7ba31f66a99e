"""What mergekit keeps for a whole process, and we for one merge: its loaders of checkpoints, and its remarks."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions


def own_loaders(options: MergeOptions, loaders: Mapping[ModelReference, LazyTensorLoader]) -> LoaderCache:
    """Give this thread's loader cache loaders of its own, `loaders` among them; `reading` takes them away again.

    mergekit has one `LoaderCache` a thread. Its `loaders` belong to the class, where they would outlive a file that is
    rewritten, and be read by several threads at once; an attribute of the instance comes before that.
    """
    cache = LoaderCache()
    cache.setup(options)
    cache.loaders = dict(loaders)
    return cache


@contextmanager
def reading(options: MergeOptions, loaders: Mapping[ModelReference, LazyTensorLoader]) -> Iterator[LoaderCache]:
    """`own_loaders` for this thread while the block lasts."""
    cache = own_loaders(options, loaders)
    try:
        yield cache
    finally:
        del cache.loaders


@contextmanager
def quiet() -> Iterator[None]:
    """Keep mergekit's and transformers' remarks out of our output; errors are raised anyway."""
    loggers = [logging.getLogger(n) for n in ("mergekit", "transformers")] + [logging.getLogger()]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    bars = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    try:
        yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)
        if bars is None:
            del os.environ["HF_HUB_DISABLE_PROGRESS_BARS"]

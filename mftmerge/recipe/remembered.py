"""What mergekit finds out anew for every tensor, found out once.

A tensor that a checkpoint stores under another name than transformers gives it (so do most models that see) is looked
for with the model's configuration, read again, and with the new names of all tensors that are stored: work that grows
with the square of their number. Both are the same for every tensor. What is remembered is what mergekit's own
functions gave.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit.architecture import conversion
from mergekit.common import ModelReference
from transformers import PretrainedConfig

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightTransform

_read, _match = ModelReference.config, conversion._iter_transform_matches
KEPT = 64
_matches: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}  # of a transform and names of tensors


def remember() -> None:
    """Let mergekit use what is remembered, in this process (once; later calls do nothing)."""
    ModelReference.config = _config
    conversion._iter_transform_matches = _iter_transform_matches


def _config(self: ModelReference, trust_remote_code: bool = False) -> PretrainedConfig:
    """`ModelReference.config`: a copy for each caller, who may change it."""
    try:
        file = os.stat(Path(self.model.path) / "config.json")
    except OSError:  # the hub's, or absent, which is mergekit's to say
        return _read(self, trust_remote_code)
    return copy.deepcopy(_configuration(self, trust_remote_code, file.st_ino, file.st_mtime_ns, file.st_size))


@lru_cache(maxsize=KEPT)
def _configuration(model: ModelReference, trust_remote_code: bool, *file: int) -> PretrainedConfig:
    return _read(model, trust_remote_code)


def _iter_transform_matches(transform: WeightTransform, available: Mapping[str, Any]) -> Iterator[Any]:
    """mergekit's function of this name: the tensors that a transform meets, in order."""
    # Not above: it loads distributed tensors and sympy, and whoever has a transform has loaded it.
    from transformers.core_model_loading import WeightTransform

    kind = type(transform)
    if kind.rename_source_key is not WeightTransform.rename_source_key:  # it may go by more than what is compared here
        yield from _match(transform, available)
        return
    patterns = (tuple(transform.source_patterns), tuple(transform.target_patterns), transform.compiled_sources)
    key = (kind, *patterns, transform.scope_prefix, transform.base_model_prefix, tuple(available))
    found = _matches.get(key)  # another thread may empty it
    if found is None:
        if len(_matches) >= KEPT:
            _matches.clear()
        # Without the values, which would keep files open.
        met = _match(transform, available)
        found = _matches[key] = [(m.source_key, m.renamed_key, m.source_pattern, m.wildcard_values) for m in met]
    for name, renamed, pattern, wildcards in found:
        yield conversion._TransformMatch(name, renamed, pattern, available[name], wildcards)

"""Our merge methods for mergekit; `register()` makes them known to it.

Each is a function of one tensor's inputs; the names and parameters stand in catalogue.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from mftmerge.errors import BadInput, MftmergeError
from mftmerge.mask import Mask
from mftmerge.recipe.catalogue import METHODS, REQUIRED

Tensor = torch.Tensor


@lru_cache(maxsize=32)
def _mask(path: str) -> Mask:
    return Mask.load(path)


def _kept(path: str | None, name: str | None, like: Tensor, missing: str = "keep") -> Tensor | None:
    """Boolean tensor of `like`'s shape, True where a mask file keeps; None where it does not cover the tensor."""
    if path is None:
        return None
    mask = _mask(path)
    if name is None or name not in mask:
        if missing == "error":
            raise BadInput(f"mask {path} does not cover {name}; set missing: keep to leave such tensors as they are")
        return None
    if mask.shape(name) != tuple(like.shape):
        raise BadInput(f"mask {path} has {name} as {mask.shape(name)}, the model has {tuple(like.shape)}")
    return torch.from_numpy(mask.kept(name)).to(like.device)


def masked(group: Any, *, mask: str | None, missing: str) -> Tensor:
    """The one model, with dropped weights at 0, or at the base's value when a base is given."""
    tensor: Tensor = group.non_base[0].tensor
    kept = _kept(mask, group.metadata.name, tensor, missing)
    if kept is None:
        return tensor
    base = group.base.tensor if group.base else torch.zeros((), dtype=tensor.dtype, device=tensor.device)
    return torch.where(kept, tensor, base)


def consensus_kept(deltas: Tensor, tall_lambda: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Consensus mask and multi-task vector of weighted task vectors `deltas`, shape (models, ...).

    TALL mask of task t: |d_t| >= lambda_t |sum(d) - d_t|; the consensus keeps what at least k tasks want
    (Wang et al., "Localizing Task Information for Improved Model Merging and Compression", arXiv 2405.07813, eq. 4, 6).
    """
    multi = deltas.sum(dim=0)
    wanted = torch.zeros(multi.shape, dtype=torch.int32, device=multi.device)
    for delta, limit in zip(deltas, tall_lambda, strict=True):
        wanted += delta.abs() >= limit * (multi - delta).abs()
    return wanted >= k, multi


_recorded: dict[str, Any] | None = None


@contextmanager
def recorded_consensus() -> Iterator[dict[str, Any]]:
    """A dictionary that fills with the boolean consensus mask of each tensor merged inside the `with` block."""
    global _recorded
    _recorded = {}
    try:
        yield _recorded
    finally:
        _recorded = None


def _weighted_deltas(group: Any, weight: dict[object, float]) -> Tensor:
    base = group.base.tensor
    deltas = torch.stack([e.tensor - base for e in group.non_base])
    weights = torch.tensor([weight[e.id] for e in group.non_base], dtype=deltas.dtype, device=deltas.device)
    return deltas * weights.reshape(-1, *[1] * base.dim())


def consensus(group: Any, *, weight: Any, tall_lambda: Any, k: int, **rest: float) -> Tensor:
    """base + lambda * (sum of weighted task vectors), where at least k tasks want it; the base elsewhere."""
    base: Tensor = group.base.tensor
    deltas = _weighted_deltas(group, weight)
    limits = torch.tensor([tall_lambda[e.id] for e in group.non_base], dtype=deltas.dtype, device=deltas.device)
    kept, multi = consensus_kept(deltas, limits, k)
    if _recorded is not None and group.metadata.name:
        _recorded[group.metadata.name] = kept.cpu().numpy()
    if rest["lambda"] != 1:
        multi = multi * rest["lambda"]
    return torch.where(kept, base + multi, base)


def largest(delta: Tensor, density: float) -> Tensor:
    """Boolean mask of the `density` share of largest |delta|, lowest index first among equals."""
    if density >= 1:
        return torch.ones_like(delta, dtype=torch.bool)
    kept = torch.zeros(delta.numel(), dtype=torch.bool, device=delta.device)
    count = round(density * delta.numel())
    kept[torch.sort(delta.abs().reshape(-1), descending=True, stable=True).indices[:count]] = True
    return kept.reshape(delta.shape)


def localize_and_stitch(group: Any, *, density: Any, mask: Any, **rest: float) -> Tensor:
    """base + lambda * (sum of localised task vectors) / (number of models that hold a weight, at least 1).

    A model's region is its mask, or the `density` share of its largest changes in each tensor
    (He et al., "Localize-and-Stitch", arXiv 2408.13656, section 3.2 and its dataless variant).
    """
    base: Tensor = group.base.tensor
    total = torch.zeros(base.shape, dtype=torch.float32, device=base.device)
    holders = torch.zeros(base.shape, dtype=torch.int32, device=base.device)
    for entry in group.non_base:
        delta = entry.tensor.float() - base.float()
        region = largest(delta, density[entry.id])
        kept = _kept(mask[entry.id], group.metadata.name, delta)
        if kept is not None:
            region &= kept
        total += torch.where(region, delta, 0.0)
        holders += region
    stitched = (base.float() + rest["lambda"] * total / holders.clamp(min=1)).to(base.dtype)
    return torch.where(holders > 0, stitched, base)


def select(group: Any, *, mask: Any) -> Tensor:
    """The value of the first model whose mask keeps a weight, the base's where none does: bits, not arithmetic."""
    merged: Tensor = group.base.tensor
    free = torch.ones(merged.shape, dtype=torch.bool, device=merged.device)
    for entry in group.non_base:
        kept = _kept(mask[entry.id], group.metadata.name, entry.tensor)
        if kept is not None:
            merged = torch.where(kept & free, entry.tensor, merged)
            free &= ~kept
    return merged


def emr(group: Any, *, task: Any) -> Tensor:
    """Elect, mask, rescale: one unified task vector, or with `task` on a model that model rebuilt from it.

    unified = sign(sum of deltas) * largest |delta| of that sign; a task keeps where its delta agrees in sign, scaled by
    sum|delta| / sum|kept unified| (Huang et al., "EMR-Merging", arXiv 2405.17461, eq. 3-5; here for each tensor by
    itself, in the paper over the whole model).
    """
    base: Tensor = group.base.tensor
    deltas = torch.stack([e.tensor.float() - base.float() for e in group.non_base])
    sign = torch.where(deltas.sum(dim=0) > 0, 1.0, -1.0)
    unified = sign * torch.where(deltas * sign > 0, deltas.abs(), 0.0).amax(dim=0)
    chosen = [d for d, e in zip(deltas, group.non_base, strict=True) if task[e.id]]
    if chosen:
        unified = torch.where(chosen[0] * unified > 0, unified, 0.0)
        scale = unified.abs().sum()
        unified = unified * (chosen[0].abs().sum() / scale) if scale > 0 else unified
    return (base.float() + unified).to(base.dtype)


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "masked": masked,
    "consensus": consensus,
    "localize_and_stitch": localize_and_stitch,
    "select": select,
    "emr": emr,
}
PAPERS = {
    "consensus": "https://arxiv.org/abs/2405.07813",
    "localize_and_stitch": "https://arxiv.org/abs/2408.13656",
    "emr": "https://arxiv.org/abs/2405.17461",
}


def _of_tensors(name: str) -> Callable[..., Tensor]:
    """The implementation of a method that was added from outside: its function sees tensors and lists, not groups."""

    def implementation(group: Any, **values: Any) -> Tensor:
        method = METHODS[name]  # looked up here: a notebook may define its method again
        assert method.function is not None
        tensors = [entry.tensor for entry in group.non_base]
        for key, parameter in method.parameters.items():
            if parameter.scope == "non_base":
                values[key] = [values[key][entry.id] for entry in group.non_base]
        merged = method.function(group.base.tensor if group.base else None, tensors, **values)
        if not isinstance(merged, Tensor) or merged.shape != tensors[0].shape:
            found = tuple(merged.shape) if isinstance(merged, Tensor) else type(merged).__name__
            raise MftmergeError(f"merge method {name} gave {found} for a tensor of shape {tuple(tensors[0].shape)}")
        return merged.to(tensors[0].dtype)

    return implementation


def register() -> None:
    """Make the methods known to mergekit in this process (once; later calls do nothing)."""
    from mergekit.merge_methods import registered_methods
    from mergekit.merge_methods.base import (
        MISSING,
        BasePolicy,
        FunctionalGroupMergeMethod,
        InputContract,
        MergeMethodSpec,
        ParameterScope,
        ParameterSpec,
    )
    from mergekit.merge_methods.registry import register as add

    known = {m.spec.name for m in registered_methods()}
    kinds: dict[str, Any] = {"float": float, "int": int, "bool": bool, "str": str}
    added = {name: _of_tensors(name) for name, method in METHODS.items() if method.function}
    for name, implementation in (IMPLEMENTATIONS | added).items():
        if name in known:
            continue
        method = METHODS[name]
        parameters = tuple(
            ParameterSpec(
                parameter_name,
                kinds[p.kind] if p.default is not None else kinds[p.kind] | None,
                ParameterScope(p.scope),
                default=MISSING if p.default == REQUIRED else p.default,
            )
            for parameter_name, p in method.parameters.items()
        )
        contract = InputContract(
            base=BasePolicy(method.base), min_non_base=method.non_base[0], max_non_base=method.non_base[1]
        )
        spec = MergeMethodSpec(
            name, parameters, contract, pretty_name=name.replace("_", " ").title(), reference_url=PAPERS.get(name)
        )
        add(FunctionalGroupMergeMethod(spec, implementation))

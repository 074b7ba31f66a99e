"""A patch in the layouts of other programs: vLLM's checkpoint patches, and TRL's sparse safetensors files.

Both hold, for each tensor, flat positions and the new values there. They check nothing and lead one way.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

from mftmerge.checkpoint import Checkpoint, resolve
from mftmerge.dtypes import BY_CODE
from mftmerge.errors import BadInput
from mftmerge.files import refuse_existing, replacing
from mftmerge.patch import Receiver
from mftmerge.patchfile import Patch

LARGEST_INT32 = (1 << 31) - 1


class CheckpointWeightPatch(NamedTuple):
    """The fields of vLLM's class of this name (vllm/model_executor/model_loader/checkpoint_weight_patch.py).

    name, shape, dtype: of the checkpoint's tensor. values: at `indices`, flat and sorted, int32 where they fit.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: torch.Tensor
    indices: torch.Tensor


def vllm_patches(
    patch: Patch | str | Path,
    checkpoint: str | Path,
    *,
    base: str | Path | None = None,
    delta_base: str | Path | None = None,
) -> Iterator[CheckpointWeightPatch]:
    """For each tensor of a patch what vLLM's `load_checkpoint_weight_patches` takes.

    checkpoint: what the patch starts from, as `apply_patch` takes it; base, delta_base: see there. Raises BadInput
    where that is another one, and for NaN, which vLLM reads as "unchanged".
    """
    source, receiver = Checkpoint.open(resolve(checkpoint)), Receiver.of(patch, base, delta_base)
    for name in sorted(receiver.patch.header.tensors):
        entry, old = source.entry(name), source.read(name).reshape(-1)
        new = receiver.changed(entry, old)
        positions = np.flatnonzero(new != old)
        values = torch.from_numpy(new[positions]).view(BY_CODE[entry.dtype].torch)
        if bool(values.isnan().any()):
            raise BadInput(f"tensor {name!r} becomes NaN in places, which vLLM's patches cannot say")
        kind = np.int32 if entry.size <= LARGEST_INT32 else np.int64
        yield CheckpointWeightPatch(name, entry.shape, values.dtype, values, torch.from_numpy(positions.astype(kind)))


def save_for_trl(
    patch: Patch | str | Path,
    checkpoint: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    delta_base: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write a patch as TRL's delta weight sync does: `NAME.idx` (int32) and `NAME.val` (bfloat16), raw encoding.

    See `vllm_patches`. Raises BadInput for tensors of another type than bfloat16: that file would round them.
    """
    refuse_existing(out, overwrite, (checkpoint, base, delta_base))
    tensors: dict[str, torch.Tensor] = {}
    changed = total = 0
    for each in vllm_patches(patch, checkpoint, base=base, delta_base=delta_base):
        if each.dtype != torch.bfloat16 or each.indices.dtype != torch.int32:
            raise BadInput(f"tensor {each.name!r} is {each.dtype}; TRL's files hold bfloat16, 32-bit positions")
        tensors |= {f"{each.name}.idx": each.indices, f"{each.name}.val": each.values}
        changed, total = changed + len(each.indices), total + int(np.prod(each.shape))
    facts = {
        "format": "sparse_weight_patch",
        "version": 1,
        "sparse": True,
        "encoding": "raw",
        "model_version": 1,
        "prev_model_version": 0,
        "num_changed_params": len(tensors) // 2,
        "total_changed_elements": changed,
        "total_elements": total,
        "sparsity": 1 - changed / max(total, 1),
    }
    with replacing(out) as beside:
        save_file(tensors, beside, {key: str(value) for key, value in facts.items()})

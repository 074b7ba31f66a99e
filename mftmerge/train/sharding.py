"""Where a parameter's rows live: whole on this process, or split by rows over the ranks of FSDP2 (`fully_shard`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mftmerge.errors import BadInput
from mftmerge.train import selection

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from transformers import PreTrainedModel


def is_main() -> bool:
    """Whether this process writes and speaks: rank 0 of those that a launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def requested() -> bool:
    """Whether the launcher wants FSDP (`accelerate launch --use_fsdp`). Raises BadInput unless it is FSDP2."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION") != "2":
        raise BadInput("only FSDP2 is supported: launch with --use_fsdp --fsdp_version 2")
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise BadInput("FSDP with offloaded parameters is not supported: launch with --fsdp_offload_params false")
    return True


def shard(model: PreTrainedModel, layers: Iterable[torch.nn.Module]) -> None:
    """Split a model's parameters over all ranks with `fully_shard`, each decoder layer a unit of its own."""
    from torch.distributed.fsdp import fully_shard

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)


def gathered_anew(model: torch.nn.Module) -> None:
    """To be called after the rows of a sharded model's parameters were written: the next pass gathers them again.

    What belongs to no layer (embeddings, the last norm, the head) stays gathered after a forward pass without a
    backward one, and the next pass would go on with the old values.
    """
    if callable(again := getattr(model, "reshard", None)):
        again()


def whole(p: Tensor) -> Tensor:
    """A parameter or gradient as a plain tensor of its whole shape (a collective operation when sharded)."""
    return p.full_tensor() if hasattr(p, "full_tensor") else p


@dataclass(frozen=True)
class Shard:
    """The rows [start, stop) of dimension 0 that this rank holds; group is None where a rank holds them all."""

    start: int
    stop: int
    group: Any = None

    @classmethod
    def of(cls, p: Tensor) -> Shard:
        placements = getattr(p, "placements", None)
        if placements is None:
            return cls(0, p.shape[0])
        mesh = cast("DTensor", p).device_mesh
        if mesh.ndim != 1 or not (placements[0].is_shard() and placements[0].dim == 0):
            raise BadInput(f"sharding {placements} is not supported; use FSDP2's fully_shard on a one-dimensional mesh")
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        shape, offset = compute_local_shape_and_global_offset(p.shape, mesh, placements)
        return cls(offset[0], offset[0] + shape[0], mesh.get_group())

    @staticmethod
    def local(p: Tensor) -> Tensor:
        """This rank's rows as a plain tensor that shares their memory."""
        return p.to_local() if hasattr(p, "to_local") else p

    def rows(self, whole: Tensor) -> Tensor:
        """This rank's rows of a whole tensor: all of them where nothing is sharded."""
        return whole if self.group is None else whole[self.start : self.stop]

    def whole(self, local: Tensor, p: Tensor) -> Tensor:
        """The whole tensor, in its dtype, from every rank's rows (a collective operation when sharded)."""
        if self.group is None:
            return local
        kind = torch.uint8 if local.dtype == torch.bool else local.dtype
        out = torch.zeros(p.shape, dtype=kind, device=local.device)
        out[self.start : self.stop] = local  # every row is one rank's, the others add 0: the sum is exact
        dist.all_reduce(out, group=self.group)
        return out.to(local.dtype)

    def keep_top(self, values: Tensor, shape: Sequence[int], blocks: int, dropped: Callable[[int], int]) -> Tensor:
        """Booleans of the local rows: in each of `blocks` equal pieces of the whole, all but `dropped(size)`."""
        size, row = prod(shape) // blocks, prod(shape[1:])
        flat = values.reshape(-1)
        # Where the blocks begin and end in this rank's rows; a block of other ranks is empty here.
        edges = [min(max(i * size - self.start * row, 0), flat.numel()) for i in range(blocks + 1)]
        kept = [selection.keep_top(flat[a:b], dropped(size), self.group) for a, b in pairwise(edges)]
        return (kept[0] if blocks == 1 else torch.cat(kept)).view(values.shape)

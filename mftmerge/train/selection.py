"""The exact cut of `mftmerge.cut` on torch tensors: on a GPU, over several tensors together, and over ranks; N:M."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mftmerge import cut


@dataclass(frozen=True)
class Cut:
    """Where some tensors together are cut. value: the smallest that is kept.

    first: for each tensor, how many of its elements that equal the value are dropped here, the first ones.
    """

    value: float
    first: list[int]

    def keep(self, part: int, values: Tensor) -> Tensor:
        """Booleans of the shape of the values of tensor number `part`."""
        kept = values >= self.value
        if self.first[part]:
            ties = torch.nonzero(values.reshape(-1) == self.value)  # in the order of indices
            kept.view(-1)[ties[: self.first[part], 0]] = False
        return kept


def keep_top(values: Tensor, dropped: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """Booleans of the shape of float32 `values`: all but the `dropped` smallest, on all ranks of the group together."""
    if group is None and values.device.type == "cpu":
        return torch.from_numpy(cut.keep_top(values.detach().numpy(), dropped))
    return find([values], dropped, group).keep(0, values)


def negated(values: Tensor, where: Tensor) -> Tensor:
    """float32 values, those at `where` (booleans) with the other sign; a new tensor."""
    return ((where.to(torch.int32) << 31).bitwise_xor_(values.view(torch.int32))).view(torch.float32)


def find(parts: Sequence[Tensor], dropped: int, group: dist.ProcessGroup | None = None) -> Cut:
    """The cut that drops the `dropped` smallest of several tensors together, on all ranks of a group.

    Ties are dropped in the order of the tensors and, within a tensor, of the ranks: rank order is row order. A
    collective operation where there is a group; a rank that holds nothing calls it with empty tensors.
    """
    if dropped <= 0:
        return Cut(float("-inf"), [0] * len(parts))
    value = smallest_kept_over(parts, dropped, group)
    table = torch.tensor([[int((v == value).sum()) for v in parts], [int((v < value).sum()) for v in parts]])
    rank, tables = 0, [table]  # (2, parts) of each rank
    if group is not None:
        table = table.to(_device(parts, group))
        rank, tables = dist.get_rank(group), [torch.zeros_like(table) for _ in range(dist.get_world_size(group))]
        dist.all_gather(tables, table, group=group)
    ties, below = torch.stack(tables).cpu().unbind(1)  # each (ranks, parts)
    # Ties are shared out tensor by tensor and, within one, rank by rank: of each tensor, this rank's share.
    shares = cut.share_ties(ties.t().flatten().tolist(), dropped - int(below.sum()))
    return Cut(value, shares[rank :: len(tables)])


def smallest_kept(values: Tensor, dropped: int) -> float:
    """The value at position `dropped` (from 0) of the sorted float32 `values`, exactly. Linear time, no sort."""
    if values.device.type == "cpu":
        return cut.smallest_kept(values.detach().numpy(), dropped)
    return smallest_kept_over([values], dropped)


def smallest_kept_over(parts: Sequence[Tensor], dropped: int, group: dist.ProcessGroup | None = None) -> float:
    """As `smallest_kept` over several tensors together, and over the ranks of a process group when one is given.

    Two histograms of 65,536 bins (upper, then lower half of the bits), each added up over the ranks: the traffic does
    not grow with the size of the matrix.
    """
    keys = [cut.ordered(p.detach().reshape(-1).view(torch.int32)) for p in parts]
    device = _device(parts, group)
    # >> 16 keeps the sign: -32768 to 32767, so adding half a digit's range makes the lowest 0.
    high, dropped = cut.locate(_histogram([(k >> 16) + 32768 for k in keys], device, group), dropped)
    low, _ = cut.locate(_histogram([k[(k >> 16) + 32768 == high] & 0xFFFF for k in keys], device, group), dropped)
    return float(cut.ordered(np.int32(((high - 32768) << 16) | low)).view(np.float32))


def keep_pattern(values: Tensor, keep: int, of: int, dim: int = -1) -> Tensor:
    """N:M sparsity: of every `of` neighbours along `dim` keep the `keep` largest (ties: the lowest index is dropped).

    A matrix's inputs are its last dimension in a Linear layer and dimension 0 in GPT-2's Conv1D.
    """
    groups = values.movedim(dim, -1).unflatten(-1, (-1, of))  # (..., groups, of)
    rank = torch.zeros_like(groups, dtype=torch.int8)
    for i in range(of):
        for j in range(of):
            if i != j:  # an equal score ranks above the equal scores before it
                below = groups[..., j] <= groups[..., i] if j < i else groups[..., j] < groups[..., i]
                rank[..., i] += below
    return (rank >= of - keep).flatten(-2).movedim(-1, dim).contiguous()


def _histogram(keys: Sequence[Tensor], device: torch.device, group: dist.ProcessGroup | None) -> np.ndarray:
    """How many keys of all tensors and ranks have each value of a digit, shape (65536,)."""
    counts = torch.zeros(cut.DIGIT, dtype=torch.int64, device=device)
    for k in keys:
        counts += torch.bincount(k, minlength=cut.DIGIT)
    if group is not None:
        dist.all_reduce(counts, group=group)
    return counts.cpu().numpy()


def _device(parts: Sequence[Tensor], group: dist.ProcessGroup | None) -> torch.device:
    """Where the tensors are, and where the group's messages have to be."""
    if group is not None:
        return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    return parts[0].device if parts else torch.device("cpu")


def packed(mask: Tensor) -> tuple[Tensor, list[int] | None]:
    """As a checkpoint has it: booleans eight to the byte, with their shape; whatever else is learnt as it is."""
    if mask.dtype != torch.bool:
        return mask, None
    return torch.from_numpy(np.packbits(mask.numpy())), list(mask.shape)


def unpacked(values: Tensor, shape: list[int] | None) -> Tensor:
    """What `packed` was given."""
    if shape is None:
        return values
    return torch.from_numpy(np.unpackbits(values.numpy(), count=math.prod(shape)).astype(bool)).view(shape)

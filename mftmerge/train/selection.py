"""The exact cut: which weights of a matrix are kept, given its scores.

The same scores give the same mask on every device and with any sharding: the smallest kept value is found exactly, and
of equal scores the one with the lowest index is dropped first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MAGNITUDE = 0x7FFFFFFF  # all bits of a float32 but the sign


def smallest_kept(values: Tensor, dropped: int) -> float:
    """The value at position `dropped` (from 0) of the sorted float32 `values`, exactly. Linear time, no sort."""
    if values.device.type == "cpu":
        # numpy's partition is the fastest exact selection there is on a CPU (vectorised quickselect, in linear time),
        # an order of magnitude ahead of torch's topk and kthvalue. One position only: a list loses the fast path.
        return float(np.partition(values.detach().reshape(-1).numpy(), dropped)[dropped])
    return smallest_kept_over([values], dropped)


def smallest_kept_over(parts: Sequence[Tensor], dropped: int, group: Any = None) -> float:
    """As `smallest_kept` over several tensors together, and over the ranks of a process group when one is given.

    Two histograms of 65,536 bins (upper, then lower half of the bits), each added up over the ranks: exact, and the
    traffic does not grow with the size of the matrix. `parts` may be empty on a rank that holds nothing.
    """
    keys = [_ordered(p.detach().reshape(-1)) for p in parts]
    device = keys[0].device if keys else torch.device("cpu")
    upper = _histogram([(k >> 16) + 32768 for k in keys], device, group)
    high, before = _bin_of(upper, dropped)
    lower = _histogram([k[(k >> 16) + 32768 == high] & 0xFFFF for k in keys], device, group)
    low, _ = _bin_of(lower, dropped - before)
    return _value(((high - 32768) << 16) | low)


def keep_top(values: Tensor, dropped: int) -> Tensor:
    """Booleans of the shape of float32 `values`: all but the `dropped` smallest, ties dropped from the lowest index."""
    if dropped <= 0:
        return torch.ones_like(values, dtype=torch.bool)
    if dropped >= values.numel():
        return torch.zeros_like(values, dtype=torch.bool)
    cut = smallest_kept(values, dropped)
    kept = values >= cut
    drop_ties(values, kept, cut, int(kept.sum()) - (values.numel() - dropped))
    return kept


def drop_ties(values: Tensor, kept: Tensor, cut: float, excess: int) -> None:
    """Clear, in `kept`, the first `excess` of the elements that equal the cut."""
    if excess > 0:
        kept.view(-1)[torch.nonzero(values.reshape(-1) == cut)[:excess, 0]] = False


def keep_pattern(values: Tensor, keep: int, of: int, dim: int = -1) -> Tensor:
    """N:M sparsity: of every `of` neighbours along `dim` keep the `keep` largest (ties: the lowest index is dropped).

    A matrix's inputs are its last dimension in a Linear layer and dimension 0 in GPT-2's Conv1D.
    """
    groups = values.movedim(dim, -1).unflatten(-1, (-1, of))
    rank = torch.zeros_like(groups, dtype=torch.int8)
    for i in range(of):
        for j in range(of):
            if i != j:  # an equal score ranks above the equal scores before it
                below = groups[..., j] <= groups[..., i] if j < i else groups[..., j] < groups[..., i]
                rank[..., i] += below
    return (rank >= of - keep).flatten(-2).movedim(-1, dim).contiguous()


def _ordered(values: Tensor) -> Tensor:
    """int32 keys in the order of float32 values (IEEE 754: negative numbers order backwards). A new tensor."""
    raw = values.view(torch.int32)
    return raw ^ ((raw >> 31) & _MAGNITUDE)


def _value(key: int) -> float:
    """The float32 value of one key: `_ordered` is its own inverse."""
    raw = np.int32(key)
    return float((raw ^ ((raw >> np.int32(31)) & np.int32(_MAGNITUDE))).view(np.float32))


def _histogram(keys: Sequence[Tensor], device: torch.device, group: Any) -> Tensor:
    counts = torch.zeros(65536, dtype=torch.int64, device=device)
    for k in keys:
        counts += torch.bincount(k, minlength=65536)
    if group is not None:
        torch.distributed.all_reduce(counts, group=group)
    return counts


def _bin_of(counts: Tensor, position: int) -> tuple[int, int]:
    """The bin that holds sorted position `position`, and how many elements come before that bin."""
    total = counts.cumsum(0)
    found = int(torch.searchsorted(total, position, right=True))
    return found, int(total[found] - counts[found])

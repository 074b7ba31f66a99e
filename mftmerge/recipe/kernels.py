"""Arithmetic of linear, task arithmetic and TIES on a piece of a tensor, bit-equal to mergekit's on the whole tensor.

Every step but TIES' trimming works element by element, so that pieces give what whole tensors give, provided that the
same operations run in the same dtypes in the same order. (From four models on, torch adds a float32 tensor's last
elements in another order than the rest; pieces begin at multiples of its vector width, so that the same ones are last.)
The trimming needs one number for a whole tensor, the k-th largest magnitude: magnitudes of floats order like their
bits, so histograms of the bits find it without sorting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Tensor = torch.Tensor
Piece = tuple[int, int]
Deltas = Callable[[int, int], Tensor]  # (start, stop) -> a piece of one model's task vector
Run = Callable[[Callable[[Piece], npt.NDArray[np.uint32]], Sequence[Piece]], Iterator[npt.NDArray[np.uint32]]]


def linear(tensors: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """Weighted sum or mean, accumulated in float32 (float64 for float64), in the inputs' dtype."""
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    total = torch.zeros_like(tensors[0], dtype=wide)
    factors = torch.tensor(weights, dtype=wide)
    for tensor, factor in zip(tensors, factors, strict=True):
        total.addcmul_(tensor, factor.reshape(1))
    if normalize:
        total.div_(factors.sum())
    return total.to(tensors[0].dtype)


def task_arithmetic(
    base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool, scale: float, elect: bool
) -> Tensor:
    """base + scale * combined task vectors; `elect`: as TIES, only those that agree with the sign of their sum."""
    stacked = torch.stack(list(deltas))
    factors = torch.tensor(weights, dtype=stacked.dtype).unsqueeze(1)
    stacked.mul_(factors)
    if elect:
        positive = stacked.sum(dim=0) >= 0
        agree = stacked.sign() == positive.to(stacked.dtype) * 2 - 1
        total = (stacked * agree).sum(dim=0)
        if normalize:
            shares = (factors * agree).sum(dim=0)
            total /= shares.masked_fill_(shares == 0, 1)
    else:
        total = stacked.sum(dim=0)
        if normalize:
            shares = factors.sum(dim=0)
            total /= shares.masked_fill_(shares.abs() < 1e-8, 1)
    if scale != 1:
        total *= scale
    return base + total


@dataclass(frozen=True)
class Cut:
    """Which elements of a tensor are its k of largest magnitude: above `limit`, and of those at it the first ones.

    `before`: by start of a piece, how many elements at the limit stand in earlier pieces; `at_limit`: how many there
    are; `room`: how many of them are kept.
    """

    limit: int
    room: int
    at_limit: int
    before: dict[int, int]

    @property
    def ambiguous(self) -> bool:
        """Whether another rule for equal magnitudes would keep other elements."""
        return self.room < self.at_limit

    def kept(self, delta: Tensor, start: int) -> Tensor:
        """Boolean tensor, True where a piece that begins at `start` is kept."""
        bits = magnitude_bits(delta)
        kept: npt.NDArray[np.bool_] = bits > self.limit
        allowed = self.room - self.before[start]
        if allowed > 0:
            at_limit = np.flatnonzero(bits == self.limit)
            kept[at_limit[:allowed]] = True
        return torch.from_numpy(kept)


def magnitude_bits(delta: Tensor) -> npt.NDArray[np.unsignedinteger]:
    """The bits of |delta| as integers, which order like the magnitudes."""
    wide = delta.dtype == torch.float32
    bits: Any = delta.view(torch.int32 if wide else torch.int16).numpy()
    return bits.view(np.uint32) & np.uint32(0x7FFFFFFF) if wide else bits.view(np.uint16) & np.uint16(0x7FFF)


def find_cut(deltas: Deltas, pieces: Sequence[Piece], wide: bool, count: int, run: Run) -> Cut:
    """The cut that keeps the `count` elements of largest magnitude, lowest index first among equals.

    wide: float32 (two rounds of histograms, of the upper and then the lower bits) rather than a 16-bit type (one).
    run: maps a function over the pieces in order, possibly in parallel.
    """

    def histogram(piece: Piece, upper: int | None = None) -> npt.NDArray[np.uint32]:
        bits: npt.NDArray[Any] = magnitude_bits(deltas(*piece))
        if wide and upper is None:
            bits = bits >> 16
        elif upper is not None:
            bits = bits[(bits >> 16) == upper] & 0xFFFF
        return np.bincount(bits, minlength=1 << (16 if upper is not None else 15)).astype(np.uint32)

    def choose(counts: npt.NDArray[np.uint64], wanted: int) -> tuple[int, int]:
        """The bin that holds the wanted-th largest, and how many of that bin are among the wanted."""
        above = np.cumsum(counts[::-1])
        i = int(np.searchsorted(above, wanted))
        at = len(counts) - 1 - i
        return at, wanted - int(above[i] - counts[at])

    rows = list(run(histogram, pieces))
    limit, room = choose(np.sum(rows, axis=0, dtype=np.uint64), count)
    if wide:
        upper = limit
        rows = list(run(lambda p: histogram(p, upper), pieces))
        low, room = choose(np.sum(rows, axis=0, dtype=np.uint64), room)
        limit, column = (upper << 16) + low, low
    else:
        column = limit
    before, seen = {}, 0
    for (start, _), row in zip(pieces, rows, strict=True):
        before[start] = seen
        seen += int(row[column])
    return Cut(limit, room, seen, before)


@dataclass(frozen=True)
class SortedCut:
    """The same cut with equal magnitudes resolved as mergekit does, by sorting; `chosen`: True where kept, flat."""

    chosen: Tensor

    def kept(self, delta: Tensor, start: int) -> Tensor:
        """Boolean tensor, True where a piece that begins at `start` is kept."""
        return self.chosen[start : start + len(delta)]


def sort_cut(deltas: Deltas, pieces: Sequence[Piece], count: int) -> SortedCut:
    """Keep the first `count` of torch's (unstable) descending sort of the magnitudes: needs the tensor in memory."""
    size = pieces[-1][1]
    magnitudes = torch.empty(size, dtype=torch.float32)
    for start, stop in pieces:
        magnitudes[start:stop] = deltas(start, stop).abs()
    chosen = torch.zeros(size, dtype=torch.bool)
    chosen[torch.argsort(magnitudes, descending=True)[:count]] = True
    return SortedCut(chosen)

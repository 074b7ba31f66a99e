"""The one selection: a kept weight keeps its bits, a dropped one takes 0 or the base's bits. Nothing is ever rounded.

Twice, because the two worlds move bits differently: on packed bits and numpy integers (files, weights on the CPU) and
on booleans and torch tensors (merges, accelerators).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mftmerge import bits
from mftmerge.dtypes import integer_view
from mftmerge.errors import BadInput, MftmergeError

if TYPE_CHECKING:
    import torch

Integers = npt.NDArray[np.unsignedinteger[Any]]


def select(
    weights: Integers,
    packed: bits.Packed,
    base: Integers | None = None,
    scratch: bytearray | None = None,
    source: Integers | None = None,
) -> None:
    """In place: keep `weights` (or take those of `source`) where the bit is 1; elsewhere take 0, or `base`'s value.

    weights, base, source: unsigned integer views, shape (n,), of one width; packed: ceil(n / 8) bytes, element i being
    bit i % 8 of byte i // 8. scratch: at least 8 * ceil(n / 8) elements' bytes, reused between calls.
    Raises MftmergeError when `packed` is too short for `weights`.
    """
    n = len(weights)
    if len(packed) != bits.nbytes(n):
        raise MftmergeError(f"the mask holds {len(packed)} bytes of bits for {n} weights; the file is damaged")
    width = weights.dtype.itemsize
    needed = 8 * len(packed) * width
    room = scratch if scratch is not None and len(scratch) >= needed else bytearray(needed)
    rows = np.frombuffer(room, weights.dtype, 8 * len(packed))
    # One table row a byte of bits: eight all-ones or all-zeros integers at a time, faster than unpacking and widening.
    np.take(_expanded(width), packed, axis=0, out=rows.reshape(-1, 8), mode="clip")
    given = weights if source is None else source
    if base is None:
        np.bitwise_and(given, rows[:n], out=weights)
    else:  # base ^ ((base ^ weights) & kept): exact, where base + (weights - base) * kept would round
        np.bitwise_xor(given, base, out=weights)
        np.bitwise_and(weights, rows[:n], out=weights)
        np.bitwise_xor(weights, base, out=weights)


def select_torch(
    kept: torch.Tensor, weights: torch.Tensor, base: torch.Tensor | None = None, what: str = "the tensor"
) -> torch.Tensor:
    """`weights` where `kept` (booleans of the same shape), else 0 or `base`'s values, as a new tensor.

    what: the tensor's name for messages. Raises BadInput where shapes differ, and where `base` has a dtype whose values
    would be rounded.
    """
    if kept.shape != weights.shape:
        raise BadInput(f"mask has {what} as {tuple(kept.shape)}, the model has {tuple(weights.shape)}")
    if base is None:
        return kept_or_zero(kept, weights)
    if base.shape != weights.shape:
        raise BadInput(
            f"{what} is {tuple(weights.shape)} in the model and {tuple(base.shape)} in the base of the delta"
        )
    if base.dtype != weights.dtype:
        import torch

        if torch.promote_types(base.dtype, weights.dtype) != weights.dtype:
            raise BadInput(f"{what}: a base in {base.dtype} has no exact value in {weights.dtype}; convert one of them")
    return choose(kept, weights, base.to(weights.dtype))


def choose(kept: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`torch.where(kept, one, other)` for tensors of the same shape, bit for bit.

    On a CPU torch branches at each weight, and a mask is what a processor cannot predict: 3.7 ns a weight were measured
    where this takes 0.2 (16 bits) to 0.4 (32).
    """
    if one.device.type != "cpu" or one.dtype != other.dtype:
        return one.where(kept, other)
    mine, others = integer_view(one), integer_view(other)
    return (mine ^ others).mul_(kept).bitwise_xor_(others).view(one.dtype)


def kept_or_zero(kept: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`torch.where(kept, values, 0)`, as `choose`."""
    if values.device.type != "cpu":
        return values.where(kept, 0)
    return (integer_view(values) * kept).view(values.dtype)


@cache
def _expanded(width: int) -> npt.NDArray[np.unsignedinteger[Any]]:
    """For each of the 256 values of a byte of bits, eight integers of `width` bytes: all ones where the bit is 1."""
    ones = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    kind: np.dtype[Any] = np.dtype(f"u{width}")
    return (ones.astype(kind) * np.iinfo(kind).max).astype(kind)

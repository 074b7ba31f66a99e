"""Packed-bit kernels on numpy arrays: little bit order, padding bits of the last byte always 0."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Packed = npt.NDArray[np.uint8]


def nbytes(size: int) -> int:
    """Bytes that hold `size` bits."""
    return (size + 7) // 8


def pack(kept: npt.NDArray[np.bool_]) -> Packed:
    """Pack booleans (any shape, C order) into bytes, bit i of byte j being element 8*j + i."""
    return np.packbits(np.ascontiguousarray(kept, dtype=np.bool_).reshape(-1), bitorder="little")


def unpack(packed: Packed, size: int) -> npt.NDArray[np.bool_]:
    """The first `size` bits as booleans, shape (size,)."""
    return np.unpackbits(packed, count=size, bitorder="little").view(np.bool_)


def count(packed: Packed) -> int:
    """Number of ones."""
    return int(np.bitwise_count(packed).sum(dtype=np.int64))

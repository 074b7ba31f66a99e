"""Packed-bit kernels on numpy arrays: little bit order, padding bits of the last byte always 0."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import numpy.typing as npt

from mftmerge.errors import BadInput

Packed = npt.NDArray[np.uint8]


def nbytes(size: int) -> int:
    """Bytes that hold `size` bits."""
    return (size + 7) // 8


def exact(value: float | Fraction | str | int) -> Fraction:
    """The number that was written, not its nearest binary float: 0.9 is 9/10."""
    return value if isinstance(value, Fraction) else Fraction(str(value))


def drop_count(size: int, keep: float | Fraction | str) -> int:
    """How many of `size` weights are dropped when the share `keep` of them is kept: floor((1 - keep) * size), exactly.

    The one rounding rule of the program (training, projection, closed forms). `keep` is read as the decimal that was
    written, so 0.9 of 1000 drops 100 and not 99. Since 0 < keep, a tensor is never wiped. Raises BadInput otherwise.
    """
    try:
        share = exact(keep)
    except (ValueError, ZeroDivisionError):
        raise BadInput(f"density {keep!r} is not a number; give a share such as 0.9") from None
    if not 0 < share <= 1:
        raise BadInput(f"density {keep} is out of range; give a share above 0 and at most 1, such as 0.9")
    dropped = (1 - share) * size
    return dropped.numerator // dropped.denominator


def pack(kept: npt.NDArray[np.bool_]) -> Packed:
    """Pack booleans (any shape, C order) into bytes, bit i of byte j being element 8*j + i."""
    return np.packbits(np.ascontiguousarray(kept, dtype=np.bool_).reshape(-1), bitorder="little")


def unpack(packed: Packed, size: int) -> npt.NDArray[np.bool_]:
    """The first `size` bits as booleans, shape (size,)."""
    return np.unpackbits(packed, count=size, bitorder="little").view(np.bool_)


def count(packed: Packed) -> int:
    """Number of ones."""
    return int(np.bitwise_count(packed).sum(dtype=np.int64))

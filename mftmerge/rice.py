"""Rice codes of whole numbers, and sorted positions as Rice-coded gaps: close to the entropy where these are random.

The code of v with parameter k is v >> k in unary and the k low bits as they are. The two halves stand apart, so that
numpy writes and reads all of them at once.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from mftmerge import bits
from mftmerge.errors import BadInput

Numbers = npt.NDArray[np.int64]
LARGEST_K = 40
LARGEST = 1 << 48  # numbers from here on are refused when they are read


def best_k(values: Numbers) -> int:
    """The parameter that gives the shortest code: near log2 of the mean, the exact one by trying its neighbours."""
    if not len(values):
        return 0
    guess = min(int(math.log2(max(float(values.mean()) * math.log(2), 1.0))), LARGEST_K)
    return min(range(max(0, guess - 1), min(guess + 2, LARGEST_K) + 1), key=lambda k: code_bits(values, k))


def code_bits(values: Numbers, k: int) -> int:
    """Bits that the code takes."""
    return int((values >> k).sum()) + len(values) * (k + 1)


def encode(values: Numbers, k: int) -> tuple[bits.Packed, bits.Packed]:
    """Numbers >= 0 as two packed streams: the unary halves (zeros ended by a one), and the low bits."""
    ends = np.cumsum((values >> k) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, np.bool_)
    unary[ends] = True
    low = (values[:, None] >> np.arange(k) & 1).astype(np.bool_)
    return bits.pack(unary), bits.pack(low)


def decode(unary: bits.Packed, low: bits.Packed, count: int, k: int) -> Numbers:
    """The numbers again. Raises BadInput where the streams do not hold exactly `count` of them."""
    if not 0 <= k <= LARGEST_K or len(low) != bits.nbytes(count * k):
        raise BadInput("the coded numbers are damaged (their low bits)")
    ends = np.flatnonzero(np.unpackbits(unary, bitorder="little"))
    if len(ends) != count or len(unary) != bits.nbytes(int(ends[-1]) + 1 if count else 0):
        raise BadInput("the coded numbers are damaged (their count)")
    high = np.diff(ends, prepend=-1) - 1
    if count and int(high.max()) >= LARGEST >> k:
        raise BadInput("the coded numbers are damaged (one is out of range)")
    found = np.unpackbits(low, bitorder="little")
    if found[count * k :].any():
        raise BadInput("the coded numbers are damaged (their end)")
    digits = found[: count * k].reshape(count, k).astype(np.int64)
    return (high << k) | (digits << np.arange(k)).sum(1)


def gaps(positions: Numbers) -> Numbers:
    """Sorted, different positions as the numbers of places between them."""
    return np.diff(positions, prepend=-1) - 1


def positions(gaps: Numbers, size: int) -> Numbers:
    """The reverse. Raises BadInput for a position that is not below `size`."""
    found = np.cumsum(gaps + 1) - 1
    if len(found) and not 0 <= found[-1] < size:
        raise BadInput("the coded positions are damaged (one is out of range)")
    return found


def zigzag(values: Numbers) -> Numbers:
    """Numbers of either sign as numbers >= 0: 0, -1, 1, -2, ... become 0, 1, 2, 3, ..."""
    return (values << 1) ^ (values >> 63)


def unzigzag(values: Numbers) -> Numbers:
    """The reverse."""
    return (values >> 1) ^ -(values & 1)

"""The exact cut: which weights of a tensor are kept when a share of them is. One rule for the whole program.

`drop_count` says how many are dropped. They are those of lowest rank; of equal ranks those of the lowest indices. The
same ranks give the same mask on every device, in any pieces and on any number of ranks.

Nothing is sorted. The rank at the cut is found digit by digit (a radix selection): count how many weights have each
value of the leading digit, `locate` the value in which the cut lies, go on among the weights that share it with the
next digit. Counts add up over the pieces of a tensor, over tensors and over processes, so memory and traffic do not
grow with them. This module is the rule and its numpy side; `train.selection` is the same on torch tensors and ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from mftmerge import bits
from mftmerge.bits import Words
from mftmerge.errors import BadInput

Density = float | Fraction | str | Sequence[float]  # several stand for the layers, see `profile`
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Keys = npt.NDArray[np.uint32]
ArrayOrTensor = TypeVar("ArrayOrTensor", bound=Any)  # int32, of numpy or of torch: the same operators

DIGIT = 1 << 16  # values of one digit of a float32's key: its upper and its lower 16 bits
PLANES = 4  # bit planes of the votes that make one digit: 16 classes are counted in a pass


# -- the rule ---------------------------------------------------------------------------------------------------------


def exact(value: float | Fraction | str | int) -> Fraction:
    """The number that was written, not its nearest binary float: 0.9 is 9/10."""
    return value if isinstance(value, Fraction) else Fraction(str(value))


def drop_count(size: int, keep: float | Fraction | str, *, reference: bool = False) -> int:
    """How many of `size` weights are dropped when the share `keep` of them is kept: floor((1 - keep) * size), exactly.

    `keep` is read as the decimal that was written, so 0.9 of 1000 drops 100 and not 99. Since 0 < keep, a tensor is
    never wiped. reference: as the published code rounds, in floats. Raises BadInput unless 0 < keep <= 1.
    """
    try:
        share = exact(keep)
    except (ValueError, ZeroDivisionError):
        raise BadInput(f"density {keep!r} is not a number; give a share such as 0.9") from None
    if not 0 < share <= 1:
        raise BadInput(f"density {keep} is out of range; give a share above 0 and at most 1, such as 0.9")
    # A fraction: in floats (1 - 0.9) * 1000 is 99.99999999999997, and one weight fewer would go.
    dropped = (1 - share) * size
    return int((1 - float(share)) * size) if reference else dropped.numerator // dropped.denominator


def profile(density: Density) -> list[Fraction]:
    """The share that was written, or several of them from the first layer to the last: 0.9, "0.95,0.9", [0.95, 0.9].

    Raises BadInput.
    """
    if isinstance(density, str):
        written: Sequence[float | Fraction | str] = density.split(",")
    else:
        written = density if isinstance(density, Sequence) else [density]
    if not written:
        raise BadInput("density has no value; give a share such as 0.9, or several from the first layer to the last")
    for share in written:
        drop_count(0, share)
    return [exact(share) for share in written]


def between(shares: Sequence[Fraction], place: Fraction) -> Fraction:
    """The share at a place from 0 (the first layer) to 1 (the last): on straight lines, as mergekit's gradients."""
    step = place * (len(shares) - 1)
    left = min(int(step), max(len(shares) - 2, 0))
    return shares[left] + (step - left) * (shares[min(left + 1, len(shares) - 1)] - shares[left])


def locate(counts: npt.NDArray[np.int64], dropped: int) -> tuple[int, int]:
    """The value of a digit in which the cut lies, and how many of the weights with that value are still to be dropped.

    counts: weights with each value, lowest first. The weights with lower values are all dropped, with higher ones kept.
    """
    # "right": a value whose weights are all dropped, to the last one, lies below the cut and not in it.
    reached = np.cumsum(counts)
    value = int(np.searchsorted(reached, dropped, side="right"))
    return value, dropped - int(reached[value] - counts[value])


def share_ties(ties: Iterable[int], dropped: int) -> list[int]:
    """How many of its ties each piece drops, the first ones, when `dropped` go altogether: those of first pieces."""
    shares = []
    for here in ties:
        shares.append(min(here, dropped))
        dropped -= shares[-1]
    return shares


def ordered(raw: ArrayOrTensor) -> ArrayOrTensor:
    """int32 keys in the order of the float32 values whose bits are `raw` (int32); its own inverse. A new array.

    IEEE 754: positive numbers are in the order of their bits; negative ones, whose sign bit makes them negative
    integers, backwards: flip all their bits but the sign.
    """
    return raw ^ ((raw >> 31) & 0x7FFFFFFF)


def keep_top(values: Floats, dropped: int) -> Bools:
    """Booleans of the shape of `values`, in memory: all but the `dropped` smallest."""
    if not 0 < dropped < values.size:
        return np.full(values.shape, dropped <= 0)
    edge = smallest_kept(values, dropped)
    kept = np.greater_equal(values, edge, order="C")
    # Of the weights that equal the edge the first ones go, until as many are dropped as were asked for.
    excess = int(np.count_nonzero(kept)) - (values.size - dropped)
    if excess:
        kept.reshape(-1)[np.flatnonzero(values == edge)[:excess]] = False
    return kept


def smallest_kept(values: Floats, dropped: int) -> float:
    """The value at position `dropped` (from 0) of the sorted `values`.

    numpy's partition is the fastest exact selection there is on a CPU (vectorised quickselect, in linear time), an
    order of magnitude ahead of torch's topk and kthvalue. One position only: a list of them loses the fast path.
    """
    return float(np.partition(values.reshape(-1), dropped)[dropped])


def refuse_nan(scores: Floats) -> Floats:
    """The scores. Raises BadInput on NaN, which has no order."""
    if scores.size and np.isnan(np.max(scores)):  # the maximum of anything with a NaN is NaN
        raise BadInput("scores contain NaN; train again or take this mask out")
    return scores


def sortable(scores: Floats, rule: Literal["signed", "abs"]) -> Keys:
    """Keys from 0 in the order of the scores (or of their magnitudes). Raises BadInput on NaN."""
    plain = refuse_nan(scores) + np.float32(0)  # adding 0 makes -0.0 equal 0.0
    raw = (np.abs(plain, out=plain) if rule == "abs" else plain).view(np.int32)
    keys: Keys = ordered(raw).view(np.uint32)
    return np.bitwise_xor(keys, np.uint32(0x80000000), out=keys)  # the lowest int32 becomes 0


# -- a tensor in pieces -----------------------------------------------------------------------------------------------


def project(
    size: int,
    dropped: int,
    piece: int,
    planes: Callable[[int, int], Sequence[Words]] = lambda start, stop: (),
    keys: Callable[[int, int], Keys] | None = None,
) -> Iterator[tuple[int, int, Words]]:
    """Drop the `dropped` (less than `size`) lowest of `size` weights: by votes, then keys, then index.

    piece: weights handled at a time (a multiple of 64). planes(start, stop): the votes on a piece as bit planes, the
    most significant first; may be empty. keys(start, stop): ranks among equal votes, None where there are none. Both
    are called anew in each pass over the tensor. Yields (start, stop, words of the kept weights) in order.
    """
    ranges = [(a, min(a + piece, size)) for a in range(0, size, piece)]
    if len(ranges) == 1:  # in one piece: what is read in the first pass serves the others
        planes, keys = cache(planes), keys and cache(keys)
    votes: list[bool] = []  # of the weights at the cut, leading planes first

    def narrow(a: int, b: int) -> tuple[Words, Words, Sequence[Words]]:
        """Weights with more votes than those at the cut, those with as many, and the planes not looked at yet."""
        levels = planes(a, b)
        equal = bits.ones(b - a)
        above = np.zeros_like(equal)
        # As numbers are compared: the first digit in which two differ decides. `votes` holds those settled so far.
        for plane, digit in zip(levels, votes, strict=False):
            if not digit:
                above |= equal & plane
            equal = equal & plane if digit else equal & ~plane
        return above, equal, levels[len(votes) :]

    more = True
    while dropped and more:
        narrowed = (narrow(a, b) for a, b in ranges)
        counts = np.sum([_tally(equal, rest[:PLANES]) for _, equal, rest in narrowed], axis=0)
        digit, dropped = locate(counts, dropped)
        width = (len(counts) - 1).bit_length()  # of this digit; a narrower one is the last
        votes += [bool(digit >> p & 1) for p in range(width - 1, -1, -1)]
        more = width == PLANES

    edge = None  # the key at the cut
    if keys is not None and dropped:
        members = lambda a, b: keys(a, b)[bits.unpack(narrow(a, b)[1].view(np.uint8), b - a)]  # noqa: E731
        counts = np.zeros(DIGIT, np.int64)
        for a, b in ranges:
            counts += np.bincount(members(a, b) >> 16, minlength=DIGIT)
        high, dropped = locate(counts, dropped)
        counts[:] = 0
        for k in (members(a, b) for a, b in ranges):
            counts += np.bincount(k[k >> 16 == high] & 0xFFFF, minlength=DIGIT)
        low, dropped = locate(counts, dropped)
        edge = high << 16 | low

    # More votes than at the cut: kept. As many, and a key above the edge: kept. The rest of `dropped` falls on those
    # that are equal in both, the lowest indices first, through all pieces in order.
    for a, b in ranges:
        above, equal, _ = narrow(a, b)
        if edge is not None and keys is not None:
            here, member = keys(a, b), bits.unpack(equal.view(np.uint8), b - a)
            above |= bits.words(bits.pack(member & (here > edge)))
            equal = bits.words(bits.pack(member & (here == edge)))
        if dropped:
            (first,) = share_ties([bits.count(equal)], dropped)
            equal = _without(equal, b - a, first)
            dropped -= first
        yield a, b, above | equal


def _tally(equal: Words, planes: Sequence[Words]) -> list[int]:
    """How many of the positions in `equal` have each value of the planes, lowest value first."""
    if not planes:
        return [bits.count(equal)]
    return _tally(equal & ~planes[0], planes[1:]) + _tally(equal & planes[0], planes[1:])


def _without(words: Words, size: int, first: int) -> Words:
    """The words less their `first` lowest ones."""
    member = bits.unpack(words.view(np.uint8), size).copy()
    member[np.flatnonzero(member)[:first]] = False
    return bits.words(bits.pack(member))

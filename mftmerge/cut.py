"""Cutting one tensor to an exact number of kept weights: by votes, then scores, then position. Streams, any size.

The k-th largest is found digit by digit (a radix selection), first over the bit planes of the votes, then over the two
halves of the scores' sortable integers, so that nothing is sorted and memory does not grow with the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from mftmerge import bits
from mftmerge.bits import Words
from mftmerge.errors import BadInput
from mftmerge.mask import Scores

Levels = Callable[[int, int], Sequence[Words]]  # (start, stop) -> planes of the rank, most significant first
Keys = Callable[[int, int], npt.NDArray[np.uint32]]  # (start, stop) -> integers in the order of the scores
PLANES_AT_ONCE = 4  # 16 classes counted in a pass


def sortable(scores: Scores, rule: Literal["signed", "abs"]) -> npt.NDArray[np.uint32]:
    """Integers in the order of the scores (or of their magnitudes). Raises BadInput on NaN, which has no order."""
    if scores.size and np.isnan(np.max(scores)):  # the maximum of anything with a NaN is NaN
        raise BadInput("scores contain NaN; train again or take this mask out")
    keys = np.ascontiguousarray(scores + np.float32(0), np.float32).view(np.uint32)  # adding 0 makes -0.0 equal 0.0
    if rule == "abs":
        return np.bitwise_and(keys, np.uint32(0x7FFFFFFF), out=keys)
    # Negative numbers order backwards: flip all their bits, and only the sign bit of the others.
    flips = np.right_shift(keys.view(np.int32), 31).view(np.uint32)
    np.bitwise_or(flips, np.uint32(0x80000000), out=flips)
    return np.bitwise_xor(keys, flips, out=keys)


def _valid(start: int, stop: int) -> Words:
    """Ones for the elements [start, stop) of a stretch and zeros for its padding."""
    words = np.full(-(-(stop - start) // 64), ~np.uint64(0))
    bits.clear_padding(words.view(np.uint8), stop - start)
    return words


def _tally(equal: Words, planes: Sequence[Words]) -> list[int]:
    """How many of the positions in `equal` have each value of the planes, largest value first."""
    if not planes:
        return [bits.count(equal)]
    return _tally(equal & planes[0], planes[1:]) + _tally(equal & ~planes[0], planes[1:])


def _narrow(planes: Sequence[Words], chosen: Sequence[bool], equal: Words) -> tuple[Words, Words]:
    """Positions of `equal` whose leading planes are above the chosen digits, and those where they are the same."""
    above = np.zeros_like(equal)
    for plane, digit in zip(planes, chosen, strict=False):
        if digit:
            equal = equal & plane
        else:
            above |= equal & plane
            equal = equal & ~plane
    return above, equal


class _Cut:
    """The search for one tensor: how many are still to be kept among the positions that are equal so far."""

    def __init__(self, size: int, keep: int, piece: int, levels: Levels, keys: Keys | None) -> None:
        self.size, self.piece, self.levels, self.keys = size, piece, levels, keys
        self.wanted, self.members = keep, size
        self.digits: list[bool] = []  # of the votes
        self.key: int | None = None  # of the scores

    def stretches(self) -> Iterator[tuple[int, int]]:
        return ((a, min(a + self.piece, self.size)) for a in range(0, self.size, self.piece))

    def _choose(self, counts: npt.NDArray[np.int64]) -> int:
        """Which class, from the highest down, holds the last weight to be kept; all of the classes above are kept."""
        reached = np.cumsum(counts)
        place = int(np.searchsorted(reached, self.wanted))
        self.members = int(counts[place])
        self.wanted -= int(reached[place]) - self.members
        return place

    def votes(self) -> None:
        """Find the class of votes in which the cut lies."""
        while True:
            done, counts, planes = len(self.digits), np.zeros(0, np.int64), 0
            for a, b in self.stretches():
                levels = self.levels(a, b)
                equal = _narrow(levels, self.digits, _valid(a, b))[1]
                planes = min(PLANES_AT_ONCE, len(levels) - done)
                here = np.array(_tally(equal, levels[done : done + planes]), np.int64)
                counts = here + (counts if counts.size else 0)
            if not planes:
                return
            place = (1 << planes) - 1 - self._choose(counts)
            self.digits += [bool(place >> p & 1) for p in range(planes - 1, -1, -1)]

    def scores(self) -> None:
        """Find the score at which the cut lies, within the class of votes: its upper 16 bits, then its lower."""
        if self.keys is None or self.wanted == self.members:
            return
        upper: int | None = None
        for _ in range(2):
            counts = np.zeros(1 << 16, np.int64)
            for a, b in self.stretches():
                equal = _narrow(self.levels(a, b), self.digits, _valid(a, b))[1]
                keys = self.keys(a, b)[bits.unpack(equal.view(np.uint8), b - a)]
                digit = keys >> 16 if upper is None else keys[keys >> 16 == upper] & 0xFFFF
                counts += np.bincount(digit, minlength=1 << 16)
            place = (1 << 16) - 1 - self._choose(counts[::-1])
            upper, self.key = (place, None) if upper is None else (upper, upper << 16 | place)

    def result(self) -> Iterator[tuple[int, int, Words]]:
        """The kept weights; of equal ones the lowest indices are dropped."""
        drop = self.members - self.wanted
        for a, b in self.stretches():
            above, equal = _narrow(self.levels(a, b), self.digits, _valid(a, b))
            if self.key is not None and self.keys is not None:
                keys, member = self.keys(a, b), bits.unpack(equal.view(np.uint8), b - a)
                above |= bits.words(bits.pack(member & (keys > self.key)))
                equal = bits.words(bits.pack(member & (keys == self.key)))
            if drop:
                here = bits.count(equal)
                if here <= drop:
                    equal = np.zeros_like(equal)
                else:
                    member = bits.unpack(equal.view(np.uint8), b - a).copy()
                    member[np.flatnonzero(member)[:drop]] = False
                    equal = bits.words(bits.pack(member))
                drop -= min(here, drop)
            yield a, b, above | equal


def project(size: int, keep: int, piece: int, levels: Levels, keys: Keys | None) -> Iterator[tuple[int, int, Words]]:
    """Keep exactly `keep` of `size` weights: those of highest rank. Yields (start, stop, words) in order.

    piece: weights handled at a time (a multiple of 64). levels: planes of the votes, most significant first, may be an
    empty sequence. keys: ranks within equal votes, None where there are no scores. Last come the highest indices.
    """
    cut = _Cut(size, keep, piece, levels, keys)
    if size:
        cut.votes()
        cut.scores()
    return cut.result()

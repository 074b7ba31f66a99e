"""Packed-bit kernels on numpy arrays: little bit order, padding bits of the last byte always 0."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Packed = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]


def nbytes(size: int) -> int:
    """Bytes that hold `size` bits."""
    return (size + 7) // 8


def pack(kept: npt.NDArray[np.bool_]) -> Packed:
    """Pack booleans (any shape, C order) into bytes, bit i of byte j being element 8*j + i."""
    return np.packbits(np.ascontiguousarray(kept, dtype=np.bool_).reshape(-1), bitorder="little")


def unpack(packed: Packed, size: int) -> npt.NDArray[np.bool_]:
    """The first `size` bits as booleans, shape (size,)."""
    return np.unpackbits(packed, count=size, bitorder="little").view(np.bool_)


def words(packed: Packed) -> Words:
    """The same bytes as little-endian uint64 words, copied and filled up with zeros where 8 does not divide them."""
    if packed.size % 8 == 0 and packed.flags.c_contiguous:
        return packed.view("<u8")
    padded = np.zeros((packed.size + 7) // 8 * 8, np.uint8)
    padded[: packed.size] = packed
    return padded.view("<u8")


def ones(size: int) -> Words:
    """Words with the first `size` bits set."""
    words = np.full(-(-size // 64), ~np.uint64(0))
    clear_padding(words.view(np.uint8), size)
    return words


def count(packed: Packed | Words) -> int:
    """Number of ones."""
    ones = np.bitwise_count(packed if packed.dtype == np.uint64 else words(packed.view(np.uint8)))
    # Bytes of at most 64 each: summed in 32 bits, which is twice as fast, where that cannot overflow.
    return int(np.add.reduce(ones, dtype=np.uint32 if ones.size < 1 << 26 else np.uint64))


def check(packed: Packed | Words) -> int:
    """XOR of the little-endian 64-bit words (the last filled up with zeros): notices any single flipped bit."""
    whole = packed if packed.dtype == np.uint64 else words(packed.view(np.uint8))
    return int(np.bitwise_xor.reduce(whole, initial=np.uint64(0)))


def clear_padding(packed: Packed, size: int) -> Packed:
    """Set the bits after the first `size` to 0, in place, and return the array."""
    if size % 8:
        packed[size // 8] &= (1 << size % 8) - 1
    packed[nbytes(size) :] = 0
    return packed


def add_up(masks: Sequence[Words], weights: Sequence[int] | None = None) -> list[Words]:
    """Per bit position the weighted number of ones, as bit planes, least significant first.

    A tree of carry-save adders: full adders turn three planes of one level into a sum there and a carry one level up,
    so n masks take about 5 n word operations. Weights are integers of at least 0 (default 1 each).
    """
    levels: list[list[Words]] = [[]]
    for mask, weight in zip(masks, weights or [1] * len(masks), strict=True):
        for level in range(weight.bit_length()):
            while len(levels) <= level:
                levels.append([])
            if weight >> level & 1:
                levels[level].append(mask)
    planes: list[Words] = []
    while len(planes) < len(levels):
        level = len(planes)
        waiting = levels[level]
        if len(waiting) > 1 and level + 1 == len(levels):
            levels.append([])
        while len(waiting) > 1:
            a, b = waiting.pop(), waiting.pop()
            half = a ^ b
            carry = a & b
            if waiting:
                c = waiting.pop()
                carry |= half & c
                half ^= c
            waiting.append(half)
            levels[level + 1].append(carry)
        planes.append(waiting[0] if waiting else np.zeros_like(masks[0]))
    return planes


def split(planes: Sequence[Words], value: int) -> tuple[Words, Words]:
    """Positions whose number (planes least significant first) is above `value`, and those where it equals it."""
    equal, above = np.full_like(planes[0], ~np.uint64(0)), np.zeros_like(planes[0])
    for level in range(len(planes) - 1, -1, -1):
        if value >> level & 1:
            equal &= planes[level]
        else:
            above |= equal & planes[level]
            equal &= ~planes[level]
    return above, equal


def at_least(planes: Sequence[Words], needed: int, out: Words | None = None) -> Words:
    """Positions whose number (planes least significant first) is `needed` or more, in `out` where it is given."""
    out = np.empty_like(planes[0]) if out is None else out
    if needed <= 0 or needed >> len(planes):
        out.fill(~np.uint64(0) if needed <= 0 else np.uint64(0))
        return out
    first = (needed & -needed).bit_length() - 1
    reached = planes[first]
    for level in range(first + 1, len(planes)):
        combine = np.bitwise_and if needed >> level & 1 else np.bitwise_or
        reached = combine(reached, planes[level], out=out)
    if reached is not out:
        out[:] = reached
    return out


# Words voted on at a time: few enough for the cache, and for malloc not to ask the system each time.
AT_ONCE = 1 << 13


def vote(masks: Sequence[Words], needed: int) -> Words:
    """Positions where at least `needed` of the masks have a one."""
    if len(masks) <= 3:  # fewer word operations than counting
        return weighted_vote(masks, (1,) * len(masks), needed)
    result = np.empty_like(masks[0])
    for start in range(0, result.size, AT_ONCE):
        here = slice(start, start + AT_ONCE)
        at_least(add_up([m[here] for m in masks]), needed, result[here])
    return result


@functools.lru_cache(maxsize=256)
def _diagram(weights: tuple[int, ...], needed: int) -> tuple[list[tuple[int, int, int]], int]:
    """The threshold function "weight of the ones >= needed" as a reduced ordered decision diagram.

    Returns its nodes (mask, child if dropped, child if kept) in order of evaluation, and the root. Child -1 is "never",
    -2 "always". Two remainders that lie between the same reachable sums of the weights left are one node.
    """
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    sums = [[0]]
    for i in reversed(order):
        sums.append(sorted({*sums[-1], *(s + weights[i] for s in sums[-1])}))
    nodes: list[tuple[int, int, int]] = []
    known: dict[tuple[int, int], int] = {}

    def node(depth: int, remainder: int) -> int:
        if remainder <= 0:
            return -2
        reachable = sums[len(order) - depth]
        place = bisect.bisect_left(reachable, remainder)
        if place == len(reachable):
            return -1
        key = depth, reachable[place]
        if key not in known:
            low = node(depth + 1, reachable[place])
            high = node(depth + 1, reachable[place] - weights[order[depth]])
            if low != high:
                nodes.append((order[depth], low, high))
            known[key] = low if low == high else len(nodes) - 1
        return known[key]

    root = node(0, needed)
    return nodes, root


MOST_DIAGRAM_MASKS = 12  # a diagram may need 2 ** n nodes; beyond this, adding up bit planes is the safer choice


def weighted_vote(masks: Sequence[Words], weights: Sequence[int], needed: int) -> Words:
    """Positions where the weights (integers > 0) of the masks with a one add up to at least `needed`."""
    if len(masks) > MOST_DIAGRAM_MASKS:
        return at_least(add_up(masks, weights), needed)
    nodes, root = _diagram(tuple(weights), needed)
    result = np.full_like(masks[0], ~np.uint64(0) if root == -2 else np.uint64(0))
    stride = max(1024, min(AT_ONCE, (1 << 15) // max(1, len(nodes))))  # so that all nodes' values stay in the cache
    for start in range(0, result.size if root >= 0 else 0, stride):
        here = slice(start, start + stride)
        values: list[Words] = []
        for mask, low, high in nodes:  # weights are positive, so low implies high: low | (mask & high)
            value = masks[mask][here] if high == -2 else masks[mask][here] & values[high]
            values.append(value | values[low] if low >= 0 else value)
        result[here] = values[root]
    return result

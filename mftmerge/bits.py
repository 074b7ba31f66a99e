"""Packed-bit kernels on numpy arrays: little bit order, padding bits of the last byte always 0."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Packed = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]
CACHED = 1 << 16  # words that a processor's cache holds beside the program


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


def add_up(masks: Sequence[Any], weights: Sequence[int] | None = None) -> list[Any]:
    """Per bit position the weighted number of ones, as bit planes, least significant first.

    A tree of carry-save adders: full adders turn three planes of one level into a sum there and a carry one level up,
    so n masks take about 5 n word operations. Weights are integers of at least 0 (default 1 each). masks: words, or the
    wires of a program.
    """
    levels: list[list[Any]] = [[]]
    for mask, weight in zip(masks, weights or [1] * len(masks), strict=True):
        for level in range(weight.bit_length()):
            while len(levels) <= level:
                levels.append([])
            if weight >> level & 1:
                levels[level].append(mask)
    planes: list[object] = []
    while len(planes) < len(levels):
        level = len(planes)
        waiting = levels[level]
        if len(waiting) > 1 and level + 1 == len(levels):
            levels.append([])
        while len(waiting) > 1:  # three of one weight: their parity stays here, their majority counts twice as much
            a, b = waiting.pop(), waiting.pop()
            half = a ^ b
            carry = a & b
            if waiting:
                c = waiting.pop()
                carry |= half & c
                half ^= c
            waiting.append(half)
            levels[level + 1].append(carry)
        planes.append(waiting[0] if waiting else masks[0] ^ masks[0])
    return planes


def at_least(planes: Sequence[Any], needed: int) -> Any:
    """Positions whose number (planes least significant first) is `needed` or more; 0 < needed < 2 ** len(planes)."""
    # From the lowest one of `needed` up, below which nothing matters: where `needed` has a one, the number must have it
    # too and have reached the rest; where it has a zero, a one of the number is enough by itself.
    first = (needed & -needed).bit_length() - 1
    reached = planes[first]
    for level in range(first + 1, len(planes)):
        reached = reached & planes[level] if needed >> level & 1 else reached | planes[level]
    return reached


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
        # The remainder is rounded up to the next sum that the weights left can make: those between ask for the same.
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


# Operation, two values, and the register that its result goes to. Values from 0 are registers; -1 is the last mask.
Step = tuple[np.ufunc, int, int, int]
MOST_DIAGRAM_MASKS = 12  # a diagram may need 2 ** n nodes; beyond this, adding up bit planes is the safer choice


@dataclass(frozen=True)
class _Wire:
    """A value of a program: the result of its step `place`. Operators write the steps down; nothing is computed."""

    steps: list[tuple[np.ufunc, int, int]]
    place: int

    def _then(self, operation: np.ufunc, other: _Wire) -> _Wire:
        self.steps.append((operation, self.place, other.place))
        return _Wire(self.steps, len(self.steps) - 1)

    def __and__(self, other: _Wire) -> _Wire:
        return self._then(np.bitwise_and, other)

    def __or__(self, other: _Wire) -> _Wire:
        return self._then(np.bitwise_or, other)

    def __xor__(self, other: _Wire) -> _Wire:
        return self._then(np.bitwise_xor, other)


@functools.lru_cache(maxsize=256)
def _vote_program(weights: tuple[int, ...], needed: int) -> tuple[list[Step], int, int]:
    """The steps of a vote, how many registers they take, and where its result is. 0 < needed <= the sum of weights."""
    steps: list[Any] = [None] * len(weights)  # the masks stand first
    masks = [_Wire(steps, i) for i in range(len(weights))]
    if len(weights) <= 3 or (len(weights) <= MOST_DIAGRAM_MASKS and max(weights) > 1):  # fewer steps than counting
        nodes, root = _diagram(weights, needed)
        values: list[Any] = []
        for mask, low, high in nodes:  # weights are positive, so low implies high: low | (mask & high)
            value = masks[mask] if high == -2 else masks[mask] & values[high]
            values.append(value | values[low] if low >= 0 else value)
        result = values[root]
    else:
        result = at_least(add_up(masks, weights), needed)
    return _registers(steps, len(weights), result.place)


def _registers(steps: list[Any], inputs: int, result: int) -> tuple[list[Step], int, int]:
    """Only the steps that the result needs, each into a register whose value is needed no more."""
    last = {result: len(steps)}  # value -> the last step that reads it
    for at in range(len(steps) - 1, inputs - 1, -1):
        if at in last:
            for value in steps[at][1:]:
                last.setdefault(value, at)
    place: dict[int, int] = {i: i - inputs for i in range(inputs)}
    free: list[int] = []
    program, count = [], 0
    for at in range(inputs, len(steps)):
        if at not in last:
            continue
        operation, a, b = steps[at]
        read = place[a], place[b]
        # A register whose value this step reads last may take its result: operations on words write where they read.
        free += sorted({place[v] for v in (a, b) if last[v] == at and place[v] >= 0}, reverse=True)
        if not free:
            free, count = [count], count + 1
        place[at] = free.pop()
        program.append((operation, *read, place[at]))
    return program, count, place[result]


def vote(masks: Sequence[Words], needed: int) -> Words:
    """Positions where at least `needed` of the masks have a one."""
    return weighted_vote(masks, (1,) * len(masks), needed)


def weighted_vote(masks: Sequence[Words], weights: Sequence[int], needed: int) -> Words:
    """Positions where the weights (integers > 0) of the masks with a one add up to at least `needed`.

    A program of a few operations on words, run on stretches that stay in the processor's cache, in buffers of its own.
    """
    if not 0 < needed <= sum(weights):
        return np.full_like(masks[0], ~np.uint64(0) if needed <= 0 else np.uint64(0))
    steps, count, found = _vote_program(tuple(weights), needed)
    if not steps:  # one mask decides
        return masks[found].copy()
    result = np.empty_like(masks[0])
    stride = 1 << min(13, max(10, (CACHED // (len(masks) + count + 1)).bit_length() - 1))
    registers = np.empty((count, stride), np.uint64)
    for start in range(0, result.size, stride):
        out = result[start : start + stride]
        here = [*registers[:, : out.size], *(m[start : start + stride] for m in masks)]  # masks have negative places
        here[found] = out
        for operation, a, b, to in steps:
            operation(here[a], here[b], out=here[to])
    return result

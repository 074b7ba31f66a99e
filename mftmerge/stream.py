"""Copying a checkpoint's shards while masking some of their tensors, in pieces that stay in the processor's cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from mftmerge import bits
from mftmerge.checkpoint import Checkpoint, Integers
from mftmerge.errors import MftmergeError
from mftmerge.mask import Mask
from mftmerge.shard import Shard, TensorEntry
from mftmerge.writer import PIECE, copy_range, read_at, write_at


class MaskStream:
    """Writes shards with `mask` applied. Keeps its buffers between calls, so memory does not depend on any size.

    names: checkpoint tensor -> mask tensor. base: where dropped weights come from; without it they become 0.
    advance: called with the number of bytes just done.
    """

    def __init__(
        self, mask: Mask, names: Mapping[str, str], base: Checkpoint | None, advance: Callable[[int], None]
    ) -> None:
        self.mask, self.names, self.base, self.advance = mask, names, base, advance
        self._weights, self._base = bytearray(PIECE), bytearray(PIECE)
        self._bits = bytearray(PIECE)

    def write(self, shard: Shard, target: int) -> None:
        """Write one shard to the descriptor `target`: header, then tensors and whatever lies between them.

        Raises MftmergeError when the shard or the base changes meanwhile.
        """
        source = shard.open()
        try:
            write_at(target, memoryview(shard.header), 0)
            at = len(shard.header)
            for entry in shard.tensors:
                if entry.name in self.names:
                    copy_range(source, target, at, entry.start, shard.path, self.advance)
                    self._write_masked(entry, source, target)
                    at = entry.stop
            copy_range(source, target, at, shard.nbytes, shard.path, self.advance)
            shard.check_unchanged(source)
        finally:
            os.close(source)

    def _write_masked(self, entry: TensorEntry, source: int, target: int) -> None:
        """Read, select and write one tensor, piece by piece."""
        width = np.dtype(entry.integer).itemsize
        step = PIECE // width
        name = self.names[entry.name]
        base_shard = base_entry = None
        if self.base is not None:
            base_entry = self.base.entry(entry.name)
            base_shard = self.base.shard_of(base_entry)
        base_fd = base_shard.open() if base_shard else -1
        try:
            for start, packed in zip(range(0, entry.size, step), self.mask.pieces(name, step // 8), strict=True):
                stop = min(start + step, entry.size)
                raw = memoryview(self._weights)[: (stop - start) * width]
                read_at(source, raw, entry.start + start * width, entry.file)
                weights = np.frombuffer(raw, entry.integer)
                base: Integers | None = None
                if base_entry is not None:
                    raw_base = memoryview(self._base)[: (stop - start) * width]
                    read_at(base_fd, raw_base, base_entry.start + start * width, base_entry.file)
                    base = np.frombuffer(raw_base, entry.integer)
                select(weights, packed, base, self._bits)
                write_at(target, raw, entry.start + start * width)
                self.advance(len(raw))
            if base_shard:
                base_shard.check_unchanged(base_fd)
        finally:
            if base_shard:
                os.close(base_fd)


def select(
    weights: Integers, packed: bits.Packed, base: Integers | None = None, scratch: bytearray | None = None
) -> None:
    """In place: keep `weights` where the bit is 1; elsewhere take 0, or `base`'s value. Nothing is rounded.

    weights, base: unsigned integer views, shape (n,), of one width; packed: ceil(n / 8) bytes, element i being bit
    i % 8 of byte i // 8. scratch: at least 8 * ceil(n / 8) elements' bytes, reused between calls.
    Raises MftmergeError when `packed` is too short for `weights`.
    """
    n = len(weights)
    if len(packed) != bits.nbytes(n):
        raise MftmergeError(f"the mask holds {len(packed)} bytes of bits for {n} weights; the file is damaged")
    width = weights.dtype.itemsize
    room = scratch if scratch is not None and len(scratch) >= 8 * len(packed) * width else 8 * len(packed) * width
    rows = np.frombuffer(room if isinstance(room, bytearray) else bytearray(room), weights.dtype, 8 * len(packed))
    np.take(_expanded(width), packed, axis=0, out=rows.reshape(-1, 8), mode="clip")
    if base is None:
        np.bitwise_and(weights, rows[:n], out=weights)
    else:  # base ^ ((base ^ weights) & kept)
        np.bitwise_xor(weights, base, out=weights)
        np.bitwise_and(weights, rows[:n], out=weights)
        np.bitwise_xor(weights, base, out=weights)


@cache
def _expanded(width: int) -> npt.NDArray[np.unsignedinteger[Any]]:
    """For each of the 256 values of a byte of bits, eight integers of `width` bytes: all ones where the bit is 1."""
    ones = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    kind: np.dtype[Any] = np.dtype(f"u{width}")
    return (ones.astype(kind) * np.iinfo(kind).max).astype(kind)

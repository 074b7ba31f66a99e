"""Copying a checkpoint's shards while masking some of their tensors, in pieces that a worker's buffers hold."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from pathlib import Path

import numpy as np

from mftmerge.checkpoint import Checkpoint, Shard, TensorEntry
from mftmerge.errors import MftmergeError
from mftmerge.files import read_at, unsupported, write_at
from mftmerge.mask import Mask
from mftmerge.select import Integers, select

PIECE = 1 << 19  # bytes that a worker handles at a time: smaller ones wait for the interpreter's lock more often
RUN = 1 << 25  # bytes outside the mask that one worker copies at a time
TELLING = 1 << 22  # bytes from which the time of a copy says how fast it is
# The kernel's copy is not possible between these two files: read and write instead.
_NO_KERNEL_COPY = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}


# Linux alone has it; elsewhere files are copied through this process.
_kernel_copy = getattr(os, "copy_file_range", unsupported)


class MaskStream:
    """Writes shards with `mask` applied, several tensors at a time. Memory depends on the number of workers only.

    names: checkpoint tensor -> mask tensor. base: where dropped weights come from; without it they become 0.
    advance: called, from any worker, with the number of bytes just done.
    """

    def __init__(
        self,
        mask: Mask,
        names: Mapping[str, str],
        base: Checkpoint | None,
        advance: Callable[[int], None],
        workers: int,
    ) -> None:
        self.mask, self.names, self.base, self.advance = mask, names, base, advance
        self._pool = ThreadPoolExecutor(workers, "mftmerge-copy")
        self._copier = Copier()
        self._buffers = threading.local()
        self._stopped = threading.Event()

    def __enter__(self) -> MaskStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def write(self, shard: Shard, target: int) -> None:
        """Write one shard to the descriptor `target`: header, tensors, and whatever lies between them.

        Raises MftmergeError when the shard or the base changes meanwhile. A stream that has failed is of no more use.
        """
        source = shard.open()
        running: list[Future[None]] = []
        try:
            copy_range(source, target, 0, shard.header, shard.path)
            at = shard.header
            for entry in (*(e for e in shard.tensors if e.name in self.names), None):
                end = entry.start if entry else shard.nbytes
                for start in range(at, end, RUN):
                    stop = min(start + RUN, end)
                    running.append(self._pool.submit(self._copy, source, target, start, stop, shard.path))
                if entry:
                    running.append(self._pool.submit(self._write_masked, entry, source, target))
                    at = entry.stop
            for future in as_completed(running):
                future.result()
            shard.check_unchanged(source)
        finally:
            if not all(future.done() for future in running):
                self._stopped.set()
                for future in running:
                    future.cancel()
                wait(running)
            os.close(source)

    def _copy(self, source: int, target: int, start: int, stop: int, what: Path) -> None:
        self._copier.copy(source, target, start, stop, what)
        self.advance(stop - start)

    def _write_masked(self, entry: TensorEntry, source: int, target: int) -> None:
        """Read, select and write one tensor, piece by piece."""
        if self.base is None:
            self._write_pieces(entry, source, target, None, -1)
            return
        base_entry = self.base.entry(entry.name)
        base_shard = self.base.shard_of(base_entry)
        base_fd = base_shard.open()
        try:
            self._write_pieces(entry, source, target, base_entry, base_fd)
            base_shard.check_unchanged(base_fd)
        finally:
            os.close(base_fd)

    def _write_pieces(
        self, entry: TensorEntry, source: int, target: int, base_entry: TensorEntry | None, base_fd: int
    ) -> None:
        width = entry.element.nbytes
        step = PIECE // width
        buffers = self._buffers.__dict__
        if not buffers:
            buffers.update(weights=bytearray(PIECE), base=bytearray(PIECE), bits=bytearray(PIECE))
        pieces = self.mask.pieces(self.names[entry.name], step // 8)
        for start, packed in zip(range(0, entry.size, step), pieces, strict=True):
            if self._stopped.is_set():
                return
            stop = min(start + step, entry.size)
            raw = memoryview(buffers["weights"])[: (stop - start) * width]
            read_at(source, raw, entry.start + start * width, entry.file)
            base: Integers | None = None
            if base_entry is not None:
                raw_base = memoryview(buffers["base"])[: (stop - start) * width]
                read_at(base_fd, raw_base, base_entry.start + start * width, base_entry.file)
                base = np.frombuffer(raw_base, entry.integer)
            select(np.frombuffer(raw, entry.integer), packed, base, buffers["bits"])
            write_at(target, raw, entry.start + start * width)
            self.advance(len(raw))


def copy_range(source: int, target: int, start: int, stop: int, what: Path) -> None:
    """Copy bytes [start, stop) to the same place in another file, inside the kernel where the two files allow it."""
    while start < stop:
        try:
            copied = _kernel_copy(source, target, min(RUN, stop - start), start, start)
        except OSError as e:
            if e.errno not in _NO_KERNEL_COPY:
                raise
            copied = _through(source, target, start, stop, what)
        if not copied:
            raise MftmergeError(f"{what}: the file ends early; it was truncated while being read")
        start += copied


def _through(source: int, target: int, start: int, stop: int, what: Path) -> int:
    """Copy bytes [start, stop) through this process; gives how many. Raises MftmergeError where the file ends early."""
    buffer = memoryview(bytearray(min(PIECE, stop - start)))
    for at in range(start, stop, PIECE):
        part = buffer[: min(PIECE, stop - at)]
        read_at(source, part, at, what)
        write_at(target, part, at)
    return stop - start


class Copier:
    """Copies ranges by the way that was faster so far: inside the kernel, or through this process.

    Where a file system shares blocks the kernel's copy moves nothing; on a memory file system it goes page by page and
    was measured to take twice the time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ways: list[Callable[[int, int, int, int, Path], object]] = [copy_range, _through]
        self._untried = list(self._ways)
        self._seconds: dict[object, float] = {}  # a byte, by way

    def copy(self, source: int, target: int, start: int, stop: int, what: Path) -> None:
        """Copy bytes [start, stop) to the same place in another file. Raises MftmergeError where they are not there."""
        telling = stop - start >= TELLING
        with self._lock:
            way = self._untried.pop(0) if telling and self._untried else min(self._ways, key=self._cost)
        began = time.perf_counter()
        way(source, target, start, stop, what)
        if telling:
            self._seconds[way] = (time.perf_counter() - began) / (stop - start)

    def _cost(self, way: object) -> float:
        return self._seconds.get(way, 0.0 if way is copy_range else float("inf"))

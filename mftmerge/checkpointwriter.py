"""The one writer of new checkpoints: `model.safetensors`, or shards and an index, from tensors in any order.

safetensors' own `serialize_file` wants all tensors of a file in memory at once; this writer holds none of them. A merge
therefore needs the memory of the tensors in flight, not of a shard.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from mftmerge.checkpoint import INDEX, SINGLE
from mftmerge.dtypes import BY_CODE
from mftmerge.errors import MftmergeError
from mftmerge.files import open_new, sync_file, write_at

SHARD_BYTES = 5_000_000_000  # as mergekit and transformers


@dataclass
class _File:
    """One shard being written: where its data starts and ends so far, and its header."""

    path: Path
    fd: int
    data: int
    at: int = 0
    header: dict[str, Any] = field(default_factory=lambda: {"__metadata__": {"format": "pt"}})


class CheckpointWriter:
    """Writes a checkpoint's weights into an existing or new `folder` (an `OutputDirectory` makes that appear whole).

    Two ways, both safe to use from several threads at once, holding no tensor:

    - as they come, dtypes and shapes unknown before, files in the order of the calls:
          with CheckpointWriter(folder, names) as writer:
              writer.add(name, "BF16", (rows, columns), data)
    - all known in advance, written in any order and in pieces; the files do not depend on that order:
          with CheckpointWriter.planned(folder, {name: ("BF16", (rows, columns))}) as writer:
              writer.write(name, first_byte, data)

    names: every name that may come (room for the header is reserved in front: the format allows spaces at its end).
    The end of a `with` block that went well completes the files (`finish`); otherwise they are closed as they are.
    """

    def __init__(self, folder: Path, names: Iterable[str] = (), shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        folder.mkdir(parents=True, exist_ok=True)
        room = 64 + sum(len(json.dumps(n)) + 240 for n in names)  # dtype, up to 8 dimensions, two 20-digit offsets
        self._room = -(-room // 8) * 8
        self._files: list[_File] = []
        self._places: dict[str, tuple[_File, int, int]] = {}  # tensor -> its file and its bytes' place in the data
        self._planned = 0  # bytes that a planned checkpoint has to get
        self._lock = threading.Lock()
        self.total = 0

    @classmethod
    def planned(
        cls, folder: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], shard_bytes: int = SHARD_BYTES
    ) -> CheckpointWriter:
        """A writer of tensors known in advance: name -> (safetensors dtype code, shape). Reserves the disk's space."""
        writer = cls(folder, tensors, shard_bytes)
        width = {name: BY_CODE[code].nbytes for name, (code, _) in tensors.items()}
        for name in sorted(tensors, key=lambda n: (-width[n], n)):  # wide types first: every tensor stays aligned
            code, shape = tensors[name]
            writer._place(name, code, shape, open_file=False)
        for file in writer._files:
            file.data = 8 + len(_rendered(file.header))
            file.fd = open_new(file.path, file.data + file.at)
        writer._planned, writer.total = sum(file.at for file in writer._files), 0
        return writer

    def add(self, name: str, dtype: str, shape: tuple[int, ...], data: memoryview | bytes) -> None:
        """Append a tensor: safetensors dtype code, shape, and its bytes in C order."""
        view = memoryview(data).cast("B") if memoryview(data).nbytes else memoryview(b"")
        with self._lock:
            file, start, stop = self._place(name, dtype, shape)
        if stop - start != view.nbytes:
            raise MftmergeError(f"tensor {name!r} has {view.nbytes} bytes, its shape and type say {stop - start}")
        write_at(file.fd, view, file.data + start)  # outside the lock: each thread has its own place

    def write(self, name: str, first: int, data: memoryview | bytes) -> None:
        """Bytes of a planned tensor, from its byte `first` on. Each byte is to be written once."""
        file, start, stop = self._places[name]
        view = memoryview(data).cast("B")
        if not 0 <= first <= first + view.nbytes <= stop - start:
            raise MftmergeError(f"tensor {name!r} has {stop - start} bytes, not [{first}, {first + view.nbytes})")
        write_at(file.fd, view, file.data + start + first)
        with self._lock:
            self.total += view.nbytes

    def finish(self) -> None:
        """Complete the files, on the disk too, under their final names, with an index where there are several.

        Raises MftmergeError when bytes of a planned checkpoint were not written.
        """
        if self._planned and self.total != self._planned:
            raise MftmergeError(f"{self.folder}: {self.total:,} of {self._planned:,} planned bytes were written")
        if not self._files:
            self._next()
        count = len(self._files)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [SINGLE]
        for file, name in zip(self._files, names, strict=True):
            header = _rendered(file.header).ljust(file.data - 8)
            if 8 + len(header) > file.data:
                raise MftmergeError(f"{name}: a header of {len(header)} bytes does not fit in {file.data - 8}")
            write_at(file.fd, memoryview(len(header).to_bytes(8, "little") + header), 0)
            os.fsync(file.fd)
            os.replace(file.path, self.folder / name)
        self.close()
        if count > 1:
            home = {t: n for n, f in zip(names, self._files, strict=True) for t in f.header if t != "__metadata__"}
            size = sum(stop - start for _, start, stop in self._places.values())
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(home.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            sync_file(self.folder / INDEX)

    def close(self) -> None:
        """Close the files without completing them."""
        for file in self._files:
            if file.fd >= 0:
                os.close(file.fd)
            file.fd = -1

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    def _place(
        self, name: str, dtype: str, shape: tuple[int, ...], *, open_file: bool = True
    ) -> tuple[_File, int, int]:
        """A place for one more tensor, at the end of the last file or in a new one."""
        if name in self._places:
            raise MftmergeError(f"tensor {name!r} was written already")
        width = BY_CODE[dtype].nbytes
        size = width * math.prod(shape)
        # The format has no gaps, and readers want elements aligned: a wider type after an odd end needs a new file.
        last = self._files[-1] if self._files else None
        if last is None or (last.at and last.at + size > self.shard_bytes) or last.at % width:
            last = self._next(open_file)
        place = last, last.at, last.at + size
        last.header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [last.at, last.at + size]}
        last.at += size
        self._places[name] = place
        self.total += size
        return place

    def _next(self, open_file: bool = True) -> _File:
        path = self.folder / f"model-{len(self._files) + 1}.part"
        file = _File(path, open_new(path, 0) if open_file else -1, 8 + self._room)
        self._files.append(file)
        return file


def _rendered(header: Mapping[str, object]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    return text.ljust(-(-len(text) // 8) * 8)

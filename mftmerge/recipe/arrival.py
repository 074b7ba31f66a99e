"""A checkpoint written tensor by tensor as results arrive: shapes and dtypes need not be known beforehand.

The header's room is reserved in front and filled in at the end (the format allows trailing spaces), so that one tensor
at a time is in memory, where mergekit's writer holds a whole shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from mftmerge.errors import MftmergeError

SHARD_BYTES = 5_000_000_000  # as mergekit and transformers


class ArrivalWriter:
    """Writes `model.safetensors`, or shards and an index, into `folder`. `names`: every name that may arrive."""

    def __init__(self, folder: Path, names: Iterable[str], shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        folder.mkdir(parents=True, exist_ok=True)
        room = 64 + sum(len(json.dumps(n)) + 240 for n in names)  # dtype, up to 8 dimensions, two 20-digit offsets
        self._room = -(-room // 8) * 8
        self._headers: list[dict[str, Any]] = []
        self._file: IO[bytes] | None = None
        self._at = 0
        self.total = 0

    def add(self, name: str, dtype: str, shape: tuple[int, ...], data: memoryview, itemsize: int) -> None:
        """Append a tensor: safetensors dtype code, shape, its bytes in C order, bytes an element."""
        # The format has no gaps, and readers want elements aligned: a wider type after an odd end needs a new file.
        full = self._at and self._at + data.nbytes > self.shard_bytes
        if self._file is None or full or self._at % itemsize:
            self._next()
        assert self._file is not None
        self._file.write(data)
        self._headers[-1][name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [self._at, self._at + data.nbytes],
        }
        self._at += data.nbytes
        self.total += data.nbytes

    def _next(self) -> None:
        self._close()
        self._file = open(self._part(len(self._headers)), "wb")  # noqa: SIM115 - closed by _close
        self._file.seek(8 + self._room)
        self._headers.append({"__metadata__": {"format": "pt"}})
        self._at = 0

    def _part(self, i: int) -> Path:
        return self.folder / f"model-{i + 1}.part"

    def _close(self) -> None:
        if self._file is None:
            return
        header = json.dumps(self._headers[-1], separators=(",", ":")).encode()
        if len(header) > self._room:
            raise MftmergeError(f"header of {len(header)} bytes does not fit in {self._room}")
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None

    def finish(self) -> None:
        """Complete the files under their final names."""
        self._close()
        count = len(self._headers)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1:
            names = ["model.safetensors"]
        for i, name in enumerate(names):
            os.replace(self._part(i), self.folder / name)
        if count > 1:
            weight_map = {
                t: name for name, h in zip(names, self._headers, strict=True) for t in h if t != "__metadata__"
            }
            index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(weight_map.items()))}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def abandon(self) -> None:
        """Close without completing; the caller removes the folder."""
        if self._file is not None:
            self._file.close()
            self._file = None

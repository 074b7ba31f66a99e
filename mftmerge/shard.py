"""One safetensors file: its header, read and checked before anything else, and its bytes, read with `pread`.

Nothing is memory-mapped; a file that changes between two reads is an error, not a mixture of two checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mftmerge.dtypes import BY_CODE, Dtype
from mftmerge.errors import BadInput, MftmergeError

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format itself
MAX_RANK = 16


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint: safetensors dtype code, shape, and its bytes [start, stop) in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def type(self) -> Dtype:
        """The tensor's type in the table."""
        return BY_CODE[self.dtype]

    @property
    def integer(self) -> type[np.unsignedinteger[Any]]:
        """numpy type of the integer view (uint8/16/32/64). Raises BadInput for types below a byte."""
        if self.type.integer is None:
            raise BadInput(
                f"{self.file.name}: tensor {self.name!r} has dtype {self.dtype}, whose elements are not bytes"
            )
        return self.type.integer


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name in the checkpoint and where it really is (a hub cache links to blobs), length and
    hash of its header (8-byte length included), its tensors from front to back, and its identity when it was opened."""

    name: str
    path: Path
    header: int
    header_hash: str
    tensors: tuple[TensorEntry, ...]
    identity: tuple[int, int, int]

    @property
    def nbytes(self) -> int:
        return self.identity[0]

    def read(self, start: int, stop: int) -> bytearray:
        """Bytes [start, stop) of the file. Raises MftmergeError when the file is no longer the one that was opened."""
        fd = self.open()
        try:
            data = bytearray(stop - start)
            done = 0
            while done < len(data):
                got = os.preadv(fd, [memoryview(data)[done:]], start + done)
                if not got:
                    raise MftmergeError(f"{self.path}: the file ends early; it was truncated while being read")
                done += got
            return data
        finally:
            os.close(fd)

    def open(self) -> int:
        """A descriptor for reading; the caller closes it. Raises MftmergeError when the file is another one by now."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise MftmergeError(f"{self.path}: {e.strerror}; it was there when the checkpoint was opened") from None
        try:
            self.check_unchanged(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def check_unchanged(self, fd: int) -> None:
        """Raise MftmergeError unless `fd` has the size, modification time and inode seen when the header was read."""
        if _identity(os.fstat(fd)) != self.identity:
            raise MftmergeError(f"{self.path}: the file changed while it was being read; run again when it is complete")


def safe_file(directory: Path, name: str) -> Path:
    """The real path of a file named inside a checkpoint directory.

    Raises BadInput for absolute names, `..`, anything but a regular file, and links that leave the directory. A link
    from a hub cache's `snapshots/` into the same repository's `blobs/` is how that cache is made, and allowed.
    """
    if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise BadInput(f"{directory}: refers to the file {name!r}, which is outside the directory")
    root = directory.resolve()
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")
    try:
        real = (directory / name).resolve(strict=True)
    except (OSError, RuntimeError):
        raise BadInput(f"{directory}: the file {name!r} is missing; the download or copy is incomplete") from None
    if not any(real.is_relative_to(r) for r in roots):
        raise BadInput(f"{directory}: the file {name!r} is a link that leads outside the directory")
    if not stat.S_ISREG(real.stat().st_mode):
        raise BadInput(f"{directory}: {name!r} is not a regular file")
    return real


def read_shard(path: Path, name: str | None = None) -> Shard:
    """Read and check the header of a safetensors file. Raises BadInput unless it describes the file exactly.

    name: what the checkpoint calls the file, when `path` is where a link leads.
    """
    with open(path, "rb") as f:
        identity = _identity(os.fstat(f.fileno()))
        prefix = f.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER, identity[0] - 8):
            raise BadInput(f"{path}: not a safetensors file, or a truncated one (header length {length} bytes)")
        raw = f.read(length)
    header = parse_json(path, raw)
    header.pop("__metadata__", None)
    try:
        entries = sorted((_entry(path, n, d, 8 + length) for n, d in header.items()), key=lambda e: (e.start, e.stop))
    except (KeyError, TypeError, ValueError) as e:
        raise BadInput(f"{path}: unsound safetensors header ({e}); download it again") from None
    at = 8 + length
    for entry in entries:
        if entry.start != at:
            raise BadInput(f"{path}: the bytes of tensor {entry.name!r} overlap others or leave a gap")
        at = entry.stop
    if at != identity[0]:
        raise BadInput(f"{path}: holds {identity[0]} bytes where its header describes {at}; truncated or altered")
    digest = hashlib.blake2b(raw, digest_size=16).hexdigest()
    return Shard(name or path.name, path, 8 + length, digest, tuple(entries), identity)


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    """A JSON object in which no key occurs twice. Raises BadInput for anything else."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            seen: set[str] = set()
            repeated = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise BadInput(f"{path}: {repeated!r} occurs twice in the header")
        return keys

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as e:
        if isinstance(e, BadInput):
            raise
        raise BadInput(f"{path}: unreadable JSON ({str(e)[:100]}); download it again") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: its JSON is not an object; download it again")
    return value


def _entry(path: Path, name: str, described: dict[str, Any], data_start: int) -> TensorEntry:
    """One tensor of a header. Raises KeyError, TypeError or ValueError, which `read_shard` words."""
    dtype, shape, (start, stop) = described["dtype"], described["shape"], described["data_offsets"]
    if dtype not in BY_CODE:
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if len(shape) > MAX_RANK or not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, start, stop)):
        raise ValueError(f"tensor {name!r} has the shape {str(shape)[:60]} at {start}:{stop}")
    size_bits = math.prod(shape) * BY_CODE[dtype].bits
    if size_bits % 8 or size_bits // 8 != stop - start:
        raise ValueError(
            f"tensor {name!r} has {stop - start} bytes where its shape {str(shape)[:60]} needs {size_bits / 8:g}"
        )
    return TensorEntry(name, sys.intern(dtype), _shared(tuple(shape)), path, data_start + start, data_start + stop)


@lru_cache(1024)
def _shared(shape: tuple[int, ...]) -> tuple[int, ...]:
    """One tuple for all tensors of a shape: a checkpoint of single experts has tens of thousands of them."""
    return shape

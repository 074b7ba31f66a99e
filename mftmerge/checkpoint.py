"""A Hugging Face checkpoint directory as named tensors, read piece by piece as integers (numpy, safetensors only).

Everything is read with `pread` from files whose headers were checked first: nothing is memory-mapped, no pickle is
opened, and a file that changes between two reads is an error rather than a mixture of two checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mftmerge.errors import BadInput, MftmergeError

Integers = npt.NDArray[np.unsignedinteger[Any]]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PIECE = 1 << 18  # bytes per read: stays in the L2 cache, and larger pieces were not faster
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format itself
MAX_RANK = 16

# safetensors dtype code -> bits an element. Types below a byte can be copied, but not read or masked.
DTYPE_BITS = {
    **dict.fromkeys(("F4", "F4_E2M1"), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_INTEGER: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}

# What a hub download may contain: no pickles and no code.
HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "NOTICE*"]


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
    def integer(self) -> Any:
        """numpy type of the integer view (uint8/16/32/64). Raises BadInput for types below a byte."""
        if DTYPE_BITS[self.dtype] not in _INTEGER:
            raise BadInput(
                f"{self.file.name}: tensor {self.name!r} has dtype {self.dtype}, whose elements are not bytes"
            )
        return _INTEGER[DTYPE_BITS[self.dtype]]


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its header as stored (8-byte length included), its tensors, and the file's identity."""

    path: Path
    header: bytes
    tensors: tuple[TensorEntry, ...]
    identity: tuple[int, int, int]

    @property
    def nbytes(self) -> int:
        return self.identity[0]

    def read(self, start: int, stop: int) -> bytearray:
        """Bytes [start, stop) of the file. Raises MftmergeError when the file is no longer the one that was opened."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise MftmergeError(f"{self.path}: {e.strerror}; it was there when the checkpoint was opened") from None
        try:
            self.check_unchanged(fd)
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

    def check_unchanged(self, fd: int) -> None:
        """Raise MftmergeError unless `fd` has the size, modification time and inode seen when the header was read."""
        if _identity(os.fstat(fd)) != self.identity:
            raise MftmergeError(f"{self.path}: the file changed while it was being read; run again when it is complete")


class Checkpoint:
    """A checkpoint directory, opened for reading. All headers are read and checked by `open`; no weight is."""

    def __init__(self, path: Path, shards: tuple[Shard, ...], index: dict[str, Any] | None) -> None:
        self.path, self.shards, self.index = path, shards, index
        self._entries = {e.name: e for s in shards for e in s.tensors}
        self._shard_of = {s.path: s for s in shards}

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a directory holding `model.safetensors` or `model.safetensors.index.json` with its shards.

        As in transformers, the single file wins when both are there. Raises BadInput for anything that is not a sound
        safetensors checkpoint: an index pointing outside the directory, tensors missing from or repeated in the shards,
        headers that do not describe the file, pickles.
        """
        path = Path(path)
        if not path.is_dir():
            raise BadInput(f"{path}: not a checkpoint directory")
        if (path / SINGLE).exists() or (path / SINGLE).is_symlink():
            return cls(path, (read_shard(safe_file(path, SINGLE)),), None)
        if not (path / INDEX).exists():
            raise BadInput(f"{path}: no {SINGLE} or {INDEX} in it{_what_else(path)}")
        index = _read_index(safe_file(path, INDEX))
        weight_map: dict[str, str] = index["weight_map"]
        shards = tuple(read_shard(safe_file(path, name)) for name in sorted(set(weight_map.values())))
        home: dict[str, str] = {}
        for name, shard in zip(sorted(set(weight_map.values())), shards, strict=True):
            for entry in shard.tensors:
                if entry.name in home:
                    raise BadInput(f"{path}: tensor {entry.name!r} is in both {home[entry.name]} and {name}")
                home[entry.name] = name
        for tensor, name in weight_map.items():
            if home.get(tensor) != name:
                raise BadInput(f"{path}: {INDEX} says that {tensor!r} is in {name}, but it is not; download it again")
        return cls(path, shards, index)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[TensorEntry]:
        """Entries in the order of the files, each file from front to back."""
        return (e for s in self.shards for e in s.tensors)

    def entry(self, name: str) -> TensorEntry:
        """Where a tensor is. Raises BadInput when the checkpoint has no such tensor."""
        if name not in self._entries:
            raise BadInput(f"{self.path}: no tensor {name!r} in this checkpoint")
        return self._entries[name]

    def read(self, name: str) -> Integers:
        """A whole tensor as unsigned integers of the element's width, in the tensor's shape."""
        entry = self.entry(name)
        return self.read_range(name, 0, entry.size).reshape(entry.shape)

    def read_range(self, name: str, start: int, stop: int) -> Integers:
        """Elements [start, stop) of the flattened tensor (C order) as unsigned integers, shape (stop - start,)."""
        entry = self.entry(name)
        if not 0 <= start <= stop <= entry.size:
            raise BadInput(f"tensor {name!r} has {entry.size} elements, not [{start}, {stop})")
        width = np.dtype(entry.integer).itemsize
        data = self._shard_of[entry.file].read(entry.start + start * width, entry.start + stop * width)
        return np.frombuffer(data, entry.integer)

    def read_float32(self, name: str) -> npt.NDArray[np.float32]:
        """A whole tensor as float32, in its shape."""
        return to_float32(self.read(name), self.entry(name).dtype)

    def fingerprint(self, name: str) -> str:
        """blake2b-128 over dtype, shape and raw bytes, as hexadecimal digits; see docs/architecture.md."""
        entry = self.entry(name)
        h = start_fingerprint(entry)
        for start in range(entry.start, entry.stop, 4 * PIECE):
            h.update(self._shard_of[entry.file].read(start, min(start + 4 * PIECE, entry.stop)))
        return h.hexdigest()


def start_fingerprint(entry: TensorEntry) -> hashlib.blake2b:
    """The hash state before a tensor's bytes: `f"{dtype}\\0{shape joined by ,}\\0"`."""
    return hashlib.blake2b(f"{entry.dtype}\0{','.join(map(str, entry.shape))}\0".encode(), digest_size=16)


def resolve(reference: str | Path) -> Path:
    """The directory of a checkpoint: a local directory, or a hub id (`owner/name[@revision]`) from the hub's cache.

    A hub id is downloaded when it is not cached, without pickles and code. Raises BadInput when there is neither.
    """
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    text = str(reference)
    if path.exists():
        raise BadInput(f"{text}: a file; give the checkpoint's directory")
    repository, _, revision = text.partition("@")
    if text.startswith(("/", ".", "~")) or repository.count("/") > 1 or not repository:
        raise BadInput(f"{text}: no such directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=HUB_PATTERNS))
    except Exception as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise BadInput(f"{text}: neither a local directory nor a reachable hub model ({reason})") from None


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


def read_shard(path: Path) -> Shard:
    """Read and check the header of a safetensors file. Raises BadInput unless it describes the file exactly."""
    with open(path, "rb") as f:
        identity = _identity(os.fstat(f.fileno()))
        prefix = f.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER, identity[0] - 8):
            raise BadInput(f"{path}: not a safetensors file, or a truncated one (header length {length} bytes)")
        raw = f.read(length)
    header = _parse(path, raw)
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
    return Shard(path, prefix + raw, tuple(entries), identity)


def to_float32(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Values of an integer view (any shape) as float32; `dtype` is the safetensors code.

    Exact except for F64 and integers above 2^24. Raises BadInput for complex numbers and types below a byte.
    """
    if dtype == "BF16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype in ("F8_E4M3", "F8_E5M2", "F8_E8M0"):
        table: npt.NDArray[np.float32] = _fp8_table(dtype)[array]
        return table
    kinds = {"F": "f", "I": "i", "U": "u"}
    if dtype == "BOOL":
        return array.astype(np.float32)
    if dtype[:1] in kinds and dtype[1:].isdigit() and DTYPE_BITS.get(dtype) in _INTEGER:
        values = np.ascontiguousarray(array).view(f"{kinds[dtype[0]]}{DTYPE_BITS[dtype] // 8}")
        return values.astype(np.float32, copy=False)
    raise BadInput(f"values of dtype {dtype} cannot be turned into float32")


@cache
def _fp8_table(dtype: str) -> npt.NDArray[np.float32]:
    """float32 value of each byte, by the OCP 8-bit floating point formats."""
    byte = np.arange(256, dtype=np.uint16)
    if dtype == "F8_E5M2":  # the upper half of an IEEE half float
        return (byte << 8).view(np.float16).astype(np.float32)
    if dtype == "F8_E8M0":  # a bare exponent; 255 is NaN
        return np.where(byte == 255, np.nan, np.ldexp(1.0, byte.astype(np.int32) - 127)).astype(np.float32)
    exponent, mantissa = (byte >> 3 & 15).astype(np.int32), (byte & 7).astype(np.float64)
    magnitude = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), np.ldexp(1 + mantissa / 8, exponent - 7))
    magnitude = np.where((byte & 127) == 127, np.nan, magnitude)  # E4M3 has no infinities and one NaN a sign
    return np.where(byte >= 128, -magnitude, magnitude).astype(np.float32)


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    """A JSON object in which no key occurs twice."""

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


def _read_index(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_HEADER:
        raise BadInput(f"{path}: an index of {path.stat().st_size} bytes; that is no index")
    index = _parse(path, path.read_bytes())
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise BadInput(f"{path}: has no weight_map from tensor names to file names")
    for name in set(weight_map.values()):
        if not name.endswith(".safetensors"):
            raise BadInput(f"{path}: refers to {name!r}; only safetensors files are read")
    return index


def _entry(path: Path, name: str, described: dict[str, Any], data_start: int) -> TensorEntry:
    """One tensor of a header. Raises KeyError, TypeError or ValueError, which `read_shard` words."""
    dtype, shape, (start, stop) = described["dtype"], described["shape"], described["data_offsets"]
    if dtype not in DTYPE_BITS:
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if len(shape) > MAX_RANK or not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, start, stop)):
        raise ValueError(f"tensor {name!r} has the shape {str(shape)[:60]} at {start}:{stop}")
    size_bits = math.prod(shape) * DTYPE_BITS[dtype]
    if size_bits % 8 or size_bits // 8 != stop - start:
        raise ValueError(
            f"tensor {name!r} has {stop - start} bytes where its shape {str(shape)[:60]} needs {size_bits / 8:g}"
        )
    return TensorEntry(name, dtype, tuple(shape), path, data_start + start, data_start + stop)


def _what_else(path: Path) -> str:
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        return (
            "; only safetensors is read: convert the pickled weights with save_pretrained(..., safe_serialization=True)"
        )
    if (path / "adapter_config.json").exists():
        return "; it is an adapter: merge it into its base model first"
    return ""

"""A checkpoint: a directory of safetensors files as named tensors, read piece by piece as integers.

The safetensors library checks the headers; the bytes are read with `pread` at the places that the headers name, because
the streaming of `apply` reads pieces of a tensor into buffers that it reuses, which the library has no door for.
Nothing is memory-mapped; a file that changes between two reads is an error, not a mixture of two checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from safetensors import SafetensorError, safe_open

from mftmerge.dtypes import BY_CODE, Dtype, to_float32
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.files import COMPANIONS, once, read_at, refuse_pointer
from mftmerge.select import Integers

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format itself
MAX_RANK = 16
PIECE = 1 << 20  # bytes hashed at a time

# The same weights again, in another layout: not downloaded.
HUB_IGNORED = ["*/*.safetensors", "consolidated*"]


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
    def element(self) -> Dtype:
        """The tensor's type in the table."""
        return BY_CODE[self.dtype]

    @property
    def integer(self) -> type[np.unsignedinteger[Any]]:
        """numpy type of the integer view (uint8/16/32/64). Raises BadInput for types below a byte."""
        if self.element.integer is None:
            raise BadInput(
                f"{self.file.name}: tensor {self.name!r} has dtype {self.dtype}, whose elements are not bytes"
            )
        return self.element.integer


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
        data = bytearray(stop - start)
        fd = self.open()
        try:
            read_at(fd, memoryview(data), start, self.path)
        finally:
            os.close(fd)
        return data

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


class Checkpoint:
    """A checkpoint directory, opened for reading. All headers are read and checked by `open`; no weight is."""

    def __init__(self, path: Path, shards: tuple[Shard, ...], has_index: bool, follow_links: bool = False) -> None:
        self.path, self.shards, self.has_index, self.follow_links = path, shards, has_index, follow_links
        self._entries = {e.name: e for s in shards for e in s.tensors}
        self._shard_of = {s.path: s for s in shards}

    @classmethod
    def open(cls, path: str | Path, *, follow_links: bool = False) -> Checkpoint:
        """Open a directory holding `model.safetensors` or `model.safetensors.index.json` with its shards.

        As in transformers, the single file wins when both are there. follow_links: see `safe_file`. Raises BadInput for
        anything that is not a sound safetensors checkpoint: an index pointing outside the directory, tensors missing
        from or repeated in the shards, headers that do not describe the file, pickles.
        """
        path = Path(path)
        if not path.is_dir():
            raise BadInput(f"{path}: not a checkpoint directory")
        if (path / SINGLE).exists() or (path / SINGLE).is_symlink():
            real = safe_file(path, SINGLE, follow_links=follow_links)
            return cls(path, (read_shard(real, SINGLE),), False, follow_links)
        if not (path / INDEX).exists():
            raise BadInput(f"{path}: no {SINGLE} or {INDEX} in it{_what_else(path)}")
        weight_map = _read_index(safe_file(path, INDEX, follow_links=follow_links))
        files = {name: safe_file(path, name, follow_links=follow_links) for name in sorted(set(weight_map.values()))}
        shards = tuple(read_shard(real, name) for name, real in files.items())
        home: dict[str, str] = {}
        for shard in shards:
            for entry in shard.tensors:
                if entry.name in home:
                    raise BadInput(f"{path}: tensor {entry.name!r} is in both {home[entry.name]} and {shard.name}")
                home[entry.name] = shard.name
        for tensor, name in weight_map.items():
            if home.get(tensor) != name:
                raise BadInput(f"{path}: {INDEX} says that {tensor!r} is in {name}, but it is not; download it again")
        return cls(path, shards, True, follow_links)

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

    def file(self, name: str) -> Path:
        """The real path of another file of the directory; see `safe_file`."""
        return safe_file(self.path, name, follow_links=self.follow_links)

    def shard_of(self, entry: TensorEntry) -> Shard:
        """The file that holds a tensor."""
        return self._shard_of[entry.file]

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
        """XXH3-128 over dtype, shape and raw bytes, as hexadecimal digits; see docs/architecture.md."""
        entry = self.entry(name)
        shard, edges = self._shard_of[entry.file], range(entry.start, entry.stop, PIECE)
        pieces = (shard.read(start, min(start + PIECE, entry.stop)) for start in edges)
        return fingerprint_of(entry.dtype, entry.shape, pieces)


def fingerprint_of(dtype: str, shape: tuple[int, ...], pieces: Iterable[bytes | bytearray | memoryview]) -> str:
    """The fingerprint of a tensor: safetensors dtype code, shape, and its bytes in order."""
    h = xxhash.xxh3_128(f"{dtype}\0{','.join(map(str, shape))}\0".encode())
    for piece in pieces:
        h.update(piece)
    return h.hexdigest()


def resolve(reference: str | Path) -> Path:
    """The directory of a checkpoint: a local directory, or a hub id (`owner/name[@revision]`) from the hub's cache.

    A hub id is downloaded when it is not cached, without pickles and code. Raises BadInput when there is neither.
    """
    text = str(reference)
    path = Path(reference).expanduser()
    if text and path.is_dir():
        return path
    if text and path.exists():
        raise BadInput(f"{text}: a file; give the checkpoint's directory")
    repository, _, revision = text.partition("@")
    if text.startswith(("/", ".", "~")) or repository.count("/") > 1 or not repository:
        raise BadInput(f"{text or repr(text)}: no such directory")
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=["*.safetensors", *COMPANIONS],
            ignore_patterns=HUB_IGNORED,
        )
        return Path(found)
    except Exception as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise BadInput(f"{text}: neither a local directory nor a reachable hub model ({reason})") from None


def read_config(directory: Path, *, follow_links: bool = False) -> dict[str, Any]:
    """A model directory's config.json, {} where it has none. Raises BadInput unless it is a JSON object."""
    if not (directory / "config.json").exists():
        return {}
    raw = safe_file(directory, "config.json", follow_links=follow_links).read_bytes()
    refuse_pointer(directory / "config.json", raw)
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError):
        raise BadInput(f"{directory}: config.json is not readable JSON; get it again") from None
    if not isinstance(config, dict):
        raise BadInput(f"{directory}: config.json is a {type(config).__name__}, not a JSON object; get it again")
    return config


def safe_file(directory: Path, name: str, *, follow_links: bool = False) -> Path:
    """The real path of a file named inside a checkpoint directory.

    Raises BadInput for absolute names, `..`, anything but a regular file, and links that leave the directory: a
    stranger's checkpoint could have a private file copied into an output that way. Two kinds are allowed: a link from a
    hub cache's `snapshots/` into the same repository's `blobs/`, which is how that cache is made, and all with
    `follow_links`, or MFTMERGE_FOLLOW_LINKS=1 in the environment, for stores of one's own (DVC, Nix).
    """
    if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise BadInput(f"{directory}: refers to the file {name!r}, which is outside the directory")
    root = directory.resolve()
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")
    path = directory / name
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):
        if path.is_symlink():
            target = os.readlink(path)
            raise BadInput(
                f"{directory}: the file {name!r} is missing: it is a link to {target}, where nothing is; fetch it first"
            ) from None
        raise BadInput(f"{directory}: the file {name!r} is missing; the download or copy is incomplete") from None
    allowed = follow_links or os.environ.get("MFTMERGE_FOLLOW_LINKS", "0") not in ("", "0")
    if not allowed and not any(real.is_relative_to(r) for r in roots):
        raise BadInput(
            f"{directory}: the file {name!r} is a link that leads outside the directory, to {real}; if it is your own, "
            "set MFTMERGE_FOLLOW_LINKS=1 (apply: --follow-links)"
        )
    if not stat.S_ISREG(real.stat().st_mode):
        raise BadInput(f"{directory}: {name!r} is not a regular file")
    return real


def read_shard(path: Path, name: str | None = None) -> Shard:
    """Read and check the header of a safetensors file. Raises BadInput unless it describes the file exactly.

    The library checks types, shapes, gaps, overlaps and the file's size; here, what it lets pass: a key given twice
    (JSON readers disagree on which one counts). name: what the checkpoint calls the file, when a link leads to `path`.
    """
    with open(path, "rb") as f:
        identity = _identity(os.fstat(f.fileno()))
        prefix = f.read(8)
        refuse_pointer(path, prefix)  # read as a length it would be an absurd one
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER, identity[0] - 8):
            raise BadInput(f"{path}: not a safetensors file, or a truncated one (header length {length} bytes)")
        raw = f.read(length)
    header = parse_json(path, raw)
    header.pop("__metadata__", None)
    try:
        with safe_open(path, framework="numpy", backend="pread") as sound:  # not mapped: a file cut short would kill us
            names = sound.offset_keys()
        entries = tuple(_entry(path, n, header[n], 8 + length) for n in names)
    except (SafetensorError, KeyError, OSError) as e:
        reason = " ".join(str(e).split())[:200]
        raise BadInput(
            f"{path}: unsound safetensors file, truncated or altered ({reason}); download it again"
        ) from None
    digest = hashlib.blake2b(raw, digest_size=16).hexdigest()
    return Shard(name or path.name, path, 8 + length, digest, entries, identity)


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    """A JSON object in which no key occurs twice. Raises BadInput for anything else."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as e:
        if isinstance(e, BadInput):
            raise BadInput(f"{path}: {e}") from None
        raise BadInput(f"{path}: unreadable JSON ({str(e)[:100]}); download it again") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: its JSON is not an object; download it again")
    return value


def _entry(path: Path, name: str, described: dict[str, Any], data_start: int) -> TensorEntry:
    """One tensor of a header that the library found sound."""
    dtype, shape, (start, stop) = described["dtype"], described["shape"], described["data_offsets"]
    if len(shape) > MAX_RANK:
        raise BadInput(f"{path}: tensor {name!r} has {len(shape)} dimensions; at most {MAX_RANK} are read")
    # Interned and shared: a checkpoint of single experts has tens of thousands of tensors and few types and shapes.
    return TensorEntry(name, BY_CODE[dtype].code, _shared(tuple(shape)), path, data_start + start, data_start + stop)


@lru_cache(1024)
def _shared(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape


def _read_index(path: Path) -> dict[str, str]:
    if path.stat().st_size > MAX_HEADER:
        raise BadInput(f"{path}: an index of {path.stat().st_size} bytes; that is no index")
    raw = path.read_bytes()
    refuse_pointer(path, raw)
    index = parse_json(path, raw)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise BadInput(f"{path}: has no weight_map from tensor names to file names")
    for name in set(weight_map.values()):
        if not name.endswith(".safetensors"):
            raise BadInput(f"{path}: refers to {name!r}; only safetensors files are read")
        if Path(name).name != name:
            raise BadInput(f"{path}: refers to {name!r}; shards must lie in the checkpoint's own directory")
    return weight_map


def _what_else(path: Path) -> str:
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        return (
            "; only safetensors is read: convert the pickled weights with save_pretrained(..., safe_serialization=True)"
        )
    if (path / "adapter_config.json").exists():
        return "; it is an adapter: merge it into its base model first"
    return ""

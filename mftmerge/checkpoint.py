"""A Hugging Face checkpoint directory as named tensors, read piece by piece as integers (numpy, safetensors only)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from mftmerge.dtypes import BY_CODE, BY_NAME
from mftmerge.errors import BadInput
from mftmerge.select import Integers
from mftmerge.shard import MAX_HEADER, Shard, TensorEntry, parse_json, read_shard, safe_file

__all__ = ["Checkpoint", "Shard", "TensorEntry", "resolve", "to_float32"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Types that numpy has under the name that torch gives them.
NUMPY_TYPES = {n for n, d in BY_NAME.items() if n in np.sctypeDict and d.kind != "complex"}
PIECE = 1 << 20  # bytes hashed at a time

# What a hub download may contain: no pickles and no code.
HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.md", "LICENSE*", "NOTICE*"]
HUB_IGNORED = ["*/*.safetensors", "consolidated*"]  # the same weights again, in another layout


class Checkpoint:
    """A checkpoint directory, opened for reading. All headers are read and checked by `open`; no weight is."""

    def __init__(self, path: Path, shards: tuple[Shard, ...], has_index: bool) -> None:
        self.path, self.shards, self.has_index = path, shards, has_index
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
            return cls(path, (read_shard(safe_file(path, SINGLE), SINGLE),), False)
        if not (path / INDEX).exists():
            raise BadInput(f"{path}: no {SINGLE} or {INDEX} in it{_what_else(path)}")
        weight_map = _read_index(safe_file(path, INDEX))
        shards = tuple(read_shard(safe_file(path, name), name) for name in sorted(set(weight_map.values())))
        home: dict[str, str] = {}
        for shard in shards:
            for entry in shard.tensors:
                if entry.name in home:
                    raise BadInput(f"{path}: tensor {entry.name!r} is in both {home[entry.name]} and {shard.name}")
                home[entry.name] = shard.name
        for tensor, name in weight_map.items():
            if home.get(tensor) != name:
                raise BadInput(f"{path}: {INDEX} says that {tensor!r} is in {name}, but it is not; download it again")
        return cls(path, shards, True)

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
        h = start_fingerprint(entry)
        for start in range(entry.start, entry.stop, PIECE):
            h.update(self._shard_of[entry.file].read(start, min(start + PIECE, entry.stop)))
        return h.hexdigest()


def start_fingerprint(entry: TensorEntry) -> xxhash.xxh3_128:
    """The hash state before a tensor's bytes: `f"{dtype}\\0{shape joined by ,}\\0"`."""
    return xxhash.xxh3_128(f"{entry.dtype}\0{','.join(map(str, entry.shape))}\0".encode())


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
            repository, revision=revision or None, allow_patterns=HUB_PATTERNS, ignore_patterns=HUB_IGNORED
        )
        return Path(found)
    except Exception as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise BadInput(f"{text}: neither a local directory nor a reachable hub model ({reason})") from None


def to_float32(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Values of an integer view (any shape) as float32; `dtype` is the safetensors code.

    Exact except for F64 and integers above 2^24. Raises BadInput for complex numbers and types below a byte.
    """
    if dtype == "BF16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype in ("F8_E4M3", "F8_E5M2", "F8_E8M0"):
        table: npt.NDArray[np.float32] = _fp8_table(dtype)[array]
        return table
    found = BY_CODE.get(dtype)
    if found is not None and found.name in NUMPY_TYPES:
        return np.ascontiguousarray(array).view(found.name).astype(np.float32, copy=False)
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


def _read_index(path: Path) -> dict[str, str]:
    if path.stat().st_size > MAX_HEADER:
        raise BadInput(f"{path}: an index of {path.stat().st_size} bytes; that is no index")
    index = parse_json(path, path.read_bytes())
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

"""A patch on disk: a safetensors file of what changes between two states of one checkpoint, tensor by tensor.

Each changed tensor has its fingerprint before and after, and streams of packed bits: the positions that change and,
unless the receiver has them, the values. Everything that a file says is checked before it is used; no pickle, no code.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mftmerge import bits, rice
from mftmerge.checkpoint import MAX_HEADER, parse_json, read_shard
from mftmerge.dtypes import BY_CODE
from mftmerge.errors import BadInput
from mftmerge.files import refuse_existing, replacing
from mftmerge.maskheader import LARGEST_TENSOR, crc

KEY, CRC_KEY = "mftmerge_patch", "mftmerge_patch_crc32"
FORMAT = 1
Print = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class Strict(BaseModel):
    """What a header says, checked."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Coded(Strict):
    """Numbers in two streams, `NAME.u` and `NAME.r`: how many, and the Rice parameter."""

    count: int = Field(ge=0, le=LARGEST_TENSOR)
    k: int = Field(ge=0, le=rice.LARGEST_K)


class Change(Strict):
    """One tensor. before, after: fingerprints. positions: of the flattened tensor.

    values: how the values are kept. "steps": Rice-coded differences of the numbers' order; "xor": old ^ new as they
    are; "base": not at all: at each position the value of the base or of what masks drop to, whichever is not there.
    Of such a tensor `positions` are places among the weights that are kept (have the base's value), and `dropped`
    places among the others; inverted: `dropped` says which of them do not change.
    base, other: with "base", fingerprints of the two tensors whose values are meant; other None: 0.
    """

    dtype: str
    shape: list[Annotated[int, Field(ge=0, le=LARGEST_TENSOR)]] = Field(max_length=16)
    before: Print
    after: Print
    positions: Coded
    values: Literal["steps", "xor", "base"]
    steps: Coded | None = None
    dropped: Coded | None = None
    inverted: bool = False
    base: Print | None = None
    other: Print | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Header(Strict):
    """Everything that a patch says beside the streams. source, target: what it leads from and to, in words."""

    format: Literal[1] = 1  # FORMAT
    source: str
    target: str
    tensors: dict[str, Change]


@dataclass
class Patch:
    """A patch in memory: its header, and its streams by name."""

    header: Header
    streams: dict[str, bits.Packed] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the streams."""
        return sum(stream.nbytes for stream in self.streams.values())

    @property
    def needs_base(self) -> bool:
        """Whether the values are not in the patch."""
        return any(change.values == "base" for change in self.header.tensors.values())

    def numbers(self, name: str, coded: Coded) -> rice.Numbers:
        """The numbers of a stream. Raises BadInput where it is damaged."""
        return rice.decode(self.streams[f"{name}.u"], self.streams[f"{name}.r"], coded.count, coded.k)

    def put(self, name: str, numbers: rice.Numbers) -> Coded:
        """Add a stream of numbers."""
        k = rice.best_k(numbers)
        self.streams[f"{name}.u"], self.streams[f"{name}.r"] = rice.encode(numbers, k)
        return Coded(count=len(numbers), k=k)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the file, whole or not at all."""
        refuse_existing(path, overwrite)
        text = json.dumps(self.header.model_dump(mode="json", exclude_defaults=True) | {"format": FORMAT})
        with replacing(path) as beside:
            save_file(self.streams, beside, {KEY: text, CRC_KEY: crc(text)})

    @classmethod
    def load(cls, path: str | Path) -> Patch:
        """Read a file. Raises BadInput for anything that is no sound patch."""
        path = Path(path)
        if not path.is_file():
            raise BadInput(f"{path}: no such file")
        shard = read_shard(path)
        if any(e.dtype != "U8" or len(e.shape) != 1 for e in shard.tensors):
            raise BadInput(f"{path}: not a patch (its streams should be bytes)")
        header = _header(path)
        try:
            streams = {e.name: np.frombuffer(shard.read(e.start, e.stop), np.uint8) for e in shard.tensors}
            patch = cls(header, streams)
            wanted = {s for name, change in header.tensors.items() for s in _streams(name, change)}
            if wanted != set(streams):
                raise BadInput("its streams are not those that its header names")
            for name, change in header.tensors.items():
                _check(change, patch, name)
        except BadInput as e:
            raise BadInput(f"{path}: damaged ({e}); get the patch again") from None
        return patch


def _header(path: Path) -> Header:
    try:
        with safe_open(path, framework="numpy", backend="pread") as file:
            metadata: dict[str, object] = file.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise BadInput(f"{path}: not a safetensors file ({' '.join(str(e).split())[:200]})") from None
    text = metadata.get(KEY)
    if not isinstance(text, str) or len(text) > MAX_HEADER:
        raise BadInput(f"{path}: a safetensors file, but not a patch of mftmerge")
    if metadata.get(CRC_KEY) != crc(text):
        raise BadInput(f"{path}: the patch's header is damaged (its CRC-32 differs); get the patch again")
    values = parse_json(path, text.encode("utf-8", "surrogatepass"))
    if values.get("format") != FORMAT:
        raise BadInput(f"{path}: format {str(values.get('format'))[:20]}, this program reads {FORMAT}; update mftmerge")
    try:
        return Header.model_validate(values)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))[:100]
        raise BadInput(f"{path}: the patch's header is wrong: {where}: {first['msg']}") from None


def _streams(name: str, change: Change) -> list[str]:
    found = [f"{name}.positions.u", f"{name}.positions.r"]
    if change.values == "base":
        found += [f"{name}.dropped.u", f"{name}.dropped.r"]
    return (
        found
        + ([f"{name}.steps.u", f"{name}.steps.r"] if change.values == "steps" else [])
        + ([f"{name}.xor"] if change.values == "xor" else [])
    )


def _check(change: Change, patch: Patch, name: str) -> None:
    """What the schema does not say. Raises BadInput."""
    dtype = BY_CODE.get(change.dtype)
    if dtype is None or dtype.integer is None:
        raise BadInput(f"tensor {name[:200]!r} has dtype {change.dtype[:20]!r}")
    if change.size > LARGEST_TENSOR or change.positions.count > change.size:
        raise BadInput(f"tensor {name[:200]!r} has no such shape")
    if (change.values == "steps") != (change.steps is not None) or (change.values == "base") != (
        change.dropped is not None and change.base is not None
    ):
        raise BadInput(f"tensor {name[:200]!r}: its streams do not go with values {change.values!r}")
    if change.steps is not None and (change.steps.count != change.positions.count or dtype.bits > 32):
        raise BadInput(f"tensor {name[:200]!r}: {change.steps.count} values at {change.positions.count} positions")
    if change.values == "xor" and len(patch.streams[f"{name}.xor"]) != change.positions.count * dtype.nbytes:
        raise BadInput(f"tensor {name[:200]!r}: its values do not fit its positions")

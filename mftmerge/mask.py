"""`Mask`: one bit a weight (1 = keep) for each covered tensor, and what is known about where it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mftmerge import bits
from mftmerge.errors import BadInput


@dataclass(frozen=True)
class Parent:
    """One input of a combination: the file's name, the mask's digest, and its own history."""

    name: str
    digest: str
    weight: float | None = None
    operation: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    parents: tuple[Parent, ...] = ()


@dataclass(frozen=True)
class MaskInfo:
    """Where a mask came from.

    keep: share of weights kept that was asked for (None where it follows from an operation).
    base: reference of the base model (path or hub id), `fingerprints`: per covered tensor, see `checkpoint.fingerprint`.
    training: settings, seed, init, steps, data digest, validation losses; comparison: what `--control` measured.
    operation, options, parents: for a combined mask.
    """

    keep: float | None = None
    base: str | None = None
    fingerprints: dict[str, str] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    comparison: dict[str, Any] = field(default_factory=dict)
    operation: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    parents: tuple[Parent, ...] = ()


class Mask:
    """A mask over named tensors. `names` are checkpoint names; a tensor that is not named is not covered."""

    def __init__(
        self,
        packed: Mapping[str, bits.Packed],
        shapes: Mapping[str, tuple[int, ...]],
        info: MaskInfo | None = None,
        scores: Mapping[str, npt.NDArray[np.float32]] | None = None,
    ) -> None:
        self._packed, self._shapes = dict(packed), {k: tuple(v) for k, v in shapes.items()}
        self._scores = dict(scores or {})
        self.info = info or MaskInfo()

    @classmethod
    def from_bools(
        cls,
        kept: Mapping[str, npt.NDArray[np.bool_]],
        info: MaskInfo | None = None,
        scores: Mapping[str, npt.NDArray[np.float32]] | None = None,
    ) -> Mask:
        """Make a mask from one boolean array a tensor (True = keep)."""
        return cls({k: bits.pack(v) for k, v in kept.items()}, {k: v.shape for k, v in kept.items()}, info, scores)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the covered tensors, sorted."""
        return tuple(sorted(self._packed))

    def __contains__(self, name: object) -> bool:
        return name in self._packed

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def size(self, name: str) -> int:
        return int(np.prod(self._shapes[name], dtype=np.int64))

    def packed(self, name: str) -> bits.Packed:
        """All the bits of a tensor, packed, shape (ceil(size / 8),)."""
        return self._packed[name]

    def read(self, name: str, start: int, stop: int) -> bits.Packed:
        """Packed bits [start, stop) of a tensor; start must be a multiple of 8."""
        return self._packed[name][start // 8 : bits.nbytes(stop)]

    def kept(self, name: str) -> npt.NDArray[np.bool_]:
        """Boolean array of the tensor's shape, True where the weight is kept."""
        return bits.unpack(self.packed(name), self.size(name)).reshape(self.shape(name))

    def count(self, name: str) -> int:
        """Number of weights kept in a tensor."""
        return bits.count(self.packed(name))

    def density(self, name: str | None = None) -> float:
        """Share of weights kept, in one tensor or over all covered tensors (an empty mask has density 1)."""
        names = self.names if name is None else (name,)
        total = sum(map(self.size, names))
        return sum(map(self.count, names)) / total if total else 1.0

    @property
    def has_scores(self) -> bool:
        return bool(self._scores)

    def scores(self, name: str) -> npt.NDArray[np.float32]:
        """float32 scores of a tensor, its shape."""
        return self._scores[name]

    @property
    def digest(self) -> str:
        """Hash of the covered names, shapes and bits (not of the header): equal masks have equal digests."""
        h = hashlib.blake2b(digest_size=16)
        for n in self.names:
            h.update(f"{n}\0{self.shape(n)}\0".encode())
            h.update(self.packed(n).tobytes())
        return h.hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Open a .mask file. Raises BadInput on anything that is not one."""
        from mftmerge.maskfile import load

        return load(path)

    def save(self, path: str | Path, *, archive: bool = False) -> None:
        """Write a .mask file, whole or not at all."""
        from mftmerge.maskfile import save

        save(self, path, archive=archive)


def require_same_shape(name: str, a: tuple[int, ...], b: tuple[int, ...], what: str) -> None:
    """Raise BadInput unless two shapes agree."""
    if tuple(a) != tuple(b):
        raise BadInput(f"{what}: tensor {name!r} has shape {tuple(b)}, the mask has {tuple(a)}")

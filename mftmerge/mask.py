"""`Mask`: one bit a weight (1 = keep) for each covered tensor, and what is known about where it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from mftmerge import bits, maskfile, notebook, plots
from mftmerge.errors import BadInput
from mftmerge.inspection import Inspection, inspect_store
from mftmerge.maskstore import PIECE, Arrays, MaskInfo, Parent, Scores, Store, combined, require_one_kind
from mftmerge.names import layer_of, module_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["PIECE", "Mask", "MaskInfo", "Parent", "Scores", "require_same_shape"]


class Mask:
    """A mask over named tensors. `names` are checkpoint names; a tensor that is not named is not covered.

    packed: uint8 arrays of ceil(size / 8) bytes, little bit order, padding bits 0. scores, initial: float32 arrays of
    the tensors' shapes (for all covered tensors or none). Raises BadInput where these do not fit together.
    """

    def __init__(
        self,
        packed: Mapping[str, bits.Packed],
        shapes: Mapping[str, tuple[int, ...]],
        info: MaskInfo | None = None,
        scores: Mapping[str, Scores] | None = None,
        initial: Mapping[str, Scores] | None = None,
    ) -> None:
        self._store: Store = Arrays(packed, shapes, scores, initial)
        self.info = info or MaskInfo()
        self._digest: str | None = None

    @classmethod
    def from_store(cls, store: Store, info: MaskInfo) -> Mask:
        """A mask whose tensors are read from `store` when they are asked for."""
        mask = cls({}, {}, info)
        mask._store = store
        return mask

    @classmethod
    def from_bools(
        cls,
        kept: Mapping[str, npt.NDArray[np.bool_]],
        info: MaskInfo | None = None,
        scores: Mapping[str, Scores] | None = None,
        initial: Mapping[str, Scores] | None = None,
    ) -> Mask:
        """Make a mask from one boolean array a tensor (True = keep)."""
        packed = {k: bits.pack(v) for k, v in kept.items()}
        return cls(packed, {k: v.shape for k, v in kept.items()}, info, scores, initial)

    @property
    def path(self) -> Path | None:
        """The file that the mask is read from, None for one in memory."""
        return self._store.path if isinstance(self._store, maskfile.MaskFile) else None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the covered tensors, sorted."""
        return self._store.names

    def __contains__(self, name: object) -> bool:
        return name in self._store.shapes

    def __len__(self) -> int:
        """Number of covered tensors."""
        return len(self._store.shapes)

    def __bool__(self) -> bool:
        return True  # a mask that covers nothing is a mask

    def __iter__(self) -> Iterator[str]:
        """Names of the covered tensors, sorted."""
        return iter(self.names)

    def __getitem__(self, name: str) -> npt.NDArray[np.bool_]:
        """As `kept`. KeyError where the mask does not cover the tensor."""
        return self.kept(name)

    def __eq__(self, other: object) -> bool:
        """Whether the same tensors are covered and the same weights kept; provenance and scores do not count."""
        return self.digest == other.digest if isinstance(other, Mask) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[type[Mask], tuple[object, ...]]:
        """A copy or a pickle holds the bits and scores themselves, also those of a file."""
        packed, shapes = {n: self.packed(n) for n in self}, {n: self.shape(n) for n in self}
        scores = {n: self.scores(n) for n in self if self.has_scores}
        initial = {n: self.initial_scores(n) for n in self if self.has_initial_scores}
        return type(self), (packed, shapes, self.info, scores, initial)

    def __repr__(self) -> str:
        return f"Mask({self._facts()})"

    def _repr_html_(self) -> str:
        """In a notebook: what `repr` says, and the density of each module."""
        sums: dict[str, list[int]] = {}
        for name in self:
            here = sums.setdefault(module_of(name), [0, 0])
            sums[module_of(name)] = [here[0] + self.count(name), here[1] + self.size(name)]
        rows = [[m, f"{s:,}", f"{k / s if s else 1:.4f}"] for m, (k, s) in sums.items()]
        return notebook.table(["module", "weights", "density"], rows, f"Mask: {self._facts()}")

    def _facts(self) -> str:
        info = self.info
        words = [f"{len(self)} tensors", f"{sum(map(self.size, self)):,} weights", f"density {self.density():.4f}"]
        words += [info.operation] if info.operation else []
        words += [f"base {info.base!r}"] if info.base else []
        words += [f"on the delta from {info.delta_base!r}"] if info.on == "delta" else []
        return ", ".join(words)

    def __and__(self, other: Mask) -> Mask:
        """What both keep, as the operation `intersection`: where one covers a tensor alone, what that one keeps."""
        return self._with(other, "intersection", np.bitwise_and)

    def __or__(self, other: Mask) -> Mask:
        """What either keeps, as the operation `union`: where one covers a tensor alone, what that one keeps."""
        return self._with(other, "union", np.bitwise_or)

    def __xor__(self, other: Mask) -> Mask:
        """What one of the two keeps, as the operation `xor`: where one covers a tensor alone, what that one keeps."""
        return self._with(other, "xor", np.bitwise_xor)

    def __invert__(self) -> Mask:
        """What this mask drops, as the operation `complement`."""
        packed = {n: bits.clear_padding(~self.packed(n), self.size(n)) for n in self}
        return self._made(packed, {n: self.shape(n) for n in self}, "complement", (self,))

    def _with(self, other: Mask, operation: str, rule: np.ufunc) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        require_one_kind({"one mask": self.info, "the other": other.info})
        packed, shapes = {}, {}
        for name in sorted({*self, *other}):
            owners = [mask for mask in (self, other) if name in mask]
            shapes[name] = owners[0].shape(name)
            if len(owners) == 2:
                require_same_shape(name, shapes[name], other.shape(name), "the other mask")
            parts = [mask.packed(name) for mask in owners]
            packed[name] = rule(*parts) if len(parts) == 2 else parts[0]
        return self._made(packed, shapes, operation, (self, other))

    def _made(
        self,
        packed: dict[str, bits.Packed],
        shapes: dict[str, tuple[int, ...]],
        operation: str,
        masks: tuple[Mask, ...],
    ) -> Mask:
        parents = [
            Parent(f"mask {i}", m.digest, None, m.info.operation, m.info.options, m.info.parents)
            for i, m in enumerate(masks, 1)
        ]
        return Mask(packed, shapes, combined([m.info for m in masks], shapes, operation, {}, parents)[0])

    def inspect(self) -> Inspection:
        """Density by layer and module, provenance and more; reads and checks every bit. Raises BadInput."""
        return inspect_store(self._store, self.info, str(self.path or "mask in memory"))

    def plot(self, path: str | Path | None = None) -> Figure:
        """A matplotlib figure of the density by layer and module; also written to `path` (.png, .svg, .pdf)."""
        figure = plots.density_by_layer(self.inspect())
        if path is not None:
            plots.save(figure, path)
        return figure

    def to_frame(self) -> DataFrame:
        """A pandas table with a row a tensor: layer, module, shape, weights, kept, density; the index is its name."""
        from pandas import DataFrame

        rows = {
            n: (layer_of(n), module_of(n), self.shape(n), self.size(n), self.count(n), self.density(n)) for n in self
        }
        columns = ["layer", "module", "shape", "weights", "kept", "density"]
        return DataFrame.from_dict(rows, orient="index", columns=columns)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a covered tensor; KeyError where the mask does not cover it."""
        return self._store.shapes[name]

    def size(self, name: str) -> int:
        """Number of weights in a covered tensor."""
        return self._store.size(name)

    def packed(self, name: str) -> bits.Packed:
        """All the bits of a tensor, packed, shape (ceil(size / 8),)."""
        packed = self.read(name, 0, self.size(name))
        self.verify(name, bits.check(packed))
        return packed

    def read(self, name: str, start: int, stop: int) -> bits.Packed:
        """Packed bits [start, stop) of a tensor, uint8; start must be a multiple of 8. Of a file only that is read."""
        size = self.size(name)
        if start % 8 or not 0 <= start <= stop:
            raise ValueError(f"cannot read bits [{start}, {stop}): start must be a multiple of 8 and not after stop")
        return self._store.read(name, start, min(stop, size))

    def pieces(self, name: str, nbytes: int = PIECE) -> Iterator[bits.Packed]:
        """The packed bits of a tensor in order, `nbytes` (a multiple of 8) at a time.

        Raises BadInput at the end where a file's bits are not those that were written.
        """
        return self._store.pieces(name, nbytes)

    def verify(self, name: str, check: int) -> None:
        """Compare `bits.check` of a whole tensor with the one in the file; BadInput where the file is damaged."""
        self._store.verify(name, check)

    def kept(self, name: str) -> npt.NDArray[np.bool_]:
        """Boolean array of the tensor's shape, True where the weight is kept."""
        return bits.unpack(self.packed(name), self.size(name)).reshape(self.shape(name))

    def count(self, name: str) -> int:
        """Number of weights kept in a tensor; of a file, what its header says."""
        return self._store.count(name)

    def density(self, name: str | None = None) -> float:
        """Share of weights kept, in one tensor or over all covered tensors (an empty mask has density 1)."""
        names = self.names if name is None else (name,)
        total = sum(map(self.size, names))
        return sum(map(self.count, names)) / total if total else 1.0

    @property
    def has_scores(self) -> bool:
        return self._store.has_scores

    @property
    def has_initial_scores(self) -> bool:
        return self._store.has_initial_scores

    def scores(self, name: str) -> Scores:
        """float32 scores of a tensor after training, its shape. KeyError without scores."""
        return self.read_scores(name, 0, self.size(name)).reshape(self.shape(name))

    def initial_scores(self, name: str) -> Scores:
        """float32 scores of a tensor before training, its shape. KeyError without them."""
        return self.read_initial_scores(name, 0, self.size(name)).reshape(self.shape(name))

    def read_scores(self, name: str, start: int, stop: int) -> Scores:
        """Scores [start, stop) of a tensor in C order, shape (stop - start,)."""
        return self._store.read_scores(name, start, stop)

    def read_initial_scores(self, name: str, start: int, stop: int) -> Scores:
        """Scores before training [start, stop) of a tensor in C order, shape (stop - start,)."""
        return self._store.read_initial(name, start, stop)

    def verify_scores(self, name: str) -> None:
        """Read a tensor's scores through and compare their check sums; BadInput where the file is damaged."""
        self._store.verify_scores(name)

    @property
    def digest(self) -> str:
        """blake2b (16 bytes, hex) of the covered names, shapes and bits: equal masks have equal digests.

        The provenance in the header and the scores do not count. Taken from a file's header where it is there.
        """
        if self._digest is None:
            self._digest = self._store.digest()
        return self._digest

    @classmethod
    def of(cls, mask: Mask | str | Path) -> Mask:
        """The mask itself, or the one in a file."""
        return mask if isinstance(mask, Mask) else cls.load(mask)

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Open a .mask file; bits and scores are read when asked for. Raises BadInput on anything that is not one."""
        file = maskfile.MaskFile(path)
        return cls.from_store(file, file.info)

    def save(
        self,
        path: str | Path,
        *,
        archive: bool = False,
        scores: Literal["embed", "sidecar", "none"] = "embed",
        overwrite: bool = True,
    ) -> None:
        """Write a .mask file, whole or not at all.

        archive: compress the bits. scores: in the same file, in `<name>.scores.safetensors` beside it, or not at all.
        """
        maskfile.save(self._store, self.info, path, archive=archive, scores=scores, overwrite=overwrite)


def require_same_shape(name: str, a: tuple[int, ...], b: tuple[int, ...], what: str) -> None:
    """Raise BadInput unless two shapes agree."""
    if tuple(a) != tuple(b):
        raise BadInput(f"{what}: tensor {name!r} has shape {tuple(b)}, the mask has {tuple(a)}")

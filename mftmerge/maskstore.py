"""What a mask is made of: where it came from (`MaskInfo`), and a store of its tensors' bits and scores (`Store`).

Lowest of the mask's modules: `maskfile` has the store that reads a file, `mask` the `Mask` that people use.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mftmerge import bits
from mftmerge.errors import BadInput

Scores = npt.NDArray[np.float32]
PIECE = 1 << 18  # bytes of packed bits that are handled at a time where a whole tensor is not needed


# -- where a mask came from -------------------------------------------------------------------------------------------


def plain(value: object) -> Any:
    """A value as JSON has it: numpy's numbers as Python's, tuples as lists, NaN and infinities null, all else text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


Facts = dict[str, Any]  # whatever a trainer or an operation has to say: only its author knows the types


@dataclass(frozen=True)
class Parent:
    """One input of a combination: the file's name, the mask's digest, and its own history.

    forgotten: how many ancestors of it are not recorded, see `remembered`.
    """

    name: str
    digest: str
    weight: float | None = None
    operation: str | None = None
    options: Facts = field(default_factory=dict)
    parents: tuple[Parent, ...] = ()
    forgotten: int = 0


@dataclass(frozen=True)
class MaskInfo:
    """Where a mask came from. In the file it is this class's JSON, without what is as by default.

    keep: share of weights kept that was asked for (None where it follows from an operation).
    base: reference of the base model (path or hub id), the model that the mask was learnt over and whose weights it
    keeps; fingerprints: one per covered tensor, of the base's weights.
    training: settings, seed, init, steps, data digest, validation losses; comparison: what `--control` measured.
    operation, options, parents: for a combined mask.
    on: what a dropped weight becomes: 0 ("weights"), or its value in another model ("delta": the mask keeps changes).
    delta_base: reference of that other model; delta_fingerprints: one per covered tensor, of its weights.
    """

    keep: float | None = None
    base: str | None = None
    fingerprints: dict[str, str] = field(default_factory=dict)
    training: Facts = field(default_factory=dict)
    comparison: Facts = field(default_factory=dict)
    operation: str | None = None
    options: Facts = field(default_factory=dict)
    parents: tuple[Parent, ...] = ()
    on: Literal["weights", "delta"] = "weights"
    delta_base: str | None = None
    delta_fingerprints: dict[str, str] = field(default_factory=dict)

    def family(self) -> Iterator[tuple[int, Parent]]:
        """The mask's ancestors with their generation, from 1: each before its own parents, as a tree is drawn."""
        waiting = [(1, p) for p in reversed(self.parents)]
        while waiting:
            generation, parent = waiting.pop()
            yield generation, parent
            waiting += [(generation + 1, p) for p in reversed(parent.parents)]


DEEPEST_FAMILY = 64  # generations of ancestors that a header holds
LARGEST_FAMILY = 4096  # ancestors in it: masks that are combined with their own ancestors double them each time
MOST_FORGOTTEN = 1 << 62  # that, or more


def remembered(parents: Sequence[Parent]) -> tuple[Parent, ...]:
    """The parents with as many generations of ancestors as a header holds; the youngest, and all of a generation.

    Where more are known, the last ones that are recorded say how many are `forgotten`.
    """
    counts: dict[int, int] = {}

    def ancestors(parent: Parent) -> int:  # of a tree in which one object may stand in many places
        if id(parent) not in counts:
            counts[id(parent)] = parent.forgotten + sum(1 + ancestors(p) for p in parent.parents)
        return counts[id(parent)]

    generations, total, generation = 0, 0, list(parents)
    while generation and generations < DEEPEST_FAMILY and total + len(generation) <= LARGEST_FAMILY:
        generations, total = generations + 1, total + len(generation)
        generation = [p for parent in generation for p in parent.parents]

    def down_to(parent: Parent, left: int) -> Parent:
        if not left:
            return replace(parent, parents=(), forgotten=min(ancestors(parent), MOST_FORGOTTEN))
        return replace(parent, parents=tuple(down_to(p, left - 1) for p in parent.parents))

    return tuple(down_to(p, max(0, generations - 1)) for p in parents) if generation else tuple(parents)


def combined(
    infos: Sequence[MaskInfo],
    covered: Container[str],
    operation: str,
    options: dict[str, object],
    parents: Sequence[Parent],
    keep: float | None = None,
) -> tuple[MaskInfo, list[str]]:
    """What a combination's header says, and notes: what is common to the inputs, the operation, the inputs as parents.

    infos: of the inputs, all on weights or all on a delta. covered: the result's tensors.
    """
    notes = []
    found: dict[str, str | None] = {}
    for what, bases in (("bases", {i.base for i in infos}), ("bases of the delta", {i.delta_base for i in infos})):
        named = sorted(b for b in bases if b is not None)
        found[what] = named[0] if len(named) == 1 else None
        notes += [f"masks name different {what}: {', '.join(named)}"] if len(named) > 1 else []
    fingerprints, differing = _common([i.fingerprints for i in infos], covered)
    delta_fingerprints, _ = _common([i.delta_fingerprints for i in infos], covered)
    if differing:
        notes.append(f"{differing} tensors had different base weights when the masks were made")
    info = MaskInfo(
        keep=keep,
        base=found["bases"],
        fingerprints=fingerprints,
        operation=operation,
        options=options,
        parents=remembered(parents),
        on=infos[0].on,
        delta_base=found["bases of the delta"],
        delta_fingerprints=delta_fingerprints,
    )
    return info, notes


def _common(given: Sequence[dict[str, str]], covered: Container[str]) -> tuple[dict[str, str], int]:
    """Fingerprints of covered tensors on which all agree that have one, and for how many tensors they do not."""
    found: dict[str, str] = {}
    differing: set[str] = set()
    for prints in given:
        for name, value in prints.items():
            if name in covered and found.setdefault(name, value) != value:
                differing.add(name)
    return {n: v for n, v in found.items() if n not in differing}, len(differing)


def require_one_kind(infos: Mapping[str, MaskInfo]) -> None:
    """Raise BadInput for masks over weights with masks over a delta: kept weights and kept changes do not combine."""
    kinds = {info.on: label for label, info in infos.items()}
    if len(kinds) > 1:
        raise BadInput(
            f"{kinds['delta']} keeps changes from another model (on: delta), {kinds['weights']} keeps weights; "
            "they do not combine: apply one, then the other"
        )


# -- its tensors ------------------------------------------------------------------------------------------------------


class Store(ABC):
    """Where a mask's tensors are: arrays in memory, or a file that is read piece by piece."""

    shapes: Mapping[str, tuple[int, ...]]
    has_scores: bool
    has_initial_scores: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the covered tensors, sorted."""
        return tuple(sorted(self.shapes))

    def size(self, name: str) -> int:
        """Number of weights in a covered tensor."""
        return math.prod(self.shapes[name])

    @abstractmethod
    def count(self, name: str) -> int:
        """Number of weights kept in a tensor; of a file, what its header says."""

    @abstractmethod
    def read(self, name: str, start: int, stop: int) -> bits.Packed:
        """Packed bits [start, stop) of a tensor, uint8; start is a multiple of 8."""

    @abstractmethod
    def read_scores(self, name: str, start: int, stop: int) -> Scores:
        """Scores [start, stop) of a tensor in C order, shape (stop - start,)."""

    @abstractmethod
    def read_initial(self, name: str, start: int, stop: int) -> Scores:
        """Scores before training, as `read_scores`."""

    def verify(self, name: str, check: int) -> None:  # noqa: B027 - arrays in memory have nothing to compare with
        """Compare `bits.check` of a whole tensor with the recorded one, where there is one. Raises BadInput."""

    def verify_scores(self, name: str) -> None:  # noqa: B027
        """Read a tensor's scores through and compare their check sums, where there are any. Raises BadInput."""

    def pieces(self, name: str, nbytes: int = PIECE) -> Iterator[bits.Packed]:
        """The packed bits of a tensor in order, `nbytes` (a multiple of 8) at a time.

        Raises BadInput at the end where a file's bits are not those that were written.
        """
        size, check = self.size(name), 0
        for start in range(0, size, nbytes * 8):
            piece = self.read(name, start, min(start + nbytes * 8, size))
            check ^= bits.check(piece)
            yield piece
        self.verify(name, check)

    def digest(self) -> str:
        """blake2b (16 bytes, hex) of names, shapes and bits; of a file, the one in its header where there is one."""
        h = hashlib.blake2b(digest_size=16)
        for name in self.names:
            h.update(f"{name}\0{','.join(map(str, self.shapes[name]))}\0".encode())
            for piece in self.pieces(name):
                h.update(piece.data)
        return h.hexdigest()


class Arrays(Store):
    """A store in memory. Raises BadInput where the arrays do not fit together; see `Mask`."""

    def __init__(
        self,
        packed: Mapping[str, bits.Packed],
        shapes: Mapping[str, tuple[int, ...]],
        scores: Mapping[str, Scores] | None,
        initial: Mapping[str, Scores] | None,
    ) -> None:
        self.shapes = {n: tuple(map(int, shapes[n])) for n in packed}
        self.packed = {n: np.ascontiguousarray(a, dtype=np.uint8).reshape(-1) for n, a in packed.items()}
        self.scores = {n: np.asarray(a, np.float32, order="C") for n, a in (scores or {}).items()}
        self.initial = {n: np.asarray(a, np.float32, order="C") for n, a in (initial or {}).items()}
        self.has_scores, self.has_initial_scores = bool(self.scores), bool(self.initial)
        for name, array in self.packed.items():
            size = self.size(name)
            if array.size != bits.nbytes(size):
                raise BadInput(f"tensor {name!r}: {array.size} bytes of bits do not fit shape {self.shapes[name]}")
            if size % 8 and array[-1] >> size % 8:
                raise BadInput(f"tensor {name!r}: padding bits after the last weight are not 0")
        for kind in (self.scores, self.initial):
            if kind and set(kind) != set(self.packed):
                raise BadInput(f"scores for {len(kind)} tensors, bits for {len(self.packed)}: give all scores or none")
            for name, array32 in kind.items():
                if array32.shape != self.shapes[name]:
                    raise BadInput(f"tensor {name!r}: scores have shape {array32.shape}, bits {self.shapes[name]}")

    def count(self, name: str) -> int:
        return bits.count(self.packed[name])

    def read(self, name: str, start: int, stop: int) -> bits.Packed:
        return self.packed[name][start // 8 : bits.nbytes(stop)]

    def read_scores(self, name: str, start: int, stop: int) -> Scores:
        return self.scores[name].reshape(-1)[start:stop]

    def read_initial(self, name: str, start: int, stop: int) -> Scores:
        return self.initial[name].reshape(-1)[start:stop]

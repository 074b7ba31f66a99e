"""Combining masks, in memory or file to file: one range of one tensor at a time, so memory does not grow with them.

The operations are in `operations`, exact densities in `cut`, the rules of who covers what in `combination`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from mftmerge import bits, cut
from mftmerge.bits import Words
from mftmerge.combination import Combination
from mftmerge.files import refuse_existing
from mftmerge.machine import cores, in_order
from mftmerge.mask import PIECE, Mask, MaskInfo, Parent
from mftmerge.maskfile import MaskWriter, compress
from mftmerge.maskheader import BLOCK
from mftmerge.maskstore import combined
from mftmerge.operations import OPERATIONS

__all__ = ["OPERATIONS", "CombineReport", "InputReport", "combine", "combine_files"]


@dataclass(frozen=True)
class InputReport:
    """One input mask. changed: bits that differ from the result on the tensors that both cover."""

    name: str
    digest: str
    tensors: int
    density: float
    changed: int
    weight: float | None = None


@dataclass(frozen=True)
class CombineReport:
    """What a combination did. size: weights covered by the result; kept: of these; notes: lines worth reading."""

    operation: str
    options: dict[str, Any]
    inputs: list[InputReport]
    tensors: int
    size: int
    kept: int
    out: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def density(self) -> float:
        return self.kept / self.size if self.size else 1.0

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self) | {"density": self.density}


class _Sink(Protocol):
    """Where the result goes: a file, or arrays in memory."""

    def write(self, name: str, start: int, data: bits.Packed | bytes) -> None: ...
    def finish(self, name: str, kept: int, check: int) -> None: ...


class _Memory:
    """A result in memory."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.packed = {n: np.zeros(bits.nbytes(math.prod(s)), np.uint8) for n, s in shapes.items()}

    def write(self, name: str, start: int, data: bits.Packed | bytes) -> None:
        array = np.frombuffer(data, np.uint8)
        self.packed[name][start : start + array.size] = array

    def finish(self, name: str, kept: int, check: int) -> None:
        """Nothing to record: the counts are taken from the bits."""


class _Run:
    """The work of one combination, and what was counted on the way."""

    def __init__(self, combination: Combination, sink: _Sink, archive: bool = False) -> None:
        self.combination, self.sink, self.archive = combination, sink, archive
        self.changed = [0] * len(combination.masks)
        self.size = self.kept = 0

    def all(self) -> None:
        """Compute the whole result, tensor after tensor."""
        combination = self.combination
        if combination.density is not None:
            for name in combination.shapes:
                self._ranked(name)
            return
        jobs = [(n, a) for n, s in combination.shapes.items() for a in range(0, max(1, math.prod(s)), 8 * BLOCK)]
        total = _Total(len(combination.masks))
        # Numpy and the system calls release the interpreter lock; each worker holds a block or less of every mask.
        with ThreadPoolExecutor(max(1, min(cores(), 4, 16 // len(combination.masks)))) as pool:
            for (name, start), (part, blob) in in_order(pool, self._block, jobs, ahead=8):
                total.add(part)
                if blob is not None:
                    self.sink.write(name, start // 8, blob)
                if start + 8 * BLOCK >= math.prod(combination.shapes[name]):
                    self._finish(name, total)
                    total = _Total(len(combination.masks))

    def _block(self, job: tuple[str, int]) -> tuple[_Total, bytes | None]:
        """One block of the result from bit `start` on: written here, or compressed for the sink."""
        name, start = job
        stop = min(start + 8 * BLOCK, math.prod(self.combination.shapes[name]))
        total, parts = _Total(len(self.combination.masks)), []
        for a in range(start, stop, 8 * PIECE):
            b = min(a + 8 * PIECE, stop)
            result, masks = self.combination.on_range(name, a, b)
            total.count(result, masks, by_bit=self.combination.op.effect is None)
            packed = result.view(np.uint8)[: bits.nbytes(b - a)]
            if self.archive:
                parts.append(packed)
            else:
                self.sink.write(name, a // 8, packed)
        return total, compress(np.concatenate(parts)) if parts else None

    def _ranked(self, name: str) -> None:
        """A tensor that is cut to an exact density."""
        combination, size = self.combination, math.prod(self.combination.shapes[name])
        density = combination.density_of(name)
        assert density is not None
        covering, total, waiting = combination.covering(name), _Total(len(combination.masks)), _Blocks(self.archive)
        for a, b, result in combination.ranked(name, cut.drop_count(size, density)):
            total.count(result, combination.read(name, a, b, covering), by_bit=True)
            for start, data in waiting.add(result.view(np.uint8)[: bits.nbytes(b - a)], last=b == size):
                self.sink.write(name, start, data)
        self._finish(name, total)

    def _finish(self, name: str, total: _Total) -> None:
        """Check what was read of a tensor against the inputs' check sums, and record the result's."""
        combination = self.combination
        grew = combination.op.effect if combination.density is None else None
        for place, d in enumerate(combination.covering(name)):
            mask = combination.masks[d]
            if name in mask:
                mask.verify(name, total.checks[place])
                self.changed[d] += abs(total.kept - mask.count(name)) if grew else total.changed[place]
        self.sink.finish(name, total.kept, total.check)
        self.kept += total.kept
        self.size += math.prod(combination.shapes[name])


class _Total:
    """Counts and check sums of a range of the result and of the masks that it came from."""

    def __init__(self, masks: int) -> None:
        self.kept = self.check = 0
        self.checks, self.changed = [0] * masks, [0] * masks

    def count(self, result: Words, masks: Sequence[Words], by_bit: bool) -> None:
        self.kept += bits.count(result)
        self.check ^= bits.check(result)
        for d, mask in enumerate(masks):
            self.checks[d] ^= bits.check(mask)
            self.changed[d] += bits.count(result ^ mask) if by_bit else 0

    def add(self, other: _Total) -> None:
        self.kept += other.kept
        self.check ^= other.check
        self.checks = [a ^ b for a, b in zip(self.checks, other.checks, strict=True)]
        self.changed = [a + b for a, b in zip(self.changed, other.changed, strict=True)]


class _Blocks:
    """Gathers pieces of a tensor into compressed blocks, or passes them on as they are."""

    def __init__(self, archive: bool) -> None:
        self.archive, self.start, self.parts = archive, 0, list[bits.Packed]()

    def add(self, piece: bits.Packed, last: bool) -> Iterator[tuple[int, bits.Packed | bytes]]:
        self.parts.append(piece)
        length = sum(p.size for p in self.parts)
        if self.archive and not last and length < BLOCK:  # pieces divide a block
            return
        whole = np.concatenate(self.parts)
        yield self.start, compress(whole) if self.archive else whole
        self.start, self.parts = self.start + length, []


def _describe(combination: Combination) -> MaskInfo:
    """The header of the result."""
    infos = [m.info for m in combination.masks]
    weights = combination.options.get("weights") or [None] * len(infos)
    parents = [
        Parent(label, mask.digest, weight, mask.info.operation, mask.info.options, mask.info.parents)
        for label, mask, weight in zip(combination.names, combination.masks, weights, strict=True)
    ]
    keep = None if combination.density is None else float(cut.exact(combination.density))
    info, notes = combined(infos, combination.shapes, combination.op.name, _written(combination), parents, keep)
    combination.notes += notes
    return info


def _written(combination: Combination) -> dict[str, Any]:
    """The options as they are recorded: those that were given, and what was taken in their place."""
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in combination.options.items()}
    if combination.density is not None:
        options["density"] = float(cut.exact(combination.density))
    if combination.uncovered != "abstain":
        options["uncovered"] = combination.uncovered
    return options


def _report(run: _Run, out: str | None) -> CombineReport:
    combination = run.combination
    weights = combination.options.get("weights") or [None] * len(combination.masks)
    inputs = [
        InputReport(label, mask.digest, len(mask.names), mask.density(), changed, weight)
        for label, mask, changed, weight in zip(combination.names, combination.masks, run.changed, weights, strict=True)
    ]
    tensors = len(combination.shapes)
    return CombineReport(
        combination.op.name, _written(combination), inputs, tensors, run.size, run.kept, out, combination.notes
    )


def combine(
    op: str,
    masks: Sequence[Mask | str | Path],
    *,
    names: Sequence[str] | None = None,
    density: float | str | None = None,
    uncovered: Literal["abstain", "keep"] = "abstain",
    **options: Any,
) -> Mask:
    """Combine masks, or .mask files, into one in memory. op: one of `OPERATIONS`, which says what `options` it takes.

    names: what the inputs are called in the result's family tree. density: cut every tensor to exactly this share of
    kept weights, by votes, then scores, then position (of equals the lowest index is dropped). uncovered: a mask
    abstains on a tensor that it does not cover, or counts as keeping all of it. Raises BadInput.
    """
    labels = names or [f"mask {i}" for i in range(1, len(masks) + 1)]
    combination = Combination(op, [Mask.of(m) for m in masks], labels, density=density, uncovered=uncovered, **options)
    sink = _Memory(combination.shapes)
    _Run(combination, sink).all()
    return Mask(sink.packed, combination.shapes, _describe(combination))


def combine_files(
    op: str,
    paths: Sequence[Mask | str | Path],
    out: str | Path,
    *,
    names: Sequence[str] | None = None,
    archive: bool = False,
    overwrite: bool = False,
    density: float | str | None = None,
    uncovered: Literal["abstain", "keep"] = "abstain",
    **options: Any,
) -> CombineReport:
    """Combine .mask files (or masks) into a new one, in memory that does not depend on their size.

    Options as for `combine`.

    Raises BadInput (also where an input's bits do not have their check sum) and leaves no output behind.
    """
    refuse_existing(Path(out), overwrite, [p.path if isinstance(p, Mask) else p for p in paths])
    labels = names or [f"mask {i}" if isinstance(p, Mask) else Path(p).name for i, p in enumerate(paths, 1)]
    combination = Combination(op, [Mask.of(p) for p in paths], labels, density=density, uncovered=uncovered, **options)
    info = _describe(combination)
    writer = MaskWriter(out, combination.shapes, archive=archive, info=info, overwrite=overwrite)
    with writer:
        run = _Run(combination, writer, archive)
        run.all()
    return _report(run, str(out))

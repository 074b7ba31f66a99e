"""Combining masks, in memory or file to file: one range of one tensor at a time, so memory does not grow with them.

The operations are in `operations`, exact densities in `cut`, the rules of who covers what in `combination`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

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


Write = Callable[[str, int, bits.Packed | bytes], None]  # tensor, first byte of its packed bits, the bytes
Job = tuple[str, int, int]  # tensor, and its weights from one index to before another


@dataclass
class _Counts:
    """What was counted: weights of the result and those it keeps; by mask, weights on which it differs from it."""

    size: int
    kept: int
    changed: list[int]


def _run(combination: Combination, write: Write, finish: Callable[[str, int, int], None], archive: bool) -> _Counts:
    """Compute the whole result. write: called from any thread; finish: with the bits kept in a tensor and their check.

    archive: `write` gets compressed blocks, in order. Raises BadInput where an input's bits lack their check sum.
    """
    sizes = {name: math.prod(shape) for name, shape in combination.shapes.items()}
    ranked, masks = combination.density is not None, combination.masks
    step = max(1, *sizes.values()) if ranked else 8 * BLOCK  # a cut needs all of a tensor, which it reads in pieces
    jobs = [(n, a, min(a + step, size)) for n, size in sizes.items() for a in range(0, max(1, size), step)]
    work = functools.partial(_result, combination, write, archive)
    effect = combination.op.effect if not ranked else None
    done, counts, sums = _Counts(sum(sizes.values()), 0, [0] * len(masks)), _no_counts(masks), _no_sums(masks)
    # Numpy and the system calls release the interpreter lock; each worker holds a block or less of every mask.
    with ThreadPoolExecutor(max(1, min(cores(), 4, 16 // len(masks)))) as pool:
        for (name, _, stop), (part, check, blobs) in in_order(pool, work, jobs, ahead=0 if ranked and archive else 8):
            for blob in blobs:
                write(name, 0, blob)
            counts += part
            sums ^= check
            if stop < sizes[name]:
                continue
            for d in combination.covering(name):
                if name in masks[d]:
                    masks[d].verify(name, int(sums[1 + d]))
                    done.changed[d] += abs(int(counts[0]) - masks[d].count(name)) if effect else int(counts[1 + d])
            finish(name, int(counts[0]), int(sums[0]))
            done.kept += int(counts[0])
            counts, sums = _no_counts(masks), _no_sums(masks)
    return done


def _no_counts(masks: Sequence[Mask]) -> npt.NDArray[np.int64]:
    return np.zeros(1 + len(masks), np.int64)


def _no_sums(masks: Sequence[Mask]) -> npt.NDArray[np.uint64]:
    return np.zeros(1 + len(masks), np.uint64)


def _result(
    combination: Combination, write: Write, archive: bool, job: Job
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64], list[bytes]]:
    """Compute and write the result on a part of a tensor.

    Returns bits kept and bits in which each mask differs, check sums of result and masks, and compressed blocks that
    are still to be written, where several parts are computed at a time.
    """
    name, _, stop = job
    ranked = combination.density is not None
    by_bit = ranked or combination.op.effect is None  # else the numbers of kept bits tell how many changed
    covering = combination.covering(name)
    counts, sums, blobs = _no_counts(combination.masks), _no_sums(combination.masks), list[bytes]()
    waiting: list[bits.Packed] = []
    for a, b, result, masks in _pieces(combination, job):
        counts[0] += bits.count(result)
        sums[0] ^= np.uint64(bits.check(result))
        for d, mask in zip(covering, masks, strict=True):
            sums[1 + d] ^= np.uint64(bits.check(mask))
            if by_bit:
                counts[1 + d] += bits.count(result ^ mask)
        packed = result.view(np.uint8)[: bits.nbytes(b - a)]
        if not archive:
            write(name, a // 8, packed)
            continue
        waiting.append(packed)
        if b == stop or sum(p.size for p in waiting) >= BLOCK:  # pieces divide a block
            blob = compress(np.concatenate(waiting))
            waiting = []
            if ranked:  # one part at a time
                write(name, 0, blob)
            else:
                blobs.append(blob)
    return counts, sums, blobs


def _pieces(combination: Combination, job: Job) -> Iterator[tuple[int, int, Words, list[Words]]]:
    """The result on a part of a tensor as (start, stop, words, the words of the masks that cover it)."""
    name, start, stop = job
    density = combination.density_of(name)
    if density is None:
        for a in range(start, stop, 8 * PIECE):
            b = min(a + 8 * PIECE, stop)
            yield a, b, *combination.on_range(name, a, b)
        return
    covering = combination.covering(name)
    for a, b, result in combination.ranked(name, cut.drop_count(stop, density)):
        yield a, b, result, combination.read(name, a, b, covering)


def _describe(combination: Combination) -> MaskInfo:
    """The header of the result."""
    infos = [m.info for m in combination.masks]
    weights = combination.options.get("weights") or [None] * len(infos)
    parents = [
        Parent(label, mask.digest, weight, mask.info.operation, mask.info.options, mask.info.parents)
        for label, mask, weight in zip(combination.names, combination.masks, weights, strict=True)
    ]
    keep = float(combination.shares[0]) if len(combination.shares) == 1 else None
    info, notes = combined(infos, combination.shapes, combination.op.name, _written(combination), parents, keep)
    combination.notes += notes
    return info


def _written(combination: Combination) -> dict[str, Any]:
    """The options as they are recorded: those that were given, and what was taken in their place."""
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in combination.options.items()}
    if combination.shares:
        given = [float(share) for share in combination.shares]
        options["density"] = given[0] if len(given) == 1 else given
    if combination.uncovered != "abstain":
        options["uncovered"] = combination.uncovered
    return options


def _report(combination: Combination, done: _Counts, out: str) -> CombineReport:
    weights = combination.options.get("weights") or [None] * len(combination.masks)
    inputs = [
        InputReport(label, mask.digest, len(mask.names), mask.density(), changed, weight)
        for label, mask, changed, weight in zip(
            combination.names, combination.masks, done.changed, weights, strict=True
        )
    ]
    tensors = len(combination.shapes)
    return CombineReport(
        combination.op.name, _written(combination), inputs, tensors, done.size, done.kept, out, combination.notes
    )


def combine(
    op: str,
    masks: Sequence[Mask | str | Path],
    *,
    names: Sequence[str] | None = None,
    density: float | str | Sequence[float] | None = None,
    uncovered: Literal["abstain", "keep"] = "abstain",
    **options: Any,
) -> Mask:
    """Combine masks, or .mask files, into one in memory. op: one of `OPERATIONS`, which says what `options` it takes.

    names: what the inputs are called in the result's family tree. density: cut every tensor to exactly this share of
    kept weights, by votes, then scores, then position (of equals the lowest index is dropped); several shares go from
    the first covered layer to the last, on straight lines between them where there are fewer than layers. uncovered: a
    mask abstains on a tensor that it does not cover, or counts as keeping all of it. Raises BadInput.
    """
    labels = names or [f"mask {i}" for i in range(1, len(masks) + 1)]
    combination = Combination(op, [Mask.of(m) for m in masks], labels, density=density, uncovered=uncovered, **options)
    packed = {n: np.zeros(bits.nbytes(math.prod(s)), np.uint8) for n, s in combination.shapes.items()}

    def write(name: str, start: int, data: bits.Packed | bytes) -> None:
        packed[name][start : start + len(data)] = data

    _run(combination, write, lambda name, kept, check: None, archive=False)
    return Mask(packed, combination.shapes, _describe(combination))


def combine_files(
    op: str,
    paths: Sequence[Mask | str | Path],
    out: str | Path,
    *,
    names: Sequence[str] | None = None,
    archive: bool = False,
    overwrite: bool = False,
    density: float | str | Sequence[float] | None = None,
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
        done = _run(combination, writer.write, writer.finish, archive)
    return _report(combination, done, str(out))

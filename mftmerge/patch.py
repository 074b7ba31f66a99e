"""From one state of a checkpoint to another by what changes alone: two masks over one base, or two checkpoints.

A patch is made, applied and undone bit for bit, and refused wherever a fingerprint says that the receiver has something
else than it was made for. Its values are steps between neighbouring numbers or old ^ new, so that the same patch leads
back; a patch without values asks the receiver for the base and leads one way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mftmerge import bits, matching, rice
from mftmerge.apply import companion_files, copy_files
from mftmerge.checkpoint import Checkpoint, TensorEntry, fingerprint_of, resolve
from mftmerge.errors import BadInput, shown
from mftmerge.files import open_new, protect, refuse_existing, write_at
from mftmerge.mask import Mask
from mftmerge.outputdirectory import OutputDirectory
from mftmerge.patchfile import Change, Header, Patch
from mftmerge.select import Integers, select
from mftmerge.stream import copy_range

if TYPE_CHECKING:
    import torch

Bools = npt.NDArray[np.bool_]


# -- making -----------------------------------------------------------------------------------------------------------


def mask_patch(
    model: str | Path,
    source: Mask | str | Path | None,
    target: Mask | str | Path | None,
    *,
    base: str | Path | None = None,
    values: bool = True,
) -> Patch:
    """The patch from `model` under the mask `source` to `model` under `target`; None: without mask.

    base: checkpoint whose values dropped weights take, else 0 or what the masks say (both masks the same). values:
    whether the patch brings the values; without them it is for those who have the model (and base), one way only.
    Raises BadInput where a mask does not fit the model.
    """
    checkpoint = Checkpoint.open(resolve(model))
    masks = [m if isinstance(m, Mask) or m is None else Mask.load(m) for m in (source, target)]
    references = {str(r) for m in masks if m is not None and (r := matching.delta_base(m, base, None)) is not None}
    over = {matching.delta_base(m, base, None) is None for m in masks if m is not None}
    if len(references) > 1 or len(over) > 1:
        raise BadInput("the two masks drop weights to different values; make two patches, by way of no mask")
    other = Checkpoint.open(resolve(references.pop())) if references else None
    names = [{} if m is None else matching.match(m, checkpoint, str(model)) for m in masks]
    patch = Patch(Header(source=_called(source), target=_called(target), tensors={}))
    for name in sorted({*names[0], *names[1]}):
        if other is not None:
            matching.require_base_tensors({name: name}, checkpoint, other, str(other.path))
        pair = _Pair.read(name, checkpoint, other)
        kept = [_kept(m, n.get(name), pair.entry) for m, n in zip(masks, names, strict=True)]
        if values:
            _put_values(patch, pair.entry, *(pair.under(k) for k in kept))
        else:
            _put_flips(patch, pair, *kept)
    return patch


def checkpoint_patch(source: str | Path, target: str | Path) -> Patch:
    """The patch from one checkpoint to another with the same tensors. Raises BadInput where they have not."""
    old, new = (Checkpoint.open(resolve(path)) for path in (source, target))
    patch = Patch(Header(source=str(source), target=str(target), tensors={}))
    if old.names != new.names:
        odd = min(set(old.names) ^ set(new.names))
        raise BadInput(f"{target}: tensor {odd!r} is in one of the two only; a patch needs the same tensors")
    for name in old.names:
        a, b = old.entry(name), new.entry(name)
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            raise BadInput(f"{target}: tensor {name!r} is {b.dtype} {b.shape}, in {source} {a.dtype} {a.shape}")
        _put_values(patch, a, old.read(name).reshape(-1), new.read(name).reshape(-1))
    return patch


def _called(mask: Mask | str | Path | None) -> str:
    return "no mask" if mask is None else f"mask {mask.digest}" if isinstance(mask, Mask) else Path(mask).name


def _kept(mask: Mask | None, name: str | None, entry: TensorEntry) -> Bools:
    return np.ones(entry.size, np.bool_) if mask is None or name is None else mask.kept(name).reshape(-1)


@dataclass
class _Pair:
    """A tensor of the model, flat, and the values that its dropped weights take; None: 0."""

    entry: TensorEntry
    base: Integers
    other: Integers | None
    prints: tuple[str, str | None]

    @classmethod
    def read(cls, name: str, checkpoint: Checkpoint, other: Checkpoint | None) -> _Pair:
        prints = checkpoint.fingerprint(name), None if other is None else other.fingerprint(name)
        values = other.read(name).reshape(-1) if other is not None else None
        return cls(checkpoint.entry(name), checkpoint.read(name).reshape(-1), values, prints)

    def under(self, kept: Bools) -> Integers:
        """The tensor under a mask."""
        weights = self.base.copy()
        select(weights, bits.pack(kept), self.other)
        return weights

    def same(self, current: Integers) -> Bools:
        """Where a tensor has the model's value, even if a mask says that it is dropped: both values may be equal."""
        return np.asarray(current == self.base)


def _print(entry: TensorEntry, values: Integers) -> str:
    return fingerprint_of(entry.dtype, entry.shape, [np.ascontiguousarray(values).data.cast("B")])


def _put_values(patch: Patch, entry: TensorEntry, old: Integers, new: Integers) -> None:
    """Add a tensor's change with its values, unless there is none."""
    positions = np.flatnonzero(old != new)
    if not len(positions):
        return
    before, after = old[positions], new[positions]
    name, width = entry.name, 8 * old.itemsize
    change: dict[str, object] = {"positions": patch.put(f"{name}.positions", rice.gaps(positions)), "values": "xor"}
    if width <= 32:
        steps = rice.zigzag(_ordered(after, width) - _ordered(before, width))
        if rice.code_bits(steps, rice.best_k(steps)) < width * len(steps):
            change |= {"values": "steps", "steps": patch.put(f"{name}.steps", steps)}
    if change["values"] == "xor":
        patch.streams[f"{name}.xor"] = (before ^ after).view(np.uint8)
    _put(patch, entry, old, new, change)


def _put_flips(patch: Patch, pair: _Pair, source: Bools, target: Bools) -> None:
    """Add a tensor's change as positions alone, counted among the kept weights and among the dropped ones."""
    old, new = pair.under(source), pair.under(target)
    if np.array_equal(old, new):
        return
    here, there = pair.same(old), pair.same(new)
    flips = here ^ there
    lost, found = flips[here], flips[~here]
    inverted = bool(2 * found.sum() > len(found))
    name = pair.entry.name
    change = {
        "positions": patch.put(f"{name}.positions", rice.gaps(np.flatnonzero(lost))),
        "dropped": patch.put(f"{name}.dropped", rice.gaps(np.flatnonzero(found ^ inverted))),
        "inverted": inverted,
        "values": "base",
        "base": pair.prints[0],
        "other": pair.prints[1],
    }
    _put(patch, pair.entry, old, new, change)


def _put(patch: Patch, entry: TensorEntry, old: Integers, new: Integers, change: dict[str, Any]) -> None:
    change = {"before": _print(entry, old), "after": _print(entry, new)} | change
    patch.header.tensors[entry.name] = Change(dtype=entry.dtype, shape=list(entry.shape), **change)


def _ordered(values: Integers, width: int) -> rice.Numbers:
    """Bits of floating point numbers as whole numbers in the numbers' order, one to one; neighbours differ by 1."""
    numbers = values.astype(np.int64)
    sign = 1 << (width - 1)
    return np.where(numbers < sign, numbers, sign - 1 - numbers)


def _from_ordered(numbers: rice.Numbers, kind: type[np.unsignedinteger[Any]]) -> Integers:
    sign = 1 << (8 * np.dtype(kind).itemsize - 1)
    if len(numbers) and not -sign <= numbers.min() <= numbers.max() < sign:
        raise BadInput("the patch's values are damaged (one is out of range)")
    return np.where(numbers >= 0, numbers, sign - 1 - numbers).astype(kind)


# -- applying ---------------------------------------------------------------------------------------------------------


@dataclass
class Receiver:
    """What applies a patch. base, other: with a patch without values, the model and what dropped weights return to.

    undo: lead back. reverse: gets, for a patch without values, the patch that leads back.
    """

    patch: Patch
    undo: bool = False
    base: Checkpoint | None = None
    other: Checkpoint | None = None
    reverse: Patch | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not self.patch.needs_base:
            return
        if self.undo:
            raise BadInput("this patch has no values and leads one way; apply the one that --reverse wrote")
        if self.base is None:
            raise BadInput("this patch has no values; give the model that its masks share as --base")
        header = self.patch.header
        self.reverse = Patch(Header(source=header.target, target=header.source, tensors={}))

    @classmethod
    def of(
        cls,
        patch: Patch | str | Path,
        base: str | Path | None = None,
        delta_base: str | Path | None = None,
        *,
        undo: bool = False,
    ) -> Receiver:
        """A receiver with what it needs opened. Raises BadInput where that is not to be had."""
        opened = [None if path is None else Checkpoint.open(resolve(path)) for path in (base, delta_base)]
        return cls(patch if isinstance(patch, Patch) else Patch.load(patch), undo, *opened)

    def changed(self, entry: TensorEntry, current: Integers) -> Integers:
        """A tensor, flat, after the patch. Raises BadInput where it is not what the patch was made for."""
        name = entry.name
        change = self.patch.header.tensors[name]
        if (change.dtype, tuple(change.shape)) != (entry.dtype, entry.shape):
            raise BadInput(
                f"tensor {name!r} is {entry.dtype} {entry.shape}, the patch has {change.dtype} {tuple(change.shape)}"
            )
        before, after = (change.after, change.before) if self.undo else (change.before, change.after)
        found = _print(entry, current)
        if found != before:
            done = " (it has been applied already)" if found == after else ""
            raise BadInput(f"tensor {name!r} is not what this patch {'leads to' if self.undo else 'starts from'}{done}")
        new = self._flipped(change, entry, current) if change.values == "base" else self._moved(change, entry, current)
        if _print(entry, new) != after:
            raise BadInput(f"tensor {name!r} does not become what the patch says; the patch is damaged, get it again")
        return new

    def _moved(self, change: Change, entry: TensorEntry, current: Integers) -> Integers:
        name, new = entry.name, current.copy()
        positions = rice.positions(self.patch.numbers(f"{name}.positions", change.positions), entry.size)
        if change.values == "xor":
            new[positions] ^= self.patch.streams[f"{name}.xor"].view(entry.integer)
            return new
        assert change.steps is not None
        steps = rice.unzigzag(self.patch.numbers(f"{name}.steps", change.steps))
        numbers = _ordered(current[positions], 8 * current.itemsize) + (-steps if self.undo else steps)
        new[positions] = _from_ordered(numbers, entry.integer)
        return new

    def _flipped(self, change: Change, entry: TensorEntry, current: Integers) -> Integers:
        assert self.base is not None
        assert change.dropped is not None
        name = entry.name
        if change.other is not None and self.other is None:
            raise BadInput("this patch's masks are over a delta; give what dropped weights return to as --delta-base")
        pair = _Pair.read(name, self.base, self.other if change.other is not None else None)
        if pair.prints != (change.base, change.other) or pair.entry.shape != entry.shape:
            raise BadInput(f"tensor {name!r} of the base is not the one that this patch was made with")
        here = pair.same(current)
        kept, dropped = np.flatnonzero(here), np.flatnonzero(~here)
        lost = kept[rice.positions(self.patch.numbers(f"{name}.positions", change.positions), len(kept))]
        marked = np.zeros(len(dropped), np.bool_)
        marked[rice.positions(self.patch.numbers(f"{name}.dropped", change.dropped), len(dropped))] = True
        there = here.copy()
        there[lost] = False
        there[dropped[marked ^ change.inverted]] = True
        if self.reverse is not None:
            _put_flips(self.reverse, pair, there, here)
        return pair.under(there)


def apply_patch(
    patch: Patch | str | Path,
    checkpoint: str | Path,
    out: str | Path,
    *,
    undo: bool = False,
    base: str | Path | None = None,
    delta_base: str | Path | None = None,
    reverse: str | Path | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write to the directory `out` what `checkpoint` becomes by a patch; returns the names of the tensors that changed.

    undo: lead back. base, delta_base: for a patch without values, the model that its masks share and what dropped
    weights return to. reverse: write there the patch that leads back from such a patch. overwrite: replace what is at
    `out`, and at `reverse`.
    Raises BadInput, with nothing written, where the checkpoint is not the one that the patch was made for.
    """
    source, receiver = Checkpoint.open(resolve(checkpoint)), Receiver.of(patch, base, delta_base, undo=undo)
    if reverse is not None and receiver.reverse is None:
        raise BadInput("--reverse is for patches without values; this one leads back itself (undo)")
    target = Path(os.path.abspath(Path(out).expanduser()))
    inputs = (source.path, base, delta_base, patch if isinstance(patch, str | Path) else None)
    protect(target, inputs)
    if reverse is not None:
        refuse_existing(reverse, overwrite, inputs)
        if target in Path(os.path.abspath(Path(reverse).expanduser())).parents:
            raise BadInput(f"{reverse}: lies in {target}, which is replaced; write the reverse patch beside it")
    names = sorted(receiver.patch.header.tensors)
    for name in names:
        source.entry(name)
    with OutputDirectory(target, lambda: "patch", overwrite=overwrite) as directory:
        for shard in source.shards:
            _write_shard(receiver, source, shard.name, directory.path)
        card = ["README.md"] if (source.path / "README.md").is_file() else []
        copy_files(source, (*companion_files(source), *card), directory.path)
        if reverse is not None and receiver.reverse is not None:
            receiver.reverse.save(reverse, overwrite=overwrite)
        directory.commit()
    return names


def _write_shard(receiver: Receiver, source: Checkpoint, name: str, folder: Path) -> None:
    (shard,) = (s for s in source.shards if s.name == name)
    fd = open_new(folder / name, shard.nbytes)
    own = shard.open()
    try:
        copy_range(own, fd, 0, shard.nbytes, shard.path)
        for entry in shard.tensors:
            if entry.name in receiver.patch.header.tensors:
                new = receiver.changed(entry, source.read(entry.name).reshape(-1))
                write_at(fd, np.ascontiguousarray(new).data.cast("B"), entry.start)
        shard.check_unchanged(own)
        os.fsync(fd)
    finally:
        os.close(own)
        os.close(fd)


def patch_model(
    model: torch.nn.Module,
    patch: Patch | str | Path,
    *,
    undo: bool = False,
    base: str | Path | None = None,
    delta_base: str | Path | None = None,
) -> Patch | None:
    """Apply a patch to a running model, in place. Returns the patch that leads back from one without values.

    See `apply_patch`. Everything is checked first: the model changes whole or not at all. Raises BadInput where it is
    another one, or in another type than the checkpoint, and for tensors that the model fuses.
    """
    receiver = Receiver.of(patch, base, delta_base, undo=undo)
    _write_live([(flat, receiver.changed(entry, flat)) for entry, flat in _live(model, receiver.patch)])
    return receiver.reverse


def _write_live(new: list[tuple[Integers, Integers]]) -> None:
    kept = [flat.copy() for flat, _ in new]
    try:
        for flat, values in new:
            flat[:] = values
    except BaseException:
        for (flat, _), values in zip(new, kept, strict=True):
            flat[:] = values
        raise


def _live(model: torch.nn.Module, patch: Patch) -> Iterator[tuple[TensorEntry, Integers]]:
    """The parameters that a patch changes: as entries of a checkpoint, and their own memory as integers."""
    from mftmerge import naming
    from mftmerge.dtypes import integer_view, of_torch

    inner = naming.model_with(model, set(patch.header.tensors))
    actual, parameters = naming.live_names(inner), dict(inner.named_parameters(remove_duplicate=False))
    for name in patch.header.tensors:
        parameter = parameters.get(actual.get(name, name))
        if parameter is None:
            raise BadInput(f"the running model has no tensor {shown(name)!r} (or fuses it); patch its checkpoint")
        if parameter.device.type != "cpu" or not parameter.is_contiguous():
            raise BadInput(f"parameter {name!r} is not in the CPU's memory as one piece; patch its checkpoint")
        code = of_torch(parameter.dtype).code
        flat = integer_view(parameter.detach()).view(-1).numpy()
        kind: type[np.unsignedinteger[Any]] = np.dtype(f"u{flat.itemsize}").type
        entry = TensorEntry(name, code, tuple(parameter.shape), Path("the running model"), 0, flat.nbytes)
        yield entry, flat.view(kind)

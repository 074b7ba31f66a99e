"""Masks without training: from the task vector `tau = fine-tuned - base` of checkpoints, and from other tools' files.

The other tools' files are the pickled float masks of the MFT release, and safetensors of bool or 0/1 numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mftmerge import bits, cut
from mftmerge.checkpoint import Checkpoint, read_shard, resolve
from mftmerge.dtypes import to_float32
from mftmerge.errors import BadInput, worded
from mftmerge.files import refuse_pointer
from mftmerge.mask import Mask, MaskInfo, require_same_shape

PIECE = 1 << 19  # weights handled at a time
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
METHODS = ("magnitude", "tall", "sign")
PICKLES = (".pt", ".pth", ".bin", ".pkl")
Values = npt.NDArray[np.float32]
Note = Callable[[str], None]

# One tensor of another tool's mask: its name, its shape, and a function that gives elements [start, stop) as float32.
Other = tuple[str, tuple[int, ...], Callable[[int, int], Values]]


@dataclass(frozen=True)
class DiffSettings:
    """How to derive a mask from the task vector `tau` of a fine-tuned checkpoint.

    method: "magnitude" keeps the share `keep` of each tensor with the largest |tau| (of equals the highest indices);
    "tall" keeps where |tau| >= strength * |tau_mtl - tau| (TALL-masks, Wang et al. 2024);
    "sign" keeps where tau is not 0 and has the sign of tau_mtl (the elected sign of TIES, Yadav et al. 2023).
    tau_mtl is the task vector of the checkpoint `merged`, or the sum of tau and those of `others`.
    only: regular expression that a tensor's name must contain; without it every tensor of 2 or more dimensions.
    """

    method: Literal["magnitude", "tall", "sign"] = "magnitude"
    keep: float | str | None = None
    strength: float = 0.4
    merged: str | None = None
    others: Sequence[str] = ()
    only: str | None = None


class _Difference:
    """A base, a fine-tuned checkpoint and what it is compared with, read as float32 differences."""

    def __init__(self, base: str, fine_tuned: str, settings: DiffSettings) -> None:
        self.settings = settings
        self.base, self.tuned = (Checkpoint.open(resolve(p)) for p in (base, fine_tuned))
        rest = [settings.merged] if settings.merged else list(settings.others)
        self.rest = [Checkpoint.open(resolve(p)) for p in rest]

    def tau(self, model: Checkpoint, name: str, start: int, stop: int) -> Values:
        """Task vector of `model` on elements [start, stop) of a tensor."""
        values = to_float32(model.read_range(name, start, stop), model.entry(name).dtype)
        return values - to_float32(self.base.read_range(name, start, stop), self.base.entry(name).dtype)

    def tau_multi_task(self, name: str, start: int, stop: int, tau: Values) -> Values:
        """Task vector of the merged checkpoint, or the sum over all fine-tuned ones."""
        taus = [self.tau(model, name, start, stop) for model in self.rest]
        return taus[0] if self.settings.merged else np.sum([tau, *taus], axis=0, dtype=np.float32)

    def names(self) -> list[str]:
        """Tensors to cover. Raises BadInput where a checkpoint lacks one or has it in another shape."""
        try:
            only = re.compile(self.settings.only) if self.settings.only else None
        except re.error as e:
            raise BadInput(f"--only {self.settings.only!r} is not a regular expression ({e})") from None
        chosen = []
        for name in self.tuned.names:
            entry = self.tuned.entry(name)
            if entry.dtype not in FLOATS or not (only.search(name) if only else len(entry.shape) >= 2):
                continue
            for model in (self.base, *self.rest):
                if model.entry(name).shape != entry.shape:
                    raise BadInput(
                        f"{model.path}: tensor {name!r} has shape {model.entry(name).shape}, in {self.tuned.path} "
                        f"{entry.shape}; the checkpoints must be of one architecture"
                    )
            chosen.append(name)
        if not chosen:
            raise BadInput(f"{self.tuned.path}: no tensor of 2 or more dimensions matches; change --only")
        return chosen

    def pieces(self, name: str) -> Iterator[tuple[int, int]]:
        size = self.tuned.entry(name).size
        return ((a, min(a + PIECE, size)) for a in range(0, size, PIECE))

    def changed(self, name: str) -> bool:
        """Whether the fine-tuned tensor differs from the base's at all."""
        return any(np.any(self.tau(self.tuned, name, a, b)) for a, b in self.pieces(name))

    def packed(self, name: str) -> bits.Packed:
        """The kept weights of one tensor."""
        entry, settings = self.tuned.entry(name), self.settings
        if settings.method == "magnitude":
            dropped = cut.drop_count(entry.size, settings.keep or 0)
            parts = cut.project(entry.size, dropped, PIECE, keys=self._magnitude(name))
            return np.concatenate([w.view(np.uint8)[: bits.nbytes(b - a)] for a, b, w in parts])
        rule: Callable[[Values, Values], cut.Bools] = (
            _tall(settings.strength) if settings.method == "tall" else _same_sign
        )
        kept = []
        for a, b in self.pieces(name):
            tau = self.tau(self.tuned, name, a, b)
            kept.append(bits.pack(rule(tau, self.tau_multi_task(name, a, b, tau))))
        return np.concatenate(kept)

    def _magnitude(self, name: str) -> Callable[[int, int], cut.Keys]:
        def keys(start: int, stop: int) -> cut.Keys:
            try:
                return cut.sortable(self.tau(self.tuned, name, start, stop), "abs")
            except BadInput:
                raise BadInput(f"{self.tuned.path}: tensor {name!r} or the base's contains NaN") from None

        return keys


def _tall(strength: float) -> Callable[[Values, Values], cut.Bools]:
    return lambda tau, multi: np.abs(tau) >= np.float32(strength) * np.abs(multi - tau)


def _same_sign(tau: Values, multi: Values) -> cut.Bools:
    kept: cut.Bools = tau * np.sign(multi) > 0
    return kept


def _settings(settings: DiffSettings | None, options: Mapping[str, Any]) -> DiffSettings:
    """Settings with those given by name in place of their own. Raises BadInput where they do not fit together."""
    known = [f.name for f in fields(DiffSettings)]
    if unknown := sorted({*options} - {*known}):
        raise BadInput(f"{unknown[0]}: no such setting; there are {', '.join(known)}")
    settings = replace(settings or DiffSettings(), **options)
    if settings.method not in METHODS:
        raise BadInput(f"--method {settings.method!r}: choose from {', '.join(METHODS)}")
    if (settings.keep is None) == (settings.method == "magnitude"):
        raise BadInput("--keep is needed for --method magnitude, and for no other")
    if settings.keep is not None:
        cut.drop_count(0, settings.keep)
    if settings.method != "magnitude" and bool(settings.merged) == bool(settings.others):
        raise BadInput(f"--method {settings.method} needs a multi-task vector: either --merged or --others")
    if settings.method == "magnitude" and (settings.merged or settings.others):
        raise BadInput("--method magnitude looks at one checkpoint; leave out --merged and --others")
    if not np.isfinite(settings.strength) or settings.strength < 0:
        raise BadInput(f"--lambda {settings.strength}: must be a number from 0")
    return settings


def diff_mask(
    base: str | Path,
    fine_tuned: str | Path,
    settings: DiffSettings | None = None,
    *,
    note: Note | None = None,
    **options: object,  # fields of DiffSettings
) -> Mask:
    """A mask over the weights of `fine_tuned` for its difference from `base` (directories or hub ids), untrained.

    settings, or its fields by name: `diff_mask(base, tuned, keep=0.1)`. note: called with what a user should read.

    The mask keeps changes: its header says `on: delta`, and `base` as the model that dropped weights return to.
    Tensors that fine-tuning did not change are not covered. Reads a piece of a tensor at a time. Raises BadInput.
    """
    settings = _settings(settings, options)
    difference = _Difference(str(base), str(fine_tuned), settings)
    names = difference.names()
    changed = [n for n in names if difference.changed(n)]
    if len(changed) < len(names) and note:
        note(f"{len(names) - len(changed)} unchanged tensors are not covered")
    if not changed:
        raise BadInput(f"{fine_tuned}: no tensor differs from {base}")
    made: dict[str, object] = {"method": settings.method, "pretrained": str(base)}
    made |= {"lambda": settings.strength} if settings.method == "tall" else {}
    made |= {"merged": str(settings.merged)} if settings.merged else {}
    made |= {"others": [Path(p).name for p in settings.others]} if settings.others else {}
    info = MaskInfo(
        keep=None if settings.keep is None else float(settings.keep),
        base=str(fine_tuned),
        fingerprints={n: difference.tuned.fingerprint(n) for n in changed},
        training=made,
        on="delta",
        delta_base=str(base),
        delta_fingerprints={n: difference.base.fingerprint(n) for n in changed},
    )
    packed = {n: difference.packed(n) for n in changed}
    return Mask(packed, {n: difference.tuned.entry(n).shape for n in changed}, info)


# -- other tools' masks -----------------------------------------------------------------------------------------------


def import_mask(
    source: str | Path,
    model: str | Path | None = None,
    delta_base: str | Path | None = None,
    *,
    note: Note | None = None,
) -> Mask:
    """Read another tool's mask file (1 = keep). note: called with what was done, a line at a time.

    A pickle must be a dict of names to tensors and is loaded with `weights_only=True`. Names of modules get `.weight`;
    with `model` (checkpoint directory or hub id) names and shapes are checked against it and its fingerprints recorded.
    delta_base: the model (directory or hub id) that dropped weights return to, where the mask is over a delta.
    Raises BadInput where a value is neither 0 nor 1.
    """
    source = Path(source)
    if not source.is_file():
        raise BadInput(f"{source}: no such file")
    base = Checkpoint.open(resolve(model)) if model is not None else None
    packed: dict[str, bits.Packed] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    renamed = 0
    for other, shape, read in _pickle(source) if source.suffix in PICKLES else _safetensors(source):
        name = _checkpoint_name(other, base, source)
        renamed += name != other
        if name in packed:
            raise BadInput(f"{source}: {other!r} is there twice, with and without '.weight'")
        if base is not None and base.entry(name).shape != shape:
            raise BadInput(f"{source}: {other!r} has shape {shape}, in {model} it has {base.entry(name).shape}")
        packed[name], shapes[name] = _pack(source, other, shape, read), shape
    if not packed:
        raise BadInput(f"{source}: no tensors in it")
    prints = {n: base.fingerprint(n) for n in packed} if base else {}
    if renamed and note:
        note(f"{renamed} of {len(packed)} names were completed with '.weight'")
    if not base and note:
        note(worded("names and shapes were not checked; give --model to check them against a checkpoint"))
    info = MaskInfo(base=None if model is None else str(model), fingerprints=prints, training={"imported": source.name})
    if delta_base is not None:
        under = Checkpoint.open(resolve(delta_base))
        for name, shape in shapes.items():
            require_same_shape(name, shape, under.entry(name).shape, str(delta_base))
        prints = {n: under.fingerprint(n) for n in packed}
        info = replace(info, on="delta", delta_base=str(delta_base), delta_fingerprints=prints)
    return Mask(packed, shapes, info)


def _checkpoint_name(name: str, base: Checkpoint | None, source: Path) -> str:
    if base is None:
        return name if name.endswith((".weight", ".bias")) else f"{name}.weight"
    found = [n for n in (name, f"{name}.weight") if n in base]
    if not found:
        raise BadInput(f"{source}: {base.path} has no tensor {name!r} or {name + '.weight'!r}; is it another model's?")
    return found[0]


def _pack(source: Path, name: str, shape: tuple[int, ...], read: Callable[[int, int], Values]) -> bits.Packed:
    size = int(np.prod(shape, dtype=object)) if shape else 1
    result = np.zeros(bits.nbytes(size), np.uint8)
    for start in range(0, size, PIECE):
        values = read(start, min(start + PIECE, size)).reshape(-1)
        kept = values == 1
        wrong = ~kept & (values != 0)
        if wrong.any():
            value = values[wrong][0]
            raise BadInput(f"{source}: {name!r} holds {value}; a mask holds only 0 and 1 (cut scores to a mask first)")
        result[start // 8 : bits.nbytes(start + kept.size)] = bits.pack(kept)
    return result


def _safetensors(source: Path) -> Iterator[Other]:
    shard = read_shard(source)
    for entry in shard.tensors:
        width = np.dtype(entry.integer).itemsize

        def read(start: int, stop: int, entry: Any = entry, width: int = width) -> Values:
            raw = shard.read(entry.start + start * width, entry.start + stop * width)
            return to_float32(np.frombuffer(raw, entry.integer), entry.dtype)

        yield entry.name, entry.shape, read


def _pickle(source: Path) -> Iterator[Other]:
    """The tensors of a pickle. Only here is torch imported; `weights_only` refuses code."""
    refuse_pointer(source)
    import torch

    try:
        try:
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of before torch 1.6 cannot be mapped
            content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as e:
        reason = str(e).strip().split("\n")[0][:160] or type(e).__name__
        raise BadInput(f"{source}: not a pickle that torch loads without running code ({reason})") from None
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise BadInput(f"{source}: holds a {type(content).__name__}, which is not a dict of names to 0/1 tensors")
    for name, tensor in content.items():
        if tensor.is_complex() or tensor.is_quantized or tensor.layout is not torch.strided:
            raise BadInput(f"{source}: {name!r} is not a plain tensor of real numbers")
        flat = tensor.detach().reshape(-1)

        def read(start: int, stop: int, flat: Any = flat) -> Values:
            array: Values = flat[start:stop].float().numpy()
            return array

        yield str(name), tuple(tensor.shape), read

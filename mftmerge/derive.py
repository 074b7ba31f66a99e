"""Masks derived from checkpoints without training: by the task vectors `tau = fine-tuned - base` alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mftmerge import bits, cut
from mftmerge.checkpoint import Checkpoint, resolve, to_float32
from mftmerge.errors import BadInput
from mftmerge.mask import Mask, MaskInfo

PIECE = 1 << 19  # weights handled at a time
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
METHODS = ("magnitude", "tall", "sign")
Values = npt.NDArray[np.float32]


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
        rule: Callable[[Values, Values], Any] = _tall(settings.strength) if settings.method == "tall" else _same_sign
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


def _tall(strength: float) -> Callable[[Values, Values], Any]:
    return lambda tau, multi: np.abs(tau) >= np.float32(strength) * np.abs(multi - tau)


def _same_sign(tau: Values, multi: Values) -> Any:
    return tau * np.sign(multi) > 0


def _check(settings: DiffSettings) -> None:
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


def diff_mask(base: str, fine_tuned: str, settings: DiffSettings) -> tuple[Mask, list[str]]:
    """A mask over the weights of `fine_tuned` for its difference from `base` (directories or hub ids), and notes.

    Tensors that fine-tuning did not change are not covered. Reads a piece of a tensor at a time. Raises BadInput.
    """
    _check(settings)
    difference = _Difference(base, fine_tuned, settings)
    names = difference.names()
    changed = [n for n in names if difference.changed(n)]
    notes = [f"{len(names) - len(changed)} unchanged tensors are not covered"] if len(changed) < len(names) else []
    if not changed:
        raise BadInput(f"{fine_tuned}: no tensor differs from {base}")
    made: dict[str, Any] = {"method": settings.method, "pretrained": str(base)}
    made |= {"lambda": settings.strength} if settings.method == "tall" else {}
    made |= {"merged": str(settings.merged)} if settings.merged else {}
    made |= {"others": [Path(p).name for p in settings.others]} if settings.others else {}
    info = MaskInfo(
        keep=None if settings.keep is None else float(settings.keep),
        base=str(fine_tuned),
        fingerprints={n: difference.tuned.fingerprint(n) for n in changed},
        training=made,
    )
    packed = {n: difference.packed(n) for n in changed}
    return Mask(packed, {n: difference.tuned.entry(n).shape for n in changed}, info), notes

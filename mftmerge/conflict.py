"""What two skills fight over: where the evidence of two masks, or two task vectors, agrees, is ignored and is opposed.

Evidence of a mask is its scores minus those before training; of a fine-tuned checkpoint it is the task vector. At each
weight the smaller of the two sizes is what both ask for: agreed on where the signs are the same, opposed where they are
not; what is above it only one of them asks for. Chance is the same sum with one of the two moved to other places of
its matrix.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mftmerge import plots
from mftmerge.checkpoint import Checkpoint
from mftmerge.errors import BadInput
from mftmerge.mask import Mask
from mftmerge.names import in_order, layer_name, layer_of, module_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PIECE = 1 << 22  # weights in memory at a time


@dataclass
class Conflict:
    """Sums over weights: agreed and opposed, min(|a|, |b|) by sign; either, max(|a|, |b|); the first two by chance."""

    weights: int = 0
    agreed: float = 0.0
    opposed: float = 0.0
    either: float = 0.0
    agreed_by_chance: float = 0.0
    opposed_by_chance: float = 0.0

    def add(self, other: Conflict) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def share(self, part: str) -> float:
        """A part ("agreed", "opposed", ... "ignored") as a share of what either of the two asks for; 0 of nothing."""
        value = self.either - self.agreed - self.opposed if part == "ignored" else getattr(self, part)
        return float(value / self.either) if self.either else 0.0

    def to_json(self) -> dict[str, float]:
        parts = ("agreed", "opposed", "ignored", "agreed_by_chance", "opposed_by_chance")
        return {"weights": self.weights} | {p: self.share(p) for p in parts}


@dataclass(frozen=True)
class Dispute:
    """Two skills: the whole, and each matrix by its layer and module."""

    a: str
    b: str
    total: Conflict = field(default_factory=Conflict)
    by_tensor: dict[str, Conflict] = field(default_factory=dict)

    def by(self, key: Callable[[str], object]) -> dict[Any, Conflict]:
        """Sums over the tensors of one key, such as `layer_of`."""
        found: dict[object, Conflict] = {}
        for name, conflict in self.by_tensor.items():
            found.setdefault(key(name), Conflict()).add(conflict)
        return found

    def worst(self, count: int = 5) -> list[tuple[str, float]]:
        """The matrices that carry most of what is opposed, with their shares of it, largest first."""
        ordered = sorted(self.by_tensor.items(), key=lambda item: -item[1].opposed)[:count]
        return [(name, c.opposed / self.total.opposed) for name, c in ordered if c.opposed and self.total.opposed]

    def to_json(self) -> dict[str, Any]:
        layers = {layer_name(k): c.to_json() for k, c in self.by(layer_of).items()}
        modules = {str(k): c.to_json() for k, c in self.by(module_of).items()}
        tensors = {n: c.to_json() for n, c in self.by_tensor.items()}
        whole = {"a": self.a, "b": self.b} | self.total.to_json()
        return whole | {"worst": self.worst(), "by_layer": layers, "by_module": modules, "by_tensor": tensors}


Values = npt.NDArray[np.float32]
Reader = Callable[[str], Values]  # tensor -> its evidence, flat


def of_masks(masks: Mapping[str, Mask]) -> list[Dispute]:
    """Every pair of the masks that carry scores and those before training; empty where fewer than two do."""
    able = {label: m for label, m in masks.items() if m.has_scores and m.has_initial_scores}

    def reader(mask: Mask) -> Reader:
        def read(name: str) -> Values:
            return (mask.scores(name) - mask.initial_scores(name)).ravel()

        return read

    sizes = {label: {n: m.shape(n) for n in m.names} for label, m in able.items()}
    return _pairs({label: reader(m) for label, m in able.items()}, sizes)


def of_checkpoints(base: str | Path, tuned: Mapping[str, str | Path]) -> list[Dispute]:
    """Every pair of fine-tuned checkpoints of one base, by their task vectors; only matrices are looked at.

    Raises BadInput where shapes differ.
    """
    origin = Checkpoint.open(base)
    readers: dict[str, Reader] = {}
    sizes: dict[str, dict[str, tuple[int, ...]]] = {}
    for label, path in tuned.items():
        model = Checkpoint.open(path)
        names = [n for n in origin.names if n in model and len(origin.entry(n).shape) > 1]
        for n in names:
            if model.entry(n).shape != origin.entry(n).shape:
                raise BadInput(
                    f"{path}: tensor {n!r} has shape {model.entry(n).shape}, in {base} {origin.entry(n).shape}"
                )
        sizes[label] = {n: origin.entry(n).shape for n in names}

        def read(name: str, model: Checkpoint = model) -> Values:
            return (model.read_float32(name) - origin.read_float32(name)).ravel()

        readers[label] = read
    return _pairs(readers, sizes)


def _pairs(readers: Mapping[str, Reader], sizes: Mapping[str, Mapping[str, object]]) -> list[Dispute]:
    found = []
    for a, b in itertools.combinations(readers, 2):
        dispute = Dispute(a, b)
        for name in [n for n in sizes[a] if sizes[b].get(n) == sizes[a][n]]:
            here = conflict(readers[a](name), readers[b](name))
            dispute.by_tensor[name] = here
            dispute.total.add(here)
        found.append(dispute)
    return found


def conflict(a: Values, b: Values) -> Conflict:
    """Two flat arrays of evidence over the same weights. Values that are not finite count as none.

    Chance: b is moved on by half of its length, which breaks what stands at one weight and keeps both distributions.
    """
    found = Conflict(len(a))
    moved = np.roll(b, len(b) // 2) if len(b) > 1 else b
    for start in range(0, len(a), PIECE):
        x = np.nan_to_num(a[start : start + PIECE], posinf=0, neginf=0)
        for other, chance in ((b, False), (moved, True)):
            y = np.nan_to_num(other[start : start + PIECE], posinf=0, neginf=0)
            both = np.minimum(np.abs(x), np.abs(y))
            same = (x > 0) == (y > 0)  # where one is 0 the smaller size is 0: it counts for neither
            agreed = float(both[same].sum(dtype=np.float64))
            opposed = float(both.sum(dtype=np.float64)) - agreed
            if chance:
                found.agreed_by_chance, found.opposed_by_chance = (
                    found.agreed_by_chance + agreed,
                    found.opposed_by_chance + opposed,
                )
            else:
                found.agreed, found.opposed = found.agreed + agreed, found.opposed + opposed
                found.either += float(np.maximum(np.abs(x), np.abs(y)).sum(dtype=np.float64))
    return found


def picture(disputes: Sequence[Dispute]) -> Figure:
    """One map a pair, layers by modules: the share of evidence that is opposed, in times of chance, on one scale."""
    layers = in_order(layer_of(n) for d in disputes for n in d.by_tensor)
    modules = sorted({module_of(n) for d in disputes for n in d.by_tensor})
    columns = min(3, len(disputes))
    rows = -(-len(disputes) // columns)
    figure = plots.new_figure(1.5 + 3.2 * columns, 1.2 + rows * max(2.0, 0.5 + 0.22 * len(layers)))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(disputes) :]:
        axes.set_visible(False)
    for axes, dispute in zip(grid.flat, disputes, strict=False):
        values = np.full((len(layers), len(modules)), np.nan)
        for (layer, module), c in dispute.by(lambda n: (layer_of(n), module_of(n))).items():
            if c.opposed_by_chance:
                values[layers.index(layer), modules.index(module)] = c.opposed / c.opposed_by_chance
        image = axes.imshow(values, vmin=0, vmax=2, cmap="PuOr_r", aspect="auto")  # 1, the middle, is chance
        axes.set_xticks(range(len(modules)), modules, rotation=60, ha="right", fontsize=7)
        axes.set_yticks(range(len(layers)), [layer_name(n) for n in layers], fontsize=7)
        axes.set_title(f"{dispute.a}, {dispute.b}: {dispute.total.share('opposed'):.1%} opposed", fontsize=8)
    figure.colorbar(image, ax=list(grid.flat), shrink=0.8, label="opposed evidence, times chance")
    return figure

"""How much masks overlap in what they prune, against what chance and a common start would give.

A common start is a baseline because masks that start from the same scores overlap before they have learnt anything.
`untrained` has the mask that training started from: from stored scores, the seed, or the base's weights.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mftmerge import bits, cut, notebook, plots
from mftmerge.checkpoint import Checkpoint
from mftmerge.errors import BadInput, shown
from mftmerge.mask import Mask, Scores
from mftmerge.names import in_order, layer_name, layer_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass
class Overlap:
    """Counts over the weights that two masks both cover, added up over tensors.

    expected: weights pruned by both if the two pruned independently within each tensor. from_start: the same if both
    left one common untrained mask independently of each other; None where that mask is not known.
    """

    size: int = 0
    pruned_a: int = 0
    pruned_b: int = 0
    both: int = 0
    expected: float = 0.0
    from_start: float | None = None

    def _jaccard(self, both: float) -> float:
        either = self.pruned_a + self.pruned_b - both
        return both / either if either else 1.0

    def _agreement(self, both: float) -> float:
        return 1 - (self.pruned_a + self.pruned_b - 2 * both) / self.size if self.size else 1.0

    @property
    def jaccard(self) -> float:
        """Pruned by both over pruned by either (1 where neither prunes anything)."""
        return self._jaccard(self.both)

    @property
    def agreement(self) -> float:
        """Share of weights on which the masks say the same."""
        return self._agreement(self.both)

    @property
    def jaccard_independent(self) -> float:
        return self._jaccard(self.expected)

    @property
    def agreement_independent(self) -> float:
        return self._agreement(self.expected)

    @property
    def jaccard_from_start(self) -> float | None:
        return None if self.from_start is None else self._jaccard(self.from_start)

    def add(self, other: Overlap) -> None:
        """Add the counts of another tensor. The baseline of a common start is known only if it is for all of them."""
        known = self.size == 0 or self.from_start is not None
        self.from_start = (
            (self.from_start or 0.0) + other.from_start if known and other.from_start is not None else None
        )
        self.size += other.size
        self.pruned_a, self.pruned_b = self.pruned_a + other.pruned_a, self.pruned_b + other.pruned_b
        self.both, self.expected = self.both + other.both, self.expected + other.expected

    def to_json(self) -> dict[str, Any]:
        names = ("jaccard", "agreement", "jaccard_independent", "agreement_independent", "jaccard_from_start")
        return asdict(self) | {n: getattr(self, n) for n in names}


@dataclass(frozen=True)
class Pair:
    """Two masks. start: their untrained masks against each other, None unless both are known."""

    a: str
    b: str
    tensors: int
    total: Overlap
    by_layer: dict[int | None, Overlap]
    start: Overlap | None


@dataclass(frozen=True)
class Comparison:
    """All pairs of some masks. moved: each mask against its own untrained mask, where that is known."""

    names: list[str]
    pairs: list[Pair]
    moved: dict[str, Overlap]

    def matrix(self, value: Callable[[Pair], float]) -> list[list[float]]:
        """A symmetric table of a value of the pairs, 1 on the diagonal."""
        table = [[1.0] * len(self.names) for _ in self.names]
        for (i, j), pair in zip(itertools.combinations(range(len(self.names)), 2), self.pairs, strict=True):
            table[i][j] = table[j][i] = value(pair)
        return table

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Headings, and a row a pair: overlap and agreement beside what chance gives."""
        heads = ["masks", "tensors", "Jaccard", "independent", "common start", "agreement", "independent"]
        lines = []
        for p in self.pairs:
            t = p.total
            begun = "unknown" if t.jaccard_from_start is None else f"{t.jaccard_from_start:.4f}"
            agreement = f"{t.agreement:.4f}", f"{t.agreement_independent:.4f}"
            numbers = f"{t.jaccard:.4f}", f"{t.jaccard_independent:.4f}", begun, *agreement
            lines.append([f"{p.a}, {p.b}", str(p.tensors), *numbers])
        return heads, lines

    def plot(self) -> Figure:
        """A matplotlib figure: overlap of the pairs, and by layer beside the two baselines."""
        return picture(self)

    def _repr_html_(self) -> str:
        """In a notebook: the table of pairs."""
        return notebook.table(*self.rows())

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "masks": self.names,
            "pairs": [
                {"a": p.a, "b": p.b, "tensors": p.tensors}
                | p.total.to_json()
                | {"start": p.start.to_json() if p.start else None}
                | {"by_layer": {layer_name(k): o.to_json() for k, o in p.by_layer.items()}}
                for p in self.pairs
            ],
            "moved": {name: overlap.to_json() for name, overlap in self.moved.items()},
        }


def compare(masks: Sequence[Mask | str | Path], names: Sequence[str] | None = None) -> Comparison:
    """Compare every pair of masks on the tensors that both cover. Streams; raises BadInput on different shapes.

    The baselines of untrained masks stand beside where they can be had (see `untrained`).
    """
    if len(masks) < 2:
        raise BadInput("compare needs at least two masks")
    names = names or labels(masks)
    opened = [Mask.of(mask) for mask in masks]
    starts = [untrained(m) for m in opened]
    pairs = []
    for a, b in itertools.combinations(range(len(masks)), 2):
        pairs.append(_pair(names[a], names[b], opened[a], opened[b], starts[a], starts[b]))
    moved = {
        name: _pair(name, name, mask, begun, None, None).total
        for name, mask, begun in zip(names, opened, starts, strict=True)
        if begun is not None
    }
    return Comparison(list(names), pairs, moved)


def labels(masks: Sequence[Mask | str | Path]) -> list[str]:
    """What masks are called: files by their names, or their paths where two have one name; others by their place."""
    files = [Path(mask).name if not isinstance(mask, Mask) else f"mask {i}" for i, mask in enumerate(masks, 1)]
    return [name if files.count(name) == 1 else str(mask) for name, mask in zip(files, masks, strict=True)]


def _pair(name_a: str, name_b: str, a: Mask, b: Mask, start_a: Mask | None, start_b: Mask | None) -> Pair:
    total, layers, starts = Overlap(), dict[int | None, Overlap](), Overlap()
    common = [n for n in a.names if n in b]
    for name in common:
        if a.shape(name) != b.shape(name):
            raise BadInput(f"{name_b}: tensor {name!r} has shape {b.shape(name)}, in {name_a} it has {a.shape(name)}")
        here = _overlap(name, a, b)
        if start_a is not None and start_b is not None:
            starts.add(_overlap(name, start_a, start_b))
            here.from_start = _from_common_start(name, a, b, start_a, start_b)
        total.add(here)
        layers.setdefault(layer_of(name), Overlap()).add(here)
    ordered = dict(sorted(layers.items(), key=lambda item: (item[0] is None, item[0] or 0)))
    return Pair(name_a, name_b, len(common), total, ordered, starts if starts.size else None)


def _overlap(name: str, a: Mask, b: Mask) -> Overlap:
    """Counts for one tensor, in one pass."""
    size = a.size(name)
    kept_a = kept_b = kept_both = 0
    for x, y in zip(a.pieces(name), b.pieces(name), strict=True):
        kept_a, kept_b, kept_both = kept_a + bits.count(x), kept_b + bits.count(y), kept_both + bits.count(x & y)
    pruned_a, pruned_b = size - kept_a, size - kept_b
    both = size - kept_a - kept_b + kept_both
    return Overlap(size, pruned_a, pruned_b, both, pruned_a * pruned_b / size if size else 0.0)


def _from_common_start(name: str, a: Mask, b: Mask, start_a: Mask, start_b: Mask) -> float | None:
    """Expected number pruned by both if each left the same start independently; None where the starts differ."""
    start = _overlap(name, start_a, start_b)
    if not start.both == start.pruned_a == start.pruned_b:
        return None
    stayed_a, stayed_b = _overlap(name, a, start_a), _overlap(name, b, start_b)
    inside, outside = start.both, start.size - start.both
    expected = stayed_a.both * stayed_b.both / inside if inside else 0.0
    left = (stayed_a.pruned_a - stayed_a.both) * (stayed_b.pruned_a - stayed_b.both)
    return expected + (left / outside if outside else 0.0)


# -- pictures ----------------------------------------------------------------------------------------------------------


def picture(comparison: Comparison) -> Figure:
    """Left: Jaccard of the pruned sets of each pair. Right: the same by layer, with the two baselines dashed/dotted."""
    names, pairs = plots.labels(comparison.names), comparison.pairs
    figure = plots.new_figure(6.5 + 0.6 * len(names), max(3.2, 1.5 + 0.5 * len(names)))
    left, right = figure.subplots(1, 2, width_ratios=[len(names) + 1, 5])
    _matrix(figure, left, names, np.array(comparison.matrix(lambda p: p.total.jaccard)))
    layers = in_order(n for p in pairs for n in p.by_layer)
    place = {n: i for i, n in enumerate(layers)}
    for i, pair in enumerate(pairs):
        at, colour = [place[n] for n in pair.by_layer], f"C{i % 10}"
        every = pair.by_layer.values()
        label, mark = shown(f"{pair.a}, {pair.b}"), plots.MARKERS[i % len(plots.MARKERS)]
        right.plot(at, [o.jaccard for o in every], f"{mark}-", color=colour, label=label, markersize=4)
        right.plot(at, [o.jaccard_independent for o in every], "--", color=colour, linewidth=0.8)
        if pair.total.jaccard_from_start is not None:
            right.plot(at, [o.jaccard_from_start for o in every], ":", color=colour)
    right.set_xticks(range(len(layers)), [layer_name(n) for n in layers])
    right.set_xlabel("layer")
    right.set_ylabel("Jaccard of pruned sets")
    right.set_ylim(bottom=0)
    if len(pairs) <= 10:
        right.legend(
            fontsize=7,
            title="dashed: independent\ndotted: from a common start",
            title_fontsize=7,
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
        )
    return figure


def _matrix(figure: Figure, axes: Axes, names: list[str], values: cut.Floats) -> None:
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title("pruned sets, Jaccard", fontsize=9)
    for i in range(len(names)):
        for j in range(len(names)):
            shade = "white" if values[i, j] < 0.6 else "black"
            axes.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", color=shade, fontsize=7)
    figure.colorbar(image, ax=axes, shrink=0.7)


# -- the mask before training -----------------------------------------------------------------------------------------


def untrained(mask: Mask) -> Mask | None:
    """The mask before training, with the same number of weights dropped in each tensor; None where it is not known.

    Sources, in this order: the file's `::init` scores; init "normal", drawn again from the seed (imports torch) if
    the result has the recorded digest; init "magnitude", from the base where it is a local checkpoint and the tensors
    have the recorded fingerprints.
    """
    training = mask.info.training
    rule = training.get("selection", "abs" if training.get("init") == "normal" else "signed")
    read: Callable[[str], Scores] | None = None
    if mask.has_initial_scores:
        read = mask.initial_scores
    elif training.get("init") == "normal" and isinstance(training.get("seed"), int):
        read = _draw(mask, training)
    elif training.get("init") == "magnitude" and mask.info.base and Path(mask.info.base).is_dir():
        read, rule = _magnitudes(mask), "signed"
    if read is None:
        return None
    packed = {}
    for name in mask.names:
        scores = cut.refuse_nan(read(name))
        scores = np.abs(scores) if rule == "abs" else scores
        packed[name] = bits.pack(cut.keep_top(scores, mask.size(name) - mask.count(name)))
    return Mask(packed, {n: mask.shape(n) for n in mask.names})


def exchanged(mask: Mask, start: Mask) -> dict[str, int]:
    """Tensor -> number of weights that `mask` drops and `start`, the mask before training, keeps."""
    return {
        name: sum(bits.count(~a & b) for a, b in zip(mask.pieces(name), start.pieces(name), strict=True))
        for name in mask.names
    }


def learnt_picture(mask: Mask) -> Figure:
    """What training changed, by layer and module; where the mask before it is not known, the densities."""
    found, start = mask.inspect(), untrained(mask)
    return plots.density_by_layer(found) if start is None else plots.exchanged_by_layer(found, exchanged(mask, start))


def _draw(mask: Mask, training: dict[str, Any]) -> Callable[[str], Scores] | None:
    """Normal scores from the seed, None unless they have the digest that was recorded (fused tensors do not)."""
    from mftmerge.seeded import normal_scores  # draws with torch, whose numbers they are

    def draw(name: str) -> Scores:
        drawn: Scores = normal_scores(name, mask.shape(name), training["seed"]).numpy()
        return drawn

    h = hashlib.blake2b(digest_size=16)
    for name in mask.names:
        h.update(f"{name}\0{mask.shape(name)}\0".encode())
        h.update(draw(name).tobytes())
    return draw if training.get("init_digest") == h.hexdigest() else None


def _magnitudes(mask: Mask) -> Callable[[str], Scores] | None:
    """|W| of the base's tensors, None where they are not those that the mask was trained on."""
    base = Checkpoint.open(str(mask.info.base))
    for name in mask.names:  # a fingerprint covers the shape too
        if name not in base or mask.info.fingerprints.get(name) != base.fingerprint(name):
            return None
    return lambda name: np.abs(base.read_float32(name))

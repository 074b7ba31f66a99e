"""One combination, checked before any work: who covers which tensor, and what the result is on any range of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from mftmerge import bits, cut, operations
from mftmerge.bits import Words
from mftmerge.errors import BadInput
from mftmerge.mask import PIECE, Mask
from mftmerge.maskstore import require_one_kind
from mftmerge.names import in_order, layer_of
from mftmerge.operations import Operation, find

SCORED_PIECE = 1 << 17  # weights handled at a time where scores (4 bytes each, several times) are read too


class Combination:
    """One operation on some masks, checked: knows who covers a tensor and computes any range of the result."""

    def __init__(
        self,
        op: str,
        masks: Sequence[Mask],
        names: Sequence[str],
        *,
        density: float | str | Sequence[float] | None = None,
        uncovered: Literal["abstain", "keep"] = "abstain",
        **options: object,
    ) -> None:
        self.op: Operation = find(op)
        self.masks, self.names = list(masks), list(names)
        self.density, self.uncovered = density, uncovered
        self.alone: float | None = None  # the density of tensors that one mask covers, where it is not `density`
        self.options = self.op.checked(options)
        self.notes: list[str] = []
        self._check_arguments()
        require_one_kind({label: mask.info for label, mask in zip(self.names, self.masks, strict=True)})
        self.shapes = self._shapes()
        if self.op.support is None:
            self._check_scores()
        self.shares = [] if self.density is None else cut.profile(self.density)
        layers = in_order(map(layer_of, self.shapes))
        self.layers = [layer for layer in layers if layer is not None]
        if len(self.shares) > max(len(self.layers), 1):
            raise BadInput(
                f"density has {len(self.shares)} shares for {len(self.layers)} covered layers; give at most one a layer"
            )

    def _check_arguments(self) -> None:
        most = self.op.most
        if not self.masks or (most is not None and len(self.masks) > most):
            raise BadInput(f"{self.op.name} takes {most or 'at least 1'} mask{'s'[: most != 1]}, got {len(self.masks)}")
        if len(self.names) != len(self.masks):
            raise BadInput(f"{len(self.names)} names for {len(self.masks)} masks")
        if self.uncovered not in ("abstain", "keep"):
            raise BadInput(f"uncovered is 'abstain' or 'keep', not {self.uncovered!r}")
        weights = self.options.get("weights")
        if weights is not None and len(weights) != len(self.masks):
            raise BadInput(f"{len(weights)} weights for {len(self.masks)} masks; give one a mask")
        if self.op.name == "vote" and weights is not None:
            operations.whole_weights(weights)
        kind, value = operations.parse_threshold(self.options.get("threshold"))
        if "threshold" in self.options:
            self.options["threshold"] = int(value) if kind == "count" else float(value)
        if kind == "count" and value > len(self.masks):
            raise BadInput(f"threshold {value} is above the number of masks, {len(self.masks)}; give fewer, or a share")

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        owner: dict[str, str] = {}
        for label, mask in zip(self.names, self.masks, strict=True):
            for name in mask.names:
                shape = shapes.setdefault(name, mask.shape(name))
                if shape != mask.shape(name):
                    raise BadInput(
                        f"{label}: tensor {name!r} has shape {mask.shape(name)}, in {owner[name]} it has {shape}; "
                        "masks must come from the same architecture"
                    )
                owner.setdefault(name, label)
        if self.op.ordered and self.uncovered == "abstain":
            shapes = {n: s for n, s in shapes.items() if n in self.masks[0]}
        return dict(sorted(shapes.items()))

    def _check_scores(self) -> None:
        """What an operation on scores needs; sets the density that the masks were trained at where none is given."""
        if self.uncovered == "keep":
            raise BadInput(f"{self.op.name}: an uncovered tensor has no scores; use --uncovered abstain")
        for label, mask in zip(self.names, self.masks, strict=True):
            if not mask.has_scores:
                raise BadInput(f"{label}: carries no scores (nor a scores file beside it); train with scores saved")
        if self.density is None:
            keeps = {m.info.keep for m in self.masks}
            if len(keeps) != 1 or None in keeps:
                raise BadInput(f"{self.op.name}: the masks name no common density; give --density")
            self.alone = keeps.pop()
            self.density = float(operations.combined_density(self.alone, len(self.masks)))
        rules = {m.info.training.get("selection", "signed") for m in self.masks}
        if len(rules) != 1 or not rules <= {"signed", "abs"}:
            raise BadInput(f"{self.op.name}: masks select by different rules ({', '.join(map(str, sorted(rules)))})")
        shared = [n for n in self.shapes if len(self.covering(n)) > 1]
        differing = [n for n in shared if not self._same_start(n, self.covering(n))]
        if differing and not self.options.get("allow_different_init"):
            raise BadInput(
                f"{self.op.name}: masks started from different scores on {differing[0]!r}, so their evidence does not "
                "add up; train with one init and seed, or give --allow-different-init"
            )
        if differing:
            self.notes.append(f"masks started from different scores on {len(differing)} tensors (allowed)")
        if any(not self._initial(n, self.covering(n)) for n in shared):
            self.notes.append("no mask carries the scores before training: weights are scaled to sum to 1")
        for name in self.shapes:  # what the function itself refuses, it refuses on one score too, before the work
            covering, one = self.covering(name), np.zeros(1, np.float32)
            initial = [one] * len(self._initial(name, covering))
            self.op.function([one] * len(covering), initial, **self._options(covering))

    def _same_start(self, name: str, covering: Iterable[int]) -> bool:
        """Whether masks began with the same scores on a tensor, as far as their training says.

        Their digests are equal, or say nothing because they cover other tensors besides, and the scores come from the
        same seed, or from the same weights.
        """
        infos = [self.masks[d].info for d in covering]
        if len({i.training.get("init_digest") for i in infos}) == 1:
            return True
        if len({self.masks[d].names for d in covering}) == 1:
            return False
        init = {i.training.get("init") for i in infos}
        if init == {"normal"}:
            return len({i.training.get("seed") for i in infos}) == 1
        prints = {i.fingerprints.get(name) for i in infos}
        return init == {"magnitude"} and len(prints) == 1 and None not in prints

    def _initial(self, name: str, covering: Sequence[int]) -> list[int]:
        """Which mask's initial scores stand for each covering mask; empty where they are not all known."""
        owners = [d if self.masks[d].has_initial_scores else -1 for d in covering]
        if max(owners) >= 0 and self._same_start(name, covering):
            return [max(owners)] * len(owners)
        return owners if min(owners) >= 0 else []

    def covering(self, name: str) -> list[int]:
        """The masks with a say on a tensor (all of them where an uncovered tensor counts as kept)."""
        return [d for d, m in enumerate(self.masks) if name in m or self.uncovered == "keep"]

    def density_of(self, name: str) -> float | Fraction | None:
        """The density that a tensor is cut to, None where it is not cut; what is in no layer gets the mean."""
        if self.alone is not None and len(self.covering(name)) == 1:
            return self.alone
        if len(self.shares) < 2:
            return self.shares[0] if self.shares else None
        layer = layer_of(name)
        if layer is None:
            return sum(self.shares, Fraction(0)) / len(self.shares)
        return cut.between(self.shares, Fraction(self.layers.index(layer), len(self.layers) - 1))

    def _options(self, covering: list[int]) -> dict[str, Any]:
        weights = self.options.get("weights")
        return self.options | ({"weights": tuple(weights[d] for d in covering)} if weights is not None else {})

    def read(self, name: str, start: int, stop: int, covering: list[int]) -> list[Words]:
        """The words of the covering masks for bits [start, stop) of a tensor."""
        return [
            bits.words(self.masks[d].read(name, start, stop)) if name in self.masks[d] else bits.ones(stop - start)
            for d in covering
        ]

    def on_range(self, name: str, start: int, stop: int) -> tuple[Words, list[Words]]:
        """The result for bits [start, stop) of a tensor, and the words of the masks that cover it."""
        covering = self.covering(name)
        masks = self.read(name, start, stop, covering)
        result = self.op.function(masks, **self._options(covering))
        result = result.copy() if any(result is m for m in masks) else result
        bits.clear_padding(result.view(np.uint8), stop - start)
        return result, masks

    def ranked(self, name: str, dropped: int) -> Iterator[tuple[int, int, Words]]:
        """The result for one tensor less exactly `dropped` weights, in order, as (start, stop, words)."""
        covering, size = self.covering(name), math.prod(self.shapes[name])
        options = self._options(covering)
        for d in covering:
            if name in self.masks[d] and self.masks[d].has_scores:
                self.masks[d].verify_scores(name)
        if self.op.support is None:
            return cut.project(size, dropped, SCORED_PIECE, keys=self._score_keys(name, covering))
        support, weights = self.op.support, options.get("weights")
        whole = operations.whole_weights(weights)[0] if weights is not None else None

        def levels(start: int, stop: int) -> list[Words]:
            masks = self.read(name, start, stop, covering)
            votes = bits.add_up(support(masks), whole)
            return [self.op.function(masks, **options), *reversed(votes)]

        keys = self._tie_keys(name, covering)
        return cut.project(size, dropped, SCORED_PIECE if keys else PIECE * 8, levels, keys)

    def _score_keys(self, name: str, covering: list[int]) -> Callable[[int, int], cut.Keys]:
        initial, options = self._initial(name, covering), self._options(covering)
        rule = self.masks[covering[0]].info.training.get("selection", "signed")

        def keys(start: int, stop: int) -> Any:
            after = [self.masks[d].read_scores(name, start, stop) for d in covering]
            before = {d: self.masks[d].read_initial_scores(name, start, stop) for d in set(initial)}
            return cut.sortable(self.op.function(after, [before[d] for d in initial], **options), rule)

        return keys

    def _tie_keys(self, name: str, covering: list[int]) -> Callable[[int, int], cut.Keys] | None:
        """Ranks within equal votes: the sum of the strengths of the masks that carry scores; None where none does."""
        scored = [d for d in covering if name in self.masks[d] and self.masks[d].has_scores]

        def keys(start: int, stop: int) -> Any:
            total = np.zeros(stop - start, np.float32)
            for d in scored:
                strength = self.masks[d].read_scores(name, start, stop)
                total += np.abs(strength) if self.masks[d].info.training.get("selection") == "abs" else strength
            return cut.sortable(total, "signed")

        return keys if scored else None

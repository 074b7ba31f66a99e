"""The method: masks over experts, learnt through the weights of one live model that holds their merge.

    W = base + sum_k w_k M_k (expert_k - base),     M_k = 1 where the score S_k is above 0
    dL/dS_k = dL/dW * w_k * (expert_k - base)       (straight through the cut)

S_k starts as the rank of |expert_k - base| in its matrix, minus the rank at which the start cuts. Adam divides a
gradient by its own running size, so that the constant factor w_k (expert_k - base) leaves nothing of itself in a step
but its sign. So one tensor serves all experts: U, the way of the weight itself under Adam, starting from 0, and

    S_k = start_k + sign(w_k (expert_k - base)) * U

An expert's change is kept when the loss wants the weight to move its way, and its size counts through its rank. The
state is 12 bytes a weight and one rank an expert, instead of 12 bytes an expert. Like `MaskOptimizer`, this patches
nothing: the model's parameters hold W, and `step()` turns their gradients into new masks and refreshes them in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mftmerge import cut
from mftmerge.errors import BadInput
from mftmerge.learn.merging import PIECE, Kept, Part
from mftmerge.learn.parameters import Holders
from mftmerge.select import choose
from mftmerge.train import adam, selection
from mftmerge.train.parallel import each
from mftmerge.train.sharding import Shard, gathered_anew
from mftmerge.train.targets import Target

EPSILON = 1e-12  # of Adam; gradients of single weights are small, and only their direction is to count


class MergeOptimizer(torch.optim.Optimizer):
    """Learns which weights take which expert's change. From construction on, the parameters hold the merge.

    parts: the tensors that change, by name, on the device of the parameters. Where these are sharded by rows (FSDP2):
    this rank's rows of them; then every rank makes the same calls, and masks and scores are whole on each. start: share
    of each expert's changes that is kept at first. density: share of each tensor that each mask keeps, exactly (None:
    what scores above 0).
    starts: initial scores by tensor and expert, instead of ranks. Where the parts select, a weight is that of the
    expert with the highest score above 0, else the base's.
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        holders: Holders,
        *,
        lr: float,
        start: float = 0.5,
        density: float | None = None,
        clip: float | None = None,
        adam_bits: int = 32,
        starts: Mapping[str, list[Tensor]] | None = None,
    ) -> None:
        self.parts, self.holders = dict(parts), holders
        self.targets = holders.targets(parts)
        self.density, self.clip, self.adam_bits = None if density is None else cut.exact(str(density)), clip, adam_bits
        self.flipped = 0  # weights whose value the last step changed
        self.gradient_norm = 0.0  # of all weights together at the last step, before clipping
        self.steps = 0
        self._kept = 0  # weights that all masks keep
        self.starts: dict[str, list[Tensor]] = {}
        self.way: dict[str, dict[str, Tensor]] = {}  # by tensor: "score" (U) and Adam's moments
        self._sides = {name: [1 if f > 0 else -1 for f in part.factors()] for name, part in parts.items()}
        super().__init__([t.parameter for t in self.targets], {"lr": lr, "betas": (0.9, 0.999), "eps": EPSILON})
        for name, part in self.parts.items():
            # One way a weight, for all experts: see above. `adam` calls what it steps "score".
            zero = torch.zeros(part.shape, device=part.base.device)
            self.way[name] = {"score": zero, **adam.start(zero, adam_bits)}
        # A target holds tensors that are all in `parts`: whatever else it holds stays as the parts say.
        self._by_target = [(t, [n for n in holders.of[t.name] if n in self.parts]) for t in self.targets]
        lacking = [n for t, names in self._by_target for n in holders.of[t.name] if n not in self.parts]
        if lacking:
            raise BadInput(f"{lacking[0]}: is fused with tensors that are learnt and must be given too")
        self._holding = {n: t.parameter for t, names in self._by_target for n in names}
        self._group = Shard.of(self.targets[0].parameter).group
        given = starts or {}
        named = list(self.parts.items())
        made = each(lambda item: given.get(item[0]) or self._ranks(item[1], start), named, self._device)
        self.starts = dict(zip(self.parts, made, strict=True))
        self.refresh()

    @staticmethod
    def _ranks(part: Part, start: float) -> list[Tensor]:
        return [part.ranks(k) - (1 - start) for k in range(len(part.experts))]

    @property
    def _device(self) -> torch.device:
        return self.targets[0].parameter.device

    @property
    def size(self) -> int:
        """Weights that each mask covers, on all ranks."""
        return sum(t.parameter.numel() for t in self.targets)

    def _added_up(self, number: int) -> int:
        """A count over this rank's rows as one over all rows."""
        if self._group is None:
            return number
        total = torch.tensor(number, device=self._device)
        torch.distributed.all_reduce(total, group=self._group)
        return int(total)

    # -- the step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], object] | None = None) -> Any:
        """One step on the scores; the parameters hold the new merge. Gives what `closure` gives, where there is one.

        Raises MftmergeError, with scores and parameters unchanged, when a gradient is not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients: dict[str, Tensor] = {}
        for t, names in self._by_target:
            if t.parameter.grad is not None and names:
                gradients |= self.holders.split(t.name, Shard.local(t.parameter.grad))
        squares = [torch.linalg.vector_norm(g, dtype=torch.float32).square() for g in gradients.values()]
        self.gradient_norm, divisor = adam.norm_and_divisor(squares, self.clip, self.steps, self._group)
        group = self.param_groups[0]

        def update(name: str) -> None:
            adam.step(name, self.way[name], gradients[name], divisor, group)

        each(update, list(gradients), self._device)
        self.steps += 1
        self.refresh()
        return loss

    # -- masks --------------------------------------------------------------------------------------------------------

    def scores_of(self, name: str, expert: int, piece: slice | None = None) -> Tensor:
        """An expert's scores in one tensor, or in a piece of it (flat), float32; -inf where it changed nothing."""
        part, way = self.parts[name], self.way[name]["score"]
        tensors = (self.starts[name][expert], part.expert(expert), part.base, way)
        start, own, base, way = tensors if piece is None else (t.reshape(-1)[piece] for t in tensors)
        up = torch.gt if self._sides[name][expert] < 0 else torch.lt  # a change whose weight is negative counts down
        return selection.negated(way, up(own, base)).add_(start)

    def _keeper(self, name: str, *, first: bool = False) -> Kept:
        """Tells of a piece of a tensor, flat, which weights each expert keeps. Now, or before the first step.

        A step's cost is memory that is touched: in pieces the scores never leave the processor's cache.
        """
        part, starts = self.parts[name], [s.reshape(-1) for s in self.starts[name]]
        numbers = range(len(part.experts))
        cut_ones = [self._cut(name, k, first) for k in numbers] if self.density is not None else None

        def scores(k: int, piece: slice) -> Tensor:
            return starts[k][piece] if first else self.scores_of(name, k, piece)

        def keeps(piece: slice) -> list[Tensor]:
            if cut_ones is not None and not part.selecting:
                return [c[piece] for c in cut_ones]
            found: list[Tensor] = []
            best: Tensor | None = None  # score so far, where the experts exclude each other
            for k in numbers:
                score = scores(k, piece)
                kept = score > 0 if cut_ones is None else cut_ones[k][piece]
                if part.selecting:
                    best = torch.zeros_like(score) if best is None else best
                    kept = kept & (score > best)
                    found = [f & ~kept for f in found]
                    best = choose(kept, score, best)
                found.append(kept)
            return found

        return keeps

    def _cut(self, name: str, expert: int, first: bool) -> Tensor:
        """What an expert keeps at the density asked for, booleans, flat."""
        assert self.density is not None
        scores = (self.starts[name][expert] if first else self.scores_of(name, expert)).reshape(-1)
        # A sharded parameter is one tensor; one that is not may hold several, and all of each is here.
        size = scores.numel() if self._group is None else self._holding[name].numel()
        kept = selection.keep_top(scores, cut.drop_count(size, self.density), self._group)
        return kept & (scores > -torch.inf)

    def codes(self, name: str, *, first: bool = False) -> Tensor:
        """Which experts keep each weight of a tensor's rows here: bit k for expert k. Now, or before the first step."""
        part = self.parts[name]
        dtype = torch.uint8 if len(part.experts) <= 8 else torch.int32
        found = torch.zeros(part.base.numel(), dtype=dtype, device=part.base.device)
        keeps = self._keeper(name, first=first)
        for start in range(0, found.numel(), PIECE):
            piece = slice(start, start + PIECE)
            for k, kept in enumerate(keeps(piece)):
                found[piece] |= kept.to(dtype) << k
        return found.view(part.shape)

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the merge under the current scores into the parameters."""

        def write(pair: tuple[Target, list[str]]) -> tuple[int, int]:
            return self._write({n: self._keeper(n) for n in pair[1]}, pair[0])

        # Collective operations, of an exact density's cut, must come in the same order on every rank.
        serial = self._group is not None
        done = [write(t) for t in self._by_target] if serial else each(write, self._by_target, self._device)
        self.flipped, self._kept = (self._added_up(sum(numbers)) for numbers in zip(*done, strict=True))
        self._is_written()

    def _write(self, keepers: Mapping[str, Kept], target: Target) -> tuple[int, int]:
        """Write the merge of what these keep into a parameter; gives how many weights changed and are kept."""
        total = 0

        def counted(name: str) -> Kept:
            def keeps(piece: slice) -> Sequence[Tensor]:
                nonlocal total
                found = keepers[name](piece)
                total += sum(int(torch.count_nonzero(kept)) for kept in found)
                return found

            return keeps

        own = Shard.local(target.parameter.data)
        live = own
        merged: Iterable[tuple[slice, Tensor]]
        if (only := self.holders.plain(target.name)) is not None and live.is_contiguous():
            merged = self.parts[only].pieces(counted(only))
        else:
            whole = self.holders.join(target.name, {n: self.parts[n].merged(counted(n)) for n in keepers})
            merged = [(slice(None), whole.reshape(-1))]
            live = live.contiguous()
        flat, changed = live.view(-1), 0
        for piece, values in merged:
            new = values.to(live.dtype)
            changed += int(torch.count_nonzero(new != flat[piece]))
            flat[piece] = new
        if live.data_ptr() != own.data_ptr():
            own.copy_(live)
        return changed, total

    @property
    def current_keep(self) -> float:
        """The share of the experts' weights that the masks keep now."""
        experts = max((len(p.experts) for p in self.parts.values()), default=1)  # every part has all of them
        return self._kept / (experts * self.size)

    def mask(self, *, first: bool = False) -> dict[str, Tensor]:
        """The codes on the CPU by tensor name, of now or before the first step; whole tensors."""
        return {name: self._whole(name, self.codes(name, first=first)) for name in self.parts}

    def scores(self, *, first: bool = False) -> dict[str, Tensor]:
        """float32 scores on the CPU by tensor name, shape (experts, ...), now or before the first step."""
        found = {}
        for n, part in self.parts.items():
            own = [self.starts[n][k] if first else self.scores_of(n, k) for k in range(len(part.experts))]
            found[n] = torch.stack([self._whole(n, scores) for scores in own])
        return found

    def _whole(self, name: str, local: Tensor) -> Tensor:
        """A tensor on the CPU, from every rank's rows of it."""
        p = self._holding[name]
        return Shard.of(p).whole(local, p).cpu()

    @torch.no_grad()
    def put(self, codes: Mapping[str, Tensor]) -> None:
        """Write the merge under codes as from `mask()` into the parameters."""
        for t, names in self._by_target:
            self._write({n: self._as_told(n, codes[n]) for n in names}, t)
        self._is_written()

    def _is_written(self) -> None:
        """No pass goes on with what was there before: inside autocast, or where the model is sharded."""
        torch.clear_autocast_cache()
        gathered_anew(self.holders.model)

    def _as_told(self, name: str, codes: Tensor) -> Kept:
        flat = Shard.of(self._holding[name]).rows(codes).to(self._device).reshape(-1)
        return lambda piece: [flat[piece] & (1 << k) != 0 for k in range(len(self.parts[name].experts))]

    @contextmanager
    def masked_by(self, kept: Mapping[str, Tensor]) -> Iterator[None]:
        """Other codes (as from `mask()`) inside the block, the current ones after it."""
        self.put(kept)
        try:
            yield
        finally:
            self.refresh()

    @torch.no_grad()
    def put_expert(self, number: int | None) -> None:
        """Write an expert whole into the parameters, unmerged; None: the base."""
        for t, names in self._by_target:
            own = {n: self.parts[n].base if number is None else self.parts[n].expert(number) for n in names}
            Shard.local(t.parameter.data).copy_(self.holders.join(t.name, own))
        self._is_written()

    # -- saving -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The way of each weight, moments and counters; the models' weights are their files' and not stored again."""
        return {"way": self.way, "steps": self.steps, "lr": self.param_groups[0]["lr"]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`, bit for bit."""
        if set(state_dict["way"]) != set(self.way):
            raise BadInput("the saved state covers other tensors; resume with the same models")
        for name, saved in state_dict["way"].items():
            adam.load(self.way[name], saved, self.adam_bits)
        self.steps, self.param_groups[0]["lr"] = int(state_dict["steps"]), state_dict["lr"]
        self.refresh()

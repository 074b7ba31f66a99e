"""The method: mask fine-tuning as one `torch.optim.Optimizer`.

Zhang et al., "Boosting Large Language Models with Mask Fine-Tuning" (arXiv 2503.22764): freeze the weights `W`, learn a
score `S` for each, keep the top share of the scores of each matrix, and pass the gradient straight through the cut:

    forward with W * M,     M = 1 where |S| is among the largest `keep` share of its matrix
    dL/dS = dL/d(W * M) * W * sign(S)            (without the sign where the scores are ranked as signed numbers)

Here the model's own parameter holds `W * M`. Nothing in the model is patched and nothing runs in the forward pass:
after backward, `p.grad` is already `dL/d(W * M)`; `step()` turns it into `dS`, steps Adam on the scores, finds the
exact cut and refreshes the parameter in place, by selection, so that no weight is ever rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

import torch
from torch import Tensor

from mftmerge import cut
from mftmerge.errors import BadInput
from mftmerge.select import choose, kept_or_zero
from mftmerge.train import adam, selection
from mftmerge.train.parallel import each
from mftmerge.train.sharding import Shard
from mftmerge.train.targets import Target

Result = TypeVar("Result")


@dataclass(frozen=True)
class Start:
    """Where scores began, for a mask that is to carry them: how they were made, and float32 scores by name."""

    init: str
    seed: int
    scores: Mapping[str, Tensor]


class MaskOptimizer(torch.optim.Optimizer):
    """Learns which weights of the target parameters to keep. From construction on, the parameters hold `W * M`.

    targets: from `targets.find`, or (name, parameter) pairs, each a matrix.
    scores: float32 initial scores by name, of the parameters' shapes (see `train.scores`).
    keep: share of weights kept in each matrix (exactly `size - floor((1 - keep) * size)` weights).
    signed: rank scores as signed numbers (scores that start from magnitudes) or by absolute value (the paper's).
    scope: "matrix", or "global" for one cut over all targets. pattern: (2, 4) keeps 2 of 4 neighbours instead.
    dropped: by name, the values that dropped weights take (a base model's, for a mask over the task vector); default 0.
    clip: largest norm of all score gradients together (None: no clipping). keep_warmup: steps over which the share
    kept falls from 1 to `keep`. reference_rounding: drop `int((1 - keep) * n)` in floats, as the published code does.
    adam_bits: 32, or 8 to keep Adam's moments in 2.03 instead of 8 bytes a weight (slower, nearly the same mask).
    """

    def __init__(
        self,
        targets: Iterable[Target | tuple[str, torch.nn.Parameter]],
        scores: Mapping[str, Tensor],
        *,
        keep: float | str | Fraction = 0.9,
        lr: float = 4e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        signed: bool = True,
        scope: str = "matrix",
        pattern: tuple[int, int] | None = None,
        dropped: Mapping[str, Tensor] | None = None,
        clip: float | None = 1.0,
        keep_warmup: int = 0,
        reference_rounding: bool = False,
        adam_bits: int = 32,
    ) -> None:
        self.targets = [t if isinstance(t, Target) else Target(*t, layer=0) for t in targets]
        if scope not in ("matrix", "global"):
            raise BadInput(f"scope {scope!r}: must be matrix or global")
        if adam_bits not in (8, 32):
            raise BadInput(f"adam_bits {adam_bits!r}: must be 8 or 32")
        self.keep, self.scope, self.pattern, self.signed = cut.exact(keep), scope, pattern, signed
        self.clip, self.keep_warmup, self.reference_rounding = clip, keep_warmup, reference_rounding
        self.adam_bits = adam_bits
        self.flipped = 0  # weights switched on or off by the last step (weights that are exactly 0 never count)
        self.gradient_norm = 0.0  # of all score gradients together at the last step, before clipping
        self.steps = 0
        self.start: Start | None = None  # kept by whoever wants the mask to carry scores
        super().__init__([t.parameter for t in self.targets], {"lr": lr, "betas": betas, "eps": eps})
        with torch.no_grad():
            for t in self.targets:
                self._start(t, scores[t.name], None if dropped is None else dropped[t.name])
        self.refresh()

    def _start(self, target: Target, scores: Tensor, dropped: Tensor | None) -> None:
        p, shard = target.parameter, Shard.of(target.parameter)
        if tuple(scores.shape) != tuple(p.shape):
            raise BadInput(f"{target.name}: scores have shape {tuple(scores.shape)}, the parameter {tuple(p.shape)}")
        if self.pattern and p.shape[target.input_dim] % self.pattern[1]:
            raise BadInput(f"{target.name}: {p.shape[target.input_dim]} inputs do not divide by {self.pattern[1]}")
        local = shard.local(p)
        # float32 whatever the weights are: steps of a bfloat16 score below its rounding would be lost.
        mine = shard.rows(scores).to(device=local.device, dtype=torch.float32, copy=True).contiguous()
        self.state[p] = {"score": mine, "original": local.detach().clone(), **adam.start(mine, self.adam_bits)}
        if dropped is not None:
            self.state[p]["dropped"] = shard.rows(dropped).to(local).clone()

    # -- the step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], object] | None = None) -> Any:
        """One step on the scores. Afterwards `p.grad` has been used up: it holds the score gradient.

        Raises MftmergeError, with scores and parameters unchanged, when a gradient is not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # What took no part in the pass (an expert that no token went to) has no gradient and stays as it is.
        active = [t for t in self.targets if t.parameter.grad is not None]
        squares = each(self._prepare, active, self._device)
        ranks = Shard.of(self.targets[0].parameter).group
        # Raises before the first score has moved: a step is whole or nothing.
        self.gradient_norm, divisor = adam.norm_and_divisor(squares, self.clip, self.steps, ranks)
        group = self.param_groups[0]

        def update(t: Target) -> None:
            adam.step(t.name, self.state[t.parameter], self._gradient(t), divisor, group)

        each(update, active, self._device)
        self.steps += 1
        self.refresh()
        return loss

    def _prepare(self, target: Target) -> Tensor:
        """Turn a weight's gradient into the score's, in place, and give its sum of squares."""
        gradient = self._to_score_gradient(target, self._gradient(target))
        return torch.linalg.vector_norm(gradient, dtype=torch.float32).square()

    @property
    def _device(self) -> torch.device:
        return self.targets[0].parameter.device

    def score_gradients(self) -> dict[str, Tensor]:
        """dL/dS of every target that has a gradient, in the gradient's dtype, without a step (copies)."""
        active = [t for t in self.targets if t.parameter.grad is not None]
        return {t.name: self._to_score_gradient(t, self._gradient(t).clone()) for t in active}

    @staticmethod
    def _gradient(target: Target) -> Tensor:
        """The weight's gradient, this rank's rows."""
        assert target.parameter.grad is not None
        return Shard.local(target.parameter.grad)

    def _to_score_gradient(self, target: Target, gradient: Tensor) -> Tensor:
        """dL/d(W*M) * W [* sign(S)], in place of the weight's gradient: no memory of its own."""
        state = self.state[target.parameter]
        change = state["original"] if "dropped" not in state else state["original"] - state["dropped"]
        gradient.mul_(change)  # straight through the cut: dM/dS is taken as 1
        if not self.signed:
            gradient.mul_(state["score"].sign())
        return gradient

    # -- the cut ------------------------------------------------------------------------------------------------------

    @property
    def current_keep(self) -> Fraction:
        """The share kept now: it falls in equal steps from 1 to `keep` during the keep warm-up."""
        return 1 - (1 - self.keep) * self._done

    @property
    def _done(self) -> Fraction:
        """The share of the keep warm-up that is behind."""
        return Fraction(min(self.steps, self.keep_warmup), self.keep_warmup) if self.keep_warmup else Fraction(1)

    def _keep(self, target: Target, done: Fraction) -> Fraction:
        """The share of a target that is kept when `done` of the keep warm-up is behind."""
        return 1 - (1 - (self.keep if target.keep is None else cut.exact(target.keep))) * done

    def drop_count(self, size: int, keep: Fraction) -> int:
        """How many of `size` weights are dropped."""
        return cut.drop_count(size, keep, reference=self.reference_rounding)

    def _values(self, target: Target) -> Tensor:
        """What is ranked: the scores, or their absolute values. Local rows only."""
        score: Tensor = self.state[target.parameter]["score"]
        return score if self.signed else score.abs()  # a copy only where it has to be one

    def _for_each_kept(self, done: Fraction, use: Callable[[Target, Tensor], Result]) -> list[Result]:
        """`use(target, booleans of its local rows)` for each target; no more of them exist than there are threads."""
        whole = (
            self._global_cut(1 - (1 - self.keep) * done) if self.pattern is None and self.scope == "global" else None
        )

        def one(numbered: tuple[int, Target]) -> Result:
            number, t = numbered
            values = self._values(t)
            if self.pattern is not None:
                return use(t, selection.keep_pattern(values, *self.pattern, dim=t.input_dim))
            if whole is not None:
                return use(t, whole.keep(number, values))
            shard, shape, keep = Shard.of(t.parameter), t.parameter.shape, self._keep(t, done)
            return use(t, shard.keep_top(values, shape, t.blocks, lambda n: self.drop_count(n, keep)))

        numbered = list(enumerate(self.targets))
        if Shard.of(self.targets[0].parameter).group is not None:
            return [one(t) for t in numbered]  # collective operations must come in the same order on every rank
        return each(one, numbered, self._device)

    def _global_cut(self, keep: Fraction) -> selection.Cut:
        """One cut over all targets together."""
        size = sum(t.parameter.numel() for t in self.targets)
        group = Shard.of(self.targets[0].parameter).group
        return selection.find([self._values(t) for t in self.targets], self.drop_count(size, keep), group)

    @torch.no_grad()
    def refresh(self) -> None:
        """Write `W * M` of the current scores into the parameters, exactly."""

        def write(t: Target, kept: Tensor) -> int:
            local = Shard.local(t.parameter.data)
            new = self._select(t, kept)
            # Compared as numbers: a weight that is exactly 0 is the same kept or dropped, and -0.0 too.
            changed = torch.count_nonzero(new != local)
            local.copy_(new)
            return int(changed)

        self.flipped = sum(self._for_each_kept(self._done, write))
        torch.clear_autocast_cache()  # inside autocast, passes would go on with the weights that were cast before

    def _select(self, target: Target, kept: Tensor) -> Tensor:
        """The original weights where kept, the dropped values (0 or the base's) elsewhere. Local rows."""
        state = self.state[target.parameter]
        original: Tensor = state["original"]
        # Chosen, not multiplied: -0.0, inf or NaN times 0 is no 0, and base + delta * M would round.
        if "dropped" not in state:
            return kept_or_zero(kept, original)
        return choose(kept, original, state["dropped"])

    def mask(self) -> dict[str, Tensor]:
        """Boolean tensors on the CPU by parameter name, True = keep: at `keep`, also during the keep warm-up.

        With sharded parameters every rank must call it, and every rank gets whole tensors.
        """

        def whole(t: Target, kept: Tensor) -> Tensor:
            return Shard.of(t.parameter).whole(kept, t.parameter).cpu()

        return dict(zip((t.name for t in self.targets), self._for_each_kept(Fraction(1), whole), strict=True))

    def scores(self) -> dict[str, Tensor]:
        """float32 scores on the CPU by parameter name (copies; whole tensors on every rank)."""
        return {
            t.name: Shard.of(t.parameter).whole(self.state[t.parameter]["score"], t.parameter).cpu().clone()
            for t in self.targets
        }

    # -- base weights -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def restore(self) -> None:
        """Put the original weights back, bit for bit (the scores stay: `refresh` masks again)."""
        for t in self.targets:
            Shard.of(t.parameter).local(t.parameter.data).copy_(self.state[t.parameter]["original"])
        torch.clear_autocast_cache()

    @contextmanager
    def base_weights(self) -> Iterator[None]:
        """The original weights inside the block, the masked ones after it."""
        self.restore()
        try:
            yield
        finally:
            self.refresh()

    @contextmanager
    def masked_by(self, kept: Mapping[str, Tensor]) -> Iterator[None]:
        """Another mask (as from `mask()`) inside the block, the current one after it."""
        with torch.no_grad():
            for t in self.targets:
                shard = Shard.of(t.parameter)
                local = shard.local(t.parameter.data)
                local.copy_(self._select(t, shard.rows(kept[t.name]).to(local.device)))
        torch.clear_autocast_cache()
        try:
            yield
        finally:
            self.refresh()

    # -- saving -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Scores, moments and counters; the original weights are the base model's and are not stored again."""
        out = super().state_dict()
        out["state"] = {
            i: {k: v for k, v in s.items() if k not in ("original", "dropped")} for i, s in out["state"].items()
        }
        return out | {"steps": self.steps, "names": [t.name for t in self.targets]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`, bit for bit, and mask the parameters accordingly."""
        if list(state_dict["names"]) != [t.name for t in self.targets]:
            raise BadInput("the saved training state covers other tensors; resume with the same --layers and --modules")
        for i, t in enumerate(self.targets):
            adam.load(self.state[t.parameter], state_dict["state"][i], self.adam_bits)
        for mine, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            mine.update({k: v for k, v in saved.items() if k != "params"})
        self.steps = int(state_dict["steps"])
        self.refresh()

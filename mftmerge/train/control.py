"""What a mask is compared with: the same steps on the weights themselves, and masks that nobody trained.

A mask adds training to a model that was already trained, so a gain may come from the extra steps alone. The matched
control trains the same matrices for the same steps on the same rows with AdamW, at its own learning rate, and keeps the
best validated state likewise. The random and the smallest-magnitude mask prune as much without learning.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mftmerge.data import Tokens
from mftmerge.progress import Progress
from mftmerge.train import scores
from mftmerge.train.loop import Best, Loop
from mftmerge.train.optimizer import MaskOptimizer
from mftmerge.train.settings import TrainSettings
from mftmerge.train.targets import Target, learning_alone
from mftmerge.train.validation import Judge, Judged, judged


class WeightOptimizer(torch.optim.AdamW):
    """Fused AdamW on the targets' own weights, with what validation asks of a mask optimiser.

    Weights of fewer than 32 bits learn through copies in float32: a step of 1e-5 is less than half a unit in the last
    place of most bfloat16 weights, so that nothing would move.
    """

    flipped, current_keep, gradient_norm = 0, 1.0, 0.0

    def __init__(self, targets: Sequence[Target], lr: float = 3e-4, clip: float | None = 1.0) -> None:
        self.targets, self.clip = list(targets), clip
        self.originals = {t.name: t.parameter.detach().clone() for t in targets}
        self.copies = {
            t.name: t.parameter if t.parameter.dtype == torch.float32 else nn.Parameter(t.parameter.detach().float())
            for t in targets
        }
        super().__init__(list(self.copies.values()), lr=lr, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self, closure: object = None) -> Any:
        """One step; all gradients together are clipped to the norm `clip`."""
        for t in self.targets:
            copy, gradient = self.copies[t.name], t.parameter.grad
            if copy is not t.parameter:
                copy.grad = None if gradient is None else gradient.float()
        self.gradient_norm = float(torch.nn.utils.clip_grad_norm_(list(self.copies.values()), self.clip or math.inf))
        loss = super().step()
        for t in self.targets:
            if self.copies[t.name] is not t.parameter:
                self.copies[t.name].grad = None
                t.parameter.copy_(self.copies[t.name])
        torch.clear_autocast_cache()  # see MaskOptimizer.refresh
        return loss

    def mask(self) -> dict[str, Tensor]:
        """The weights as they are now, in the place of a mask."""
        return {name: copy.detach().clone() for name, copy in self.copies.items()}

    @contextmanager
    def masked_by(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """These weights inside the block, the current ones after it."""
        now = self.mask()
        self.put(weights)
        try:
            yield
        finally:
            self.put(now)

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Write weights into the parameters."""
        for t in self.targets:
            self.copies[t.name].copy_(weights[t.name])
            t.parameter.copy_(weights[t.name])
        torch.clear_autocast_cache()

    def scores(self) -> dict[str, Tensor]:
        """There are none."""
        return {}

    def restore(self) -> None:
        """The original weights, bit for bit."""
        self.put(self.originals)


def run_controls(
    model: PreTrainedModel,
    targets: Sequence[Target],
    rows: Sequence[Tokens],
    settings: TrainSettings,
    judge: Judge,
    *,
    dropped: Mapping[str, Tensor] | None = None,
    pad: int = 0,
    progress: Progress | None = None,
) -> dict[str, Judged]:
    """What the validation rows say of `weights`, `random` and `magnitude`.

    model: with its original weights in place, which come back bit for bit. settings: the run's own (steps, batch, data
    order; keep, scope and pattern). judge: gives what they say of the model as it is. dropped: values
    that dropped weights take, as for `MaskOptimizer`. pad: as for `Loop`.
    """
    out: dict[str, Judged] = {}
    for name, init in (("random", "normal"), ("magnitude", "magnitude")):
        start = scores.initial(targets, init, seed=settings.seed, dropped=dropped)
        masked = MaskOptimizer(
            targets,
            start,
            keep=str(settings.keep),
            signed=scores.is_signed(init),
            scope=settings.scope,
            pattern=settings.n_of_m,
            dropped=dropped,
            reference_rounding=settings.reference_rounding,
        )
        out[name] = judged(judge())
        masked.restore()
        del masked, start  # scores and moments: they would be there beside those of the next
    for rate in settings.control_lr:
        with trained_weights(model, targets, rows, settings, judge, lr=rate, pad=pad, progress=progress) as best:
            found = best.found
        if found is not None and ("weights" not in out or found.key < out["weights"].key):
            out["weights"] = found
        del best
        gc.collect()  # the loop refers to itself; its optimiser would be there beside the next one
    return out


@contextmanager
def trained_weights(
    model: PreTrainedModel,
    targets: Sequence[Target],
    rows: Sequence[Tokens],
    settings: TrainSettings,
    judge: Judge,
    *,
    lr: float = 3e-4,
    pad: int = 0,
    progress: Progress | None = None,
) -> Iterator[Best]:
    """Train the targets' own weights; inside the block the model has the best validated ones, afterwards its own.

    Arguments as for `run_controls`. Gives the record of validations; its `found` is what they said of the best state.
    Raises KeyboardInterrupt after SIGINT; after SIGTERM, what that did before.
    """
    plain = settings.model_copy(
        update={"lr": lr, "scores": False, "keep_warmup": 0, "log_to": "none", "keep_last": False}
    )
    with learning_alone(model, targets):
        weights = WeightOptimizer(targets, lr, settings.clip)
        best = Best(weights, plain, judge, progress)
        best.consider(0)
        try:
            Loop(model, rows, weights, best, plain, pad=pad, name=f"control, weights at {lr:g}").run()
            with weights.masked_by(best.mask or {}):
                yield best
        finally:
            weights.restore()

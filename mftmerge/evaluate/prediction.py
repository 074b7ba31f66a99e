"""What a combination of masks will do to each domain, predicted before it is built.

Of a domain with its own mask m, learnt from the untrained mask s, the loss and its gradient are measured at s and at m:
two passes over some rows. Along m - s the mean of the two slopes is exact where the loss is quadratic, and the measured
losses say how far it is not, so for a kept set c

    loss(c) = loss(s) + k * sum over weights of v * (c - s),   v = w * (gradient(s) + gradient(m)) / 2,
    k = (loss(m) - loss(s)) / sum of v * (m - s).

docs/interference.md says how far this gets, beside simpler predictors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel

from mftmerge import cut, naming
from mftmerge.data import Tokens
from mftmerge.live import attach
from mftmerge.loss import evaluating, length_batches, padded, token_losses
from mftmerge.mask import Mask
from mftmerge.overlap import untrained
from mftmerge.progress import Progress, Step

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Slope:
    """One domain: losses (nats a token) without mask, at the untrained mask and at the own one; v by tensor; and k."""

    base: float
    start: float
    own: float
    effects: Mapping[str, cut.Floats]
    untrained: Mask
    scale: float

    def loss(self, kept: Mask) -> float:
        """The predicted loss under a mask. Tensors that it does not cover keep everything."""
        moved = 0.0
        for name, effect in self.effects.items():
            before = self.untrained.kept(name).astype(np.float32)
            after = kept.kept(name).astype(np.float32) if name in kept else np.ones_like(before)
            moved += float(np.vdot(effect, after - before))
        return self.start + self.scale * moved

    def share(self, kept: Mask) -> float:
        """The share of the own mask's gain that a mask is predicted to keep."""
        return (self.base - self.loss(kept)) / (self.base - self.own)


def predictable(masks: Mapping[str, Mask]) -> str | None:
    """Why nothing can be predicted for these masks, in words; None where it can."""
    for label, mask in masks.items():
        if mask.info.on == "delta":
            return f"{label} is over a delta"
        if untrained(mask) is None:
            return f"it is not known where {label} started from"
    return None


def measure(
    model: PreTrainedModel,
    masks: Mapping[str, Mask],
    domains: Mapping[str, Sequence[Tokens]],
    *,
    progress: Progress | None = None,
) -> dict[str, Slope]:
    """Slopes of each domain's loss on its rows, the model left as it was.

    masks, domains: own mask and tokenised rows, by domain; see `predictable`. Domains whose mask does not gain over
    the base on these rows are left out. Memory: a float32 a masked weight and domain, and the gradients of one.
    """
    found: dict[str, Slope] = {}
    for domain, own in masks.items():
        start = untrained(own)
        assert start is not None
        read = partial(_kept, own)
        covered = {name for name, _ in naming.iter_parameters(model, own.names, read, fill=True)}
        plain = {n: p.detach().float().cpu() for n, p in model.named_parameters() if n in covered}
        weights = naming.to_checkpoint(model, plain, names=own)
        switcher = attach(model, {"own": own, "start": start})
        try:
            losses: dict[str | None, float] = {}
            gradients: dict[str, dict[str, torch.Tensor]] = {}
            for place in (None, "start", "own"):
                if progress:
                    progress(Step("measuring slopes", 3 * len(found) + len(losses), 3 * len(masks), detail=domain))
                with switcher.use(place):
                    losses[place], found_here = _gradients(model, covered, domains[domain], place is not None)
                    gradients |= {place: found_here} if place else {}
        finally:
            switcher.detach()
        if losses["own"] >= losses[None]:
            continue
        slopes = {place: naming.to_checkpoint(model, given, names=own) for place, given in gradients.items()}
        effects, moved = {}, 0.0
        for name in own.names:
            effect = ((slopes["start"][name] + slopes["own"][name]) / 2 * weights[name]).numpy()
            effects[name] = effect
            moved += float(np.vdot(effect, own.kept(name).astype(np.float32) - start.kept(name)))
        scale = (losses["own"] - losses["start"]) / moved if moved else 0.0
        found[domain] = Slope(losses[None], losses["start"], losses["own"], effects, start, scale)
    return found


def _kept(mask: Mask, name: str) -> torch.Tensor:
    return torch.from_numpy(mask.kept(name))


def _gradients(
    model: PreTrainedModel, covered: Set[str], rows: Sequence[Tokens], wanted: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss and, where wanted, its gradient by parameter, both of the weights as they are in the model.

    The gradient at a dropped weight is that of its place: what the loss would do were it given a value.
    """
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    total, tokens = 0.0, 0
    try:
        for n, p in model.named_parameters():
            p.requires_grad_(wanted and n in covered)
        with evaluating(model), torch.set_grad_enabled(wanted):
            for batch in length_batches([len(r["input_ids"]) for r in rows], BATCH_TOKENS):
                ids, labels, attention = padded([rows[i] for i in batch], model.device)
                losses, _ = token_losses(model, ids, labels, attention_mask=attention)
                total += float(losses.detach().double().sum())
                tokens += len(losses)
                if wanted:
                    losses.sum().backward()
        given = {n: p.grad for n, p in model.named_parameters() if n in covered and p.grad is not None}
        return total / tokens, {n: g.detach().float().cpu() / tokens for n, g in given.items()}
    finally:
        for n, p in model.named_parameters():
            p.requires_grad_(flags[n])
            if n in covered:
                p.grad = None

"""What combinations of masks will do to each domain, predicted before one of them is measured.

Of a domain with its own mask m, every row's gradient g (of its summed loss, by weight, at the masked weights) is taken
once; for a kept set c the weights change by d = w * (c - m), and over rows with T labelled tokens together

    loss(c) = loss(m) + (sum of g.d) / T + (sum of (g.d)^2) / 2T:

the second-order model with the empirical Fisher matrix in the place of the curvature (rows are the samples), all of it:
g.d is one number a row, so that how the changes act on each other costs nothing, where a diagonal would leave it out.
It is a sum over the layers, and one layer's part of it says what the loss would be if only that layer of the own mask
were replaced. docs/interference.md says how far this gets, beside simpler predictors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from mftmerge import bits, naming
from mftmerge.cut import Floats
from mftmerge.data import Tokens
from mftmerge.live import attach
from mftmerge.loss import evaluating, mean_loss, padded, row_losses, token_losses
from mftmerge.mask import Mask
from mftmerge.names import in_order, layer_name, layer_of
from mftmerge.progress import Progress, Step

Values = npt.NDArray[np.float64]
ROWS = 64  # of a domain at most: each costs a backward pass
EFFECTS = 2**29  # bytes of gradients that are held at once
BLOCK = 2**16  # weights of all proposals that are unpacked at once: what a processor keeps near it


@dataclass(frozen=True)
class Outlook:
    """One domain: loss (nats a token) without mask, under its own mask, and as predicted for each proposal.

    layers: those that the own mask covers, None for what is in none. by_layer: (proposals, layers), the predicted loss
    minus `own` of the own mask with that one layer of the proposal in the place of its own.
    """

    base: float
    own: float
    losses: Values
    layers: tuple[int | None, ...]
    by_layer: Values

    @property
    def shares(self) -> Values:
        """The shares of the own mask's gain that the proposals are predicted to keep."""
        return (self.base - self.losses) / (self.base - self.own)

    def layer_changes(self, proposal: int) -> dict[str, float]:
        """Of one proposal: layer, as tables call it -> its entry of `by_layer`."""
        return dict(zip(map(layer_name, self.layers), self.by_layer[proposal].tolist(), strict=True))


def predictable(masks: Mapping[str, Mask]) -> str | None:
    """Why nothing can be predicted for these masks, in words; None where it can."""
    over = next((label for label, mask in masks.items() if mask.info.on == "delta"), None)
    return f"{over} is over a delta" if over else None


def predict(
    model: PreTrainedModel,
    masks: Mapping[str, Mask],
    domains: Mapping[str, Sequence[Tokens]],
    proposals: Sequence[Mask],
    *,
    progress: Progress | None = None,
) -> dict[str, Outlook]:
    """What every proposal will do to each domain, the model left as it was.

    masks, domains: own mask and tokenised rows, by domain, of which at most `ROWS` are taken; see `predictable`.
    proposals: combined masks; tensors that they do not cover keep everything. Domains whose mask does not gain over the
    base on these rows are left out. Time: a backward pass a row, whatever the number of proposals. Memory: the
    gradients of some rows, up to `EFFECTS` bytes.
    """
    found: dict[str, Outlook] = {}
    for number, (domain, own) in enumerate(masks.items()):
        given = domains[domain]
        rows = [given[i] for i in np.linspace(0, len(given) - 1, min(ROWS, len(given))).astype(int)]
        base = mean_loss(row_losses(model, rows))
        weights, covered = _whole(model, own)
        switcher = attach(model, {"own": own})
        try:
            with switcher.use("own"):
                held = mean_loss(row_losses(model, rows))
                if held >= base:
                    continue
                layers = in_order(map(layer_of, own))
                changes, alone = np.zeros(len(proposals)), np.zeros((len(proposals), len(layers)))
                tokens = 0
                for chunk in _effects(model, own, weights, covered, rows):
                    if progress:
                        progress(Step("predicting", number, len(masks), "runs", detail=domain))
                    along = _along(chunk.effects, own, proposals, layers)
                    changes += _second_order(along.sum(1))
                    alone += _second_order(along)
                    tokens += chunk.tokens
        finally:
            switcher.detach()
        found[domain] = Outlook(base, held, held + changes / tokens, tuple(layers), alone / tokens)
    return found


def _second_order(along: Values) -> Values:
    """The change of the rows' summed losses (the last axis) from g.d of each row."""
    change: Values = along.sum(-1) + np.square(along).sum(-1) / 2
    return change


@dataclass(frozen=True)
class _Chunk:
    """Some rows: gradient times weight, float32 (rows, weights) by tensor of the mask; and their labelled tokens."""

    effects: Mapping[str, Floats]
    tokens: int


def _along(effects: Mapping[str, Floats], own: Mask, proposals: Sequence[Mask], layers: Sequence[int | None]) -> Values:
    """g.d of each layer, float64 (proposals, layers, rows)."""
    found = np.zeros((len(proposals), len(layers), len(next(iter(effects.values())))))
    for name, effect in effects.items():
        for a in range(0, own.size(name), BLOCK):
            b = min(a + BLOCK, own.size(name))
            before = _kept(own, name, a, b)
            change = np.stack([_kept(one, name, a, b) - before for one in proposals])  # (proposals, weights)
            found[:, layers.index(layer_of(name))] += change @ effect[:, a:b].T
    return found


def _kept(mask: Mask, name: str, start: int, stop: int) -> Floats:
    """1 for the kept weights, everything where the mask does not cover the tensor."""
    if name not in mask:
        return np.ones(stop - start, np.float32)
    return bits.unpack(mask.read(name, start, stop), stop - start).astype(np.float32)


def _effects(
    model: PreTrainedModel, own: Mask, weights: Mapping[str, Floats], covered: Set[str], rows: Sequence[Tokens]
) -> Iterator[_Chunk]:
    """The rows in chunks that fit `EFFECTS`. The model holds the masked weights; `weights` are the whole ones, flat.

    The gradient at a dropped weight is that of its place: what the loss would do were it given its value back.
    """
    size = max(1, EFFECTS // (4 * sum(w.size for w in weights.values())))
    with differentiated(model, covered) as parameters:
        for first in range(0, len(rows), size):
            few = rows[first : first + size]
            effects = {n: np.empty((len(few), w.size), np.float32) for n, w in weights.items()}
            tokens = 0
            for i, row in enumerate(few):
                ids, labels, attention = padded([row], model.device)
                losses, _ = token_losses(model, ids, labels, attention_mask=attention)
                losses.sum().backward()
                tokens += len(losses)
                # An expert that no token of the row reaches has no gradient: nothing of it acts on this row.
                gradients = {
                    n: torch.zeros(p.shape) if p.grad is None else p.grad.float().cpu() for n, p in parameters.items()
                }
                for name, gradient in naming.to_checkpoint(model, gradients, names=own).items():
                    np.multiply(gradient.reshape(-1).numpy(), weights[name], out=effects[name][i])
                for p in parameters.values():
                    p.grad = None
            yield _Chunk(effects, tokens)


@contextmanager
def differentiated(model: PreTrainedModel, covered: Set[str]) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Gradients of the covered parameters, and of no others, inside the block; everything as it was after it."""
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    try:
        for n, p in model.named_parameters():
            p.requires_grad_(n in covered)
        with evaluating(model), torch.enable_grad():
            yield {n: p for n, p in model.named_parameters() if n in covered}
    finally:
        for n, p in model.named_parameters():
            p.requires_grad_(flags[n])
            if n in covered:
                p.grad = None


def _whole(model: PreTrainedModel, own: Mask) -> tuple[dict[str, Floats], set[str]]:
    """The weights that a mask covers, flat float32 by its names, and the names of their parameters."""
    read = {name: torch.from_numpy(own.kept(name)) for name in own.names}
    covered = {name for name, _ in naming.iter_parameters(model, own.names, read.__getitem__, fill=True)}
    # Copies: the model's own memory would show a dropped weight as 0 as soon as the mask is on.
    plain = {n: p.detach().to("cpu", torch.float32, copy=True) for n, p in model.named_parameters() if n in covered}
    named = naming.to_checkpoint(model, plain, names=own)
    return {n: w.reshape(-1).numpy() for n, w in named.items()}, covered

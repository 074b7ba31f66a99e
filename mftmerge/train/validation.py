"""What a state of a run is judged by: the loss of every validation row and, if asked for, the share of right answers.

At a validation optimum the two disagree: a state can answer better at a higher loss, or the other way round. The loss
is cheap and tells states apart that answer alike; what is wanted is mostly the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mftmerge.data import Tokens
from mftmerge.evaluate.generation import EXACT, Marker
from mftmerge.evaluate.pairing import Values, mean
from mftmerge.loss import Losses, mean_loss, row_losses
from mftmerge.prefix import PrefixCache
from mftmerge.train.settings import TrainSettings


@dataclass(frozen=True)
class Judged:
    """Of the validation rows: losses, (rows, 2), and with a metric the marks of the answers, (rows, 2)."""

    losses: Losses
    marks: Values | None = None

    @property
    def loss(self) -> float:
        """Nats a token."""
        return mean_loss(self.losses)

    @property
    def share(self) -> float | None:
        """Of right answers."""
        return None if self.marks is None else mean(self.marks)

    @property
    def key(self) -> tuple[float, ...]:
        """What a state is better by, lower is better: the answers first, the loss where they are equally many."""
        return (self.loss,) if self.share is None else (-self.share, self.loss)

    def tensors(self) -> list[Tensor]:
        """For a checkpoint, which is read without running code."""
        return [torch.from_numpy(v) for v in (self.losses, self.marks) if v is not None]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Judged:
        """What `tensors` gave."""
        return cls(*(t.numpy() for t in tensors))


# Gives what the model is worth as it is now; losses alone will do.
Judge = Callable[[], "Judged | Losses"]


def judged(found: Judged | Losses) -> Judged:
    """Losses alone, as something judged."""
    return found if isinstance(found, Judged) else Judged(found)


class Validation:
    """Judges the weights that are in the model now. Call it."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Sequence[Tokens],
        tokenizer: PreTrainedTokenizerBase,
        settings: TrainSettings,
        cache: PrefixCache | None = None,
    ) -> None:
        self.model, self.rows, self.cache = model, rows, cache
        self.marker: Marker | None = None
        if settings.exact is not None and rows:
            self.marker = Marker(rows, tokenizer, exact=settings.exact, max_new_tokens=settings.max_new_tokens)

    def __call__(self) -> Judged:
        losses = row_losses(self.model, self.rows)
        if self.marker is None:
            return Judged(losses)
        marks = self.marker(self.model).metrics[EXACT]
        if self.cache is not None:  # what the next state's answers are checked on
            self.cache.add(self.marker.drafts)
        return Judged(losses, marks)

"""The training loop of a merge that is learnt: rows of every domain in a step, each domain's loss over its scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from mftmerge.learn.domains import ANSWERS, Domain, Rounds, batch_of, disagreement
from mftmerge.learn.optimizer import MergeOptimizer
from mftmerge.learn.settings import LearnSettings
from mftmerge.loss import labelled_logits
from mftmerge.train.batches import shuffled
from mftmerge.train.loop import Best, Loop


class MergeLoop(Loop):
    """Trains on rounds of one row of each domain. fill: id of the padding token. place: for checkpoints."""

    def __init__(
        self,
        model: PreTrainedModel,
        domains: Sequence[Domain],
        optimizer: MergeOptimizer,
        best: Best,
        settings: LearnSettings,
        fill: int,
        place: Path | None,
    ) -> None:
        self.domains = domains
        super().__init__(
            model, Rounds(domains), optimizer, best, settings.of_loop(), pad=fill, place=place, name="learn"
        )

    def _loader(self, rows: Sequence[object], fill: int) -> DataLoader[object]:
        def collate(rounds: list[tuple[int, ...]]) -> list[list[dict[str, Tensor]]]:
            return [batch_of(self.domains, rounds, fill)]

        return shuffled(rows, self.settings.batch_size, collate)

    def _gradients(self, batches: Sequence[Any]) -> float:
        """Gradients of the mean over domains of their losses over their scales; gives that mean."""
        total = 0.0
        for batch in batches:
            for domain, rows in zip(self.domains, batch, strict=True):
                logits, targets, _ = labelled_logits(self.model, rows["input_ids"], rows["labels"])
                loss = torch.zeros(())
                for column, scale in domain.scales.items():
                    if column == ANSWERS:
                        part = cross_entropy(logits.float(), targets)
                    else:
                        part = disagreement(logits, rows["likely"], rows["logs"]).mean()
                    loss = loss + part / (scale * len(self.domains) * len(batches))
                self.accelerator.backward(loss)
                total += float(loss.detach())
        return total

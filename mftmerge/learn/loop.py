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

from mftmerge.learn.domains import ANSWERS, Domain, Rounds, answers_and_prompts, batch_of, disagreement
from mftmerge.learn.optimizer import MergeOptimizer
from mftmerge.learn.settings import LearnSettings
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
        self.domains, self.base_kl = domains, settings.base_kl
        super().__init__(
            model, Rounds(domains), optimizer, best, settings.of_loop(), pad=fill, place=place, name="learn"
        )

    def _loader(self, rows: Sequence[object], fill: int) -> DataLoader[object]:
        def collate(rounds: list[tuple[int, ...]]) -> list[list[dict[str, Tensor]]]:
            return [batch_of(self.domains, rounds, fill)]

        return shuffled(rows, self.settings.batch_size, collate)

    def _gradients(self, batches: Sequence[Any]) -> float:
        """Gradients of the mean over domains of their losses, of all ranks; gives that mean."""
        passes = [pair for batch in batches for pair in zip(self.domains, batch, strict=True)]
        total = torch.zeros((), device=self.accelerator.device)
        for i, (domain, rows) in enumerate(passes):
            with self._synchronised(last=i == len(passes) - 1):
                loss = self._loss(domain, rows) / len(passes)
                self.accelerator.backward(loss)
            total += loss.detach()
        return float(self.accelerator.gather(total).mean())

    def _loss(self, domain: Domain, rows: dict[str, Tensor]) -> Tensor:
        """What the rows ask for, over the domain's scales, and how far the merge is from the base on their prompts.

        Means over tokens, of all ranks: of one rank its share, times their number, since gradients are averaged.
        """
        answers, targets, prompts = answers_and_prompts(
            self.model, rows["input_ids"], rows["labels"], rows.get("prompts"), call=self.call
        )
        counts = torch.tensor([[len(answers), len(prompts)]], device=answers.device)
        counts = self.accelerator.gather(counts).sum(0).clamp(min=1)
        each, each_prompt = (self.accelerator.num_processes / counts).unbind()
        loss = torch.zeros((), device=answers.device)
        for column, scale in domain.scales.items():
            if column == ANSWERS:
                loss = loss + cross_entropy(answers.float(), targets, reduction="sum") * each / scale
            else:
                loss = loss + disagreement(answers, rows["likely"], rows["logs"]).sum() * each / scale
        if len(prompts):
            apart = disagreement(prompts, rows["base_likely"], rows["base_logs"])
            loss = loss + self.base_kl * apart.sum() * each_prompt
        return loss

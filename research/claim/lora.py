"""LoRA as an optimiser: the parameters hold `W + scale * B A`, and their gradients become those of A and B.

The same as low-rank adapters without dropout (Hu et al., arXiv 2106.09685: A from a normal or uniform distribution, B
zero, scale alpha / rank with alpha = 2 rank), with a whole weight's gradient in between, so that the loop, validation
and measurement of masks and weights serve here too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mftmerge.train.control import WeightOptimizer
from mftmerge.train.targets import Target

SCALE = 2.0


class LoraOptimizer(WeightOptimizer):
    """AdamW on A (rank, in) and B (out, rank) of every target."""

    def __init__(self, targets: Sequence[Target], lr: float, *, rank: int, clip: float = 1.0) -> None:
        super().__init__(targets, lr, clip)
        self.pairs = {}
        for t in targets:
            rows, columns = t.parameter.shape
            a = torch.empty(rank, columns)
            torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            self.pairs[t.name] = (torch.nn.Parameter(a), torch.nn.Parameter(torch.zeros(rows, rank)))
        self.inner = torch.optim.AdamW([p for pair in self.pairs.values() for p in pair], lr=lr, weight_decay=0.0)

    def bytes(self) -> int:
        """Of the adapters in 16 bits a number."""
        return 2 * sum(p.numel() for pair in self.pairs.values() for p in pair)

    @torch.no_grad()
    def step(self, closure: object = None) -> Any:
        for t in self.targets:
            a, b = self.pairs[t.name]
            gradient = t.parameter.grad
            assert gradient is not None
            a.grad, b.grad = SCALE * b.T @ gradient, SCALE * gradient @ a.T
        parameters = [p for pair in self.pairs.values() for p in pair]
        self.gradient_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.clip or math.inf))
        self.inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]  # the loop sets the rate of the outer one
        self.inner.step()
        self.put({t.name: self._merged(t) for t in self.targets})

    def _merged(self, target: Target) -> Tensor:
        a, b = self.pairs[target.name]
        return self.originals[target.name] + SCALE * b @ a

"""The keys and values of several answers in one batch, padded on the left: rows join and leave between two steps."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

Layers = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of a layer, each (rows, heads, tokens, width)


class RowCache:
    """Rows of a batch: `cache` for the model, and which of its places are tokens, (rows, tokens) of 0 and 1."""

    def __init__(self, cache: DynamicCache, mask: torch.Tensor) -> None:
        self.cache, self.mask = cache, mask

    @property
    def layers(self) -> Layers:
        layers: Any = self.cache.layers  # of a DynamicCache, whose type allows kinds without keys and values
        return [(layer.keys, layer.values) for layer in layers]

    @classmethod
    def of(cls, layers: Layers, mask: torch.Tensor) -> RowCache:
        return cls(DynamicCache(ddp_cache_data=layers), mask)

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for one more token a row. Returns the attention mask and that token's positions, (rows, 1)."""
        positions = self.mask.sum(1, keepdim=True)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        return self.mask, positions

    def joined(self, other: RowCache) -> RowCache:
        """These rows, then the other's."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        mine, theirs = self._padded(width), other._padded(width)
        layers = [
            (torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in zip(mine.layers, theirs.layers, strict=True)
        ]
        return RowCache.of(layers, torch.cat([mine.mask, theirs.mask]))

    def only(self, rows: list[int]) -> RowCache:
        """These of the rows, without the padding that none of them needs."""
        mask = self.mask[rows]
        start = int(mask.shape[1] - mask.sum(1).max())
        return RowCache.of([(k[rows, :, start:], v[rows, :, start:]) for k, v in self.layers], mask[:, start:])

    def _padded(self, width: int) -> RowCache:
        more = width - self.mask.shape[1]
        if not more:
            return self
        pad = torch.nn.functional.pad
        layers = [(pad(k, (0, 0, more, 0)), pad(v, (0, 0, more, 0))) for k, v in self.layers]
        return RowCache.of(layers, pad(self.mask, (more, 0)))

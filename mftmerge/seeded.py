"""Initial scores that a seed alone gives again: training draws them, and a mask's baseline is drawn again from them.

Part of what a mask file means: `training["init"] == "normal"` and `training["seed"]` stand for these numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

SIGMA = 0.02  # standard deviation of the paper's initial scores


def normal_scores(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """The float32 scores N(0, 0.02) of one tensor, on the CPU.

    Each tensor draws from its own generator: the same numbers whatever else is covered, however it is sharded.
    """
    key = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    return torch.empty(tuple(shape)).normal_(0, SIGMA, generator=generator)

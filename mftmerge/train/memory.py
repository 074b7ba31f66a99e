"""How much memory a run needs, from the checkpoint's headers alone, before anything is loaded."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from mftmerge.errors import BadInput

BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
GIB = 1 << 30


@dataclass(frozen=True)
class Need:
    """Bytes: weights of the model, what training adds for the masked weights, and working room."""

    weights: int
    training: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.training + self.working


def estimate(path: Path, layers: str | None, modules: str, dtype: str, tokens: int, adam_bits: int = 32) -> Need:
    """What training the masks of a checkpoint needs.

    For each masked weight: its original and its gradient in the weights' dtype, the float32 score and two moments, of
    4 bytes or of 8 bits and a 256th of a float32. Working room: three float32 copies of the largest masked tensor for
    the cut, and the logits of one batch of `tokens` tokens with their gradient.
    """
    from mftmerge.models.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(path)
    entries = [checkpoint.entry(n) for n in checkpoint.names]
    fixed = {"float32": 4, "bfloat16": 2}.get(dtype)
    sizes = {e.name: fixed or BYTES.get(e.dtype, 1) for e in entries}
    numbers = {e.name: _layer(e.name) for e in entries}
    count = 1 + max((n for n in numbers.values() if n is not None), default=-1)
    covered = [e for e in entries if len(e.shape) >= 2 and numbers[e.name] in _chosen(layers, count)]
    if modules in ("attn", "mlp"):  # other choices are counted as the whole layers: never too little
        covered = [e for e in covered if ("att" in e.name) == (modules == "attn")]
    moments = 8 if adam_bits == 32 else 2 + 8 / 256
    vocabulary = max((e.shape[0] for e in entries if len(e.shape) == 2), default=0)
    return Need(
        weights=sum(e.size * sizes[e.name] for e in entries),
        training=math.ceil(sum(e.size * (2 * sizes[e.name] + 4 + moments) for e in covered)),
        working=12 * max((e.size for e in covered), default=0) + 8 * vocabulary * tokens,
    )


def _layer(name: str) -> int | None:
    found = re.search(r"\.(\d+)\.", f".{name}")
    return int(found[1]) if found else None


def _chosen(layers: str | None, count: int) -> set[int]:
    from mftmerge.train.targets import parse_layers

    return set(parse_layers(layers, count)) if count else set()


def require(need: Need, model: str, dtype: str) -> None:
    """Raise BadInput when the memory that is free now is less than what is needed."""
    free = available()
    if need.total > free:
        smaller = "" if dtype == "bfloat16" else "--dtype bfloat16, "
        raise BadInput(
            f"{model}: training needs about {_gib(need.total)} (weights {_gib(need.weights)}, scores and moments "
            f"{_gib(need.training)}, working room {_gib(need.working)}) and {_gib(free)} is free; use {smaller}fewer "
            "--layers or a smaller --batch-size (or --no-check-memory to try)"
        )


def available() -> int:
    """Bytes free on the device that trains."""
    import psutil  # type: ignore[import-untyped]
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{math.ceil(size / (1 << 20))} MiB"

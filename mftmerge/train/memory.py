"""How much memory a run needs, from the checkpoint's headers and configuration alone, before anything is loaded."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mftmerge.dtypes import BY_CODE, named
from mftmerge.errors import BadInput
from mftmerge.train.settings import TrainSettings

GIB = 1 << 30
Tensor = tuple[str, tuple[int, ...], str]  # name, shape, dtype as safetensors writes it


@dataclass(frozen=True)
class Need:
    """Bytes, of one process.

    On the device that trains: weights of the whole model; training, what each masked weight adds; activations and
    logits of one forward and backward pass; step, the working room of the optimiser's step, when those are gone.
    host: what is kept in the computer's memory beside it.
    """

    weights: int
    training: int
    activations: int
    logits: int
    step: int
    host: int

    @property
    def working(self) -> int:
        return max(self.activations + self.logits, self.step)

    @property
    def device(self) -> int:
        return self.weights + self.training + self.working


def estimate(path: Path, settings: TrainSettings) -> Need:
    """What training a mask over the checkpoint in `path` needs."""
    from mftmerge.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(path)
    entries = [checkpoint.entry(n) for n in checkpoint.names]
    try:
        config = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError):
        config = {}
    return need([(e.name, e.shape, e.dtype) for e in entries], config, settings)


def need(tensors: Sequence[Tensor], config: Mapping[str, object], settings: TrainSettings) -> Need:
    """What training needs, from the tensors of a checkpoint and its config.json.

    For each masked weight: its original and its gradient in the weights' dtype, the float32 score, and two moments of 4
    bytes, or of 8 bits and a 256th of a float32. In the computer's memory: the float32 scores before training, the best
    mask and the one that is compared with it as booleans, and, with `scores`, the best scores and their copy. Batches
    are taken as full and as labelled throughout; of logits the backward pass holds three float32 copies.
    """
    fixed = None if settings.dtype == "auto" else named(settings.dtype).nbytes
    sizes = {name: fixed or -(-BY_CODE[dtype].bits // 8) for name, _, dtype in tensors}
    covered, first, count = _covered(tensors, settings)
    weights = sum(math.prod(shape) * sizes[name] for name, shape, _ in tensors)
    moments = 8 if settings.adam_bits == 32 else 2 + 8 / 256
    training = host = 0.0
    for name, shape in covered:
        width = sizes[name] * (2 + bool(settings.base)) + 4 + moments
        if settings.control:  # masks that nobody trained; then the weights' originals, moments and validated states
            # (below 32 bits a float32 copy, its gradient and two states of it, beside originals and moments)
            width += 6 * sizes[name] if sizes[name] >= 4 else sizes[name] + 8 + 16
        training += math.prod(shape) * width
        host += math.prod(shape) * (6 + 8 * settings.scores)
    item = max((sizes[name] for name, _ in covered), default=4)
    tokens = settings.batch_size * settings.max_length
    names = {name for name, _ in covered}
    layers = [any(_layer(n) == i for n in names) for i in range(first, count)]
    vocabulary = max((shape[0] for _, shape, _ in tensors if len(shape) == 2), default=0)
    return Need(
        weights=weights,
        training=math.ceil(training),
        activations=tokens * _per_token(_text(config), layers, item, settings.gradient_checkpointing),
        logits=tokens * vocabulary * 12,
        step=16 * max((math.prod(shape) for _, shape in covered), default=0),
        host=math.ceil(host) + (weights if settings.base else 0),
    )


def _per_token(config: Mapping[str, object], masked: Sequence[bool], item: int, checkpointing: bool) -> int:
    """Bytes that a backward pass finds of each token: of the layers from the first masked one on.

    masked: for each of these layers, whether its matrices learn; a matrix that does keeps its input. Counted for a
    Llama block with fused attention: float32 inputs of two norms, queries, keys, values and output of the attention,
    gate, its activation and up. With gradient checkpointing a layer keeps its input only, and one layer at a time more.
    """
    hidden = _number(config, "hidden_size", "n_embd", "d_model")
    heads = _number(config, "num_attention_heads", "n_head", "n_heads") or 1
    queries = heads * (_number(config, "head_dim") or hidden // heads)
    inner = _number(config, "moe_intermediate_size", "intermediate_size", "n_inner") or 4 * hidden
    inner *= _number(config, "num_experts_per_tok") or 1
    plain = 8 * hidden + item * (4 * queries + 3 * inner)
    learning = plain + item * (2 * hidden + queries + inner)
    sizes = [learning if m else plain for m in masked]
    if not checkpointing:
        return sum(sizes)
    return len(sizes) * item * hidden + max(sizes, default=0)


def _number(config: Mapping[str, object], *names: str) -> int:
    """The first of these entries that is there; the largest of one that differs by layer (Gemma 3n); else 0."""
    for name in names:
        found = config.get(name)
        found = max(found, default=0) if isinstance(found, list) else found
        if isinstance(found, int | float) and found:
            return int(found)
    return 0


def _text(config: Mapping[str, object]) -> Mapping[str, object]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _covered(tensors: Sequence[Tensor], settings: TrainSettings) -> tuple[list[tuple[str, tuple[int, ...]]], int, int]:
    """The masked tensors (name, shape), the first masked layer, and the number of layers."""
    from mftmerge.train.targets import parse_layers

    numbers = {name: _layer(name) for name, _, _ in tensors}
    count = 1 + max((n for n in numbers.values() if n is not None), default=-1)
    chosen = set(parse_layers(settings.layers, count)) if count else set()
    covered = [(name, shape) for name, shape, _ in tensors if len(shape) >= 2 and numbers[name] in chosen]
    if settings.modules in ("attn", "mlp"):  # other choices are counted as the whole layers: never too little
        covered = [(name, shape) for name, shape in covered if ("att" in name) == (settings.modules == "attn")]
    return covered, min(chosen, default=0), count


def _layer(name: str) -> int | None:
    found = re.search(r"\.(\d+)\.", f".{name}")
    return int(found[1]) if found else None


def require(need: Need, model: str, settings: TrainSettings, *, layers: bool = True) -> None:
    """Raise BadInput when the memory that is free now is less than what is needed, on the device or beside it.

    layers: whether the user chooses what is learnt by layers.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # each of them holds all of it
    # A model is loaded into the computer's memory first, when the rest is not there yet.
    beside = processes * (max(need.weights, need.host) if on_gpu else need.device + need.host)
    for where, needed, free in (
        *([("on the GPU ", need.device, available(on_gpu=True))] if on_gpu else []),
        ("of the computer's memory " if on_gpu else "", beside, available(on_gpu=False)),
    ):
        if needed > free:
            each = f" for {processes} processes" if processes > 1 else ""
            parts = (
                f"weights {_gib(need.weights)}, scores and moments {_gib(need.training)}, {settings.batch_size} rows "
                f"of {settings.max_length} tokens {_gib(need.working)}, beside the device {_gib(need.host)}"
            )
            raise BadInput(
                f"{model}: training needs about {_gib(needed)} {where}(of one process: {parts}){each} and {_gib(free)} "
                f"is free; use {', '.join(_remedies(settings, layers))} (or --no-check-memory to try)"
            )


def _remedies(settings: TrainSettings, layers: bool) -> list[str]:
    """What makes a run smaller, of what its settings do not have yet."""
    possible = {
        "--dtype bfloat16": settings.dtype != "bfloat16",
        "--gradient-checkpointing": not settings.gradient_checkpointing,
        "--adam-bits 8": settings.adam_bits == 32,
        "fewer --layers": layers,
        "a smaller --batch-size": settings.batch_size > 1,
        "a smaller --max-length": True,
    }
    return [name for name, use in possible.items() if use]


def available(*, on_gpu: bool) -> int:
    """Bytes free on this process's GPU, or in the computer's memory."""
    if on_gpu:
        import torch

        return int(torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", "0")))[0])
    import psutil

    return int(psutil.virtual_memory().available)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{math.ceil(size / (1 << 20))} MiB"

"""Claims about a training step, against full fine-tuning (FFT) with fused AdamW and against the released algorithm.

A full step costs at most 1.05 of FFT's at 2048 tokens and 1.15 at 512, forward plus backward at most 1.01. The released
algorithm (a sort of every matrix in every forward pass) costs at least 1.6 times ours at 2048 tokens
in bf16, and 6 times at 512 in fp32.

    python benchmarks/train_step.py [--quick] [--shape small|llama7b] [--only DTYPE TOKENS ROUNDS]

All three train the same matrices of the same model: all decoder layers of a Llama with random weights. On a GPU
`--shape llama7b` runs LLaMA2-7B's shape, with 4 masked layers and with all; without a GPU a small shape is run.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from common import interleaved
from torch.nn.utils import parametrize
from train_common import finish
from transformers import LlamaConfig, LlamaForCausalLM

from mftmerge.train import scores, targets
from mftmerge.train.control import WeightOptimizer
from mftmerge.train.optimizer import MaskOptimizer

SHAPES = {
    "small": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16},
    "llama7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class SortedMask(torch.autograd.Function):
    """The published algorithm, written anew: sort the matrix, drop the first int((1 - keep) * n), straight through."""

    @staticmethod
    def forward(ctx: Any, ranked: torch.Tensor) -> torch.Tensor:
        out = ranked.clone()
        _, order = ranked.flatten().sort()
        count = int((1 - 0.9) * ranked.numel())
        flat = out.flatten()
        flat[order[:count]] = 0
        flat[order[count:]] = 1
        return flat.view_as(ranked)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0]


class Released(torch.nn.Module):
    """W * M with M computed in every forward pass."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.score = torch.nn.Parameter(torch.empty_like(weight).normal_(0, 0.02))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * SortedMask.apply(self.score.abs())


def model_of(shape: str, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=4096, **SHAPES[shape])
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype).train()
    model.config.use_cache = False
    return model


def stepper(kind: str, shape: str, layers: str | None, tokens: int, dtype: torch.dtype, device: str) -> Any:
    """(forward and backward, optimiser step, free) of one of the three ways, with a model of its own."""
    model = model_of(shape, dtype, device)
    found = targets.find(model, layers or f"0-{model.config.num_hidden_layers - 1}")
    targets.freeze_others(model, found)
    optimizer: Any
    if kind == "mask":
        optimizer = MaskOptimizer(found, scores.initial(found, "normal"), signed=False)
    elif kind == "fft":
        optimizer = WeightOptimizer(found, lr=1e-5, clip=None)
    else:
        learnt = []
        for t in found:
            module = model.get_submodule(t.name.removesuffix(".weight"))
            mask = Released(t.parameter)
            parametrize.register_parametrization(module, "weight", mask)
            module.parametrizations.weight.original.requires_grad_(False)
            learnt.append(mask.score)
        optimizer = torch.optim.AdamW(learnt, lr=1e-5, weight_decay=0.0, fused=True)
    ids = torch.randint(0, 32000, (1, tokens), device=device)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def pass_() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        wait()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()
        wait()

    return pass_, step


def peak(kind: str, shape: str, layers: str | None, tokens: int, dtype: torch.dtype) -> float:
    """Peak GPU memory of two steps, in GiB."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    pass_, step = stepper(kind, shape, layers, tokens, dtype, "cuda")
    for _ in range(2):
        pass_()
        step()
    return torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="512 tokens, two rounds")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--only", nargs=3, metavar=("DTYPE", "TOKENS", "ROUNDS"), help="such as fp32 2048 2")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = arguments.shape
    if device == "cpu":
        torch.set_num_threads(1)  # on one thread, CPU time is not disturbed by what else the machine does
    if shape == "llama7b" and device == "cpu":
        print("no GPU: running the small shape instead of LLaMA2-7B's")
        shape = "small"
    dtypes, lengths, rounds = tuple(DTYPES), (512,) if arguments.quick else (512, 2048), 2 if arguments.quick else 5
    if arguments.only:
        dtypes, lengths, rounds = (arguments.only[0],), (int(arguments.only[1]),), int(arguments.only[2])
    seconds: dict[str, float] = {}
    ratios: dict[str, float] = {}
    memory: dict[str, float] = {}
    goals: dict[str, tuple[str, float]] = {}
    for name in dtypes:
        dtype = DTYPES[name]
        for tokens in lengths:
            for layers in ("4-7", None) if shape == "llama7b" else (None,):
                key = f"{name} {tokens}" + (f" layers {layers or 'all'}" if shape == "llama7b" else "")
                kinds = ("fft", "mask") if shape == "llama7b" and layers is None else ("fft", "mask", "released")
                measure(key, kinds, (shape, layers, tokens, dtype, device), rounds, seconds, ratios)
                if device == "cuda":
                    memory |= {f"{key} {k} GiB": peak(k, shape, layers, tokens, dtype) for k in kinds}
                goals[f"{key} step, mask / fft"] = ("<=", 1.05 if tokens == 2048 else 1.15)
                if tokens == 2048:
                    goals[f"{key} pass, mask / fft"] = ("<=", 1.01)
                    if name == "bf16":
                        goals[f"{key} step, released / mask"] = (">=", 1.6)
                elif name == "fp32":
                    goals[f"{key} step, released / mask"] = (">=", 6.0)
    goals = {k: v for k, v in goals.items() if k in ratios}
    what = {"shape": shape, **SHAPES[shape], "rounds": rounds, "peak_memory": memory}
    part = "_{}_{}".format(*arguments.only) if arguments.only else ""
    finish("train_step" + ("_7b" if shape == "llama7b" else "") + part, what, seconds, ratios, goals)


def measure(
    key: str,
    kinds: tuple[str, ...],
    case: tuple[str, str | None, int, torch.dtype, str],
    rounds: int,
    seconds: dict[str, float],
    ratios: dict[str, float],
) -> None:
    """Time the ways in turn, pass and step apart; ratios of medians."""
    ways: dict[str, Callable[[], None]] = {}
    for kind in kinds:
        ways[f"{kind} pass"], ways[f"{kind} update"] = stepper(kind, *case)
    clock = time.perf_counter if case[-1] == "cuda" else time.thread_time
    found = interleaved(ways, rounds, clock=clock)  # the warm round touches memory first and chooses kernels
    total = {k: found[f"{k} pass"] + found[f"{k} update"] for k in kinds}
    seconds |= {f"{key} {name}": value for name, value in found.items()}
    ratios[f"{key} pass, mask / fft"] = found["mask pass"] / found["fft pass"]
    ratios[f"{key} step, mask / fft"] = total["mask"] / total["fft"]
    if "released" in total:
        ratios[f"{key} step, released / mask"] = total["released"] / total["mask"]
        ratios[f"{key} step, released / fft"] = total["released"] / total["fft"]


if __name__ == "__main__":
    main()

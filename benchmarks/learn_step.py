"""The step of a merge that is learnt against fine-tuning the same weights with fused AdamW, without the passes.

Three experts over four layers of SmolLM2-135M's shape (14.2 million weights), random, in a temporary directory. Both
sides take the same gradients; seconds are of this thread, so that other programs do not count.

    python benchmarks/learn_step.py [--quick]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from common import interleaved, small_llama
from train_common import finish
from transformers import AutoModelForCausalLM

from mftmerge.learn.experts import load
from mftmerge.learn.merging import Merging
from mftmerge.learn.optimizer import MergeOptimizer
from mftmerge.learn.settings import LearnSettings
from mftmerge.quickstart.tiny import random_checkpoint, tiny_tokenizer
from mftmerge.recipe.load import load_recipe
from mftmerge.recipe.settings import MergeSettings

EXPERTS = ("one", "two", "three")


def recipe(folder: Path, dtype: str) -> Path:
    """Write the models, which differ in all matrices of the layers, and a recipe with a mask to learn for each."""
    tokenizer = tiny_tokenizer()
    config = small_llama(len(tokenizer), layers=4)
    random_checkpoint(folder / "base", config, tokenizer, dtype=dtype)
    entries = []
    for seed, name in enumerate(EXPERTS, 1):
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in model.model.layers.parameters():
                if p.ndim == 2:
                    p += torch.randn_like(p) * 1e-3
        model.to(getattr(torch, dtype)).save_pretrained(folder / name)
        rows = [{"prompt": "a", "completion": "b"}] * 8
        (folder / f"{name}.jsonl").write_text("".join(f"{r}\n".replace("'", '"') for r in rows))
        entry = {"model": name, "mask": {"learn": {"data": f"{name}.jsonl"}}, "parameters": {"weight": 0.4}}
        entries.append(entry)
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump({"merge_method": "task_arithmetic", "base_model": "base", "models": entries}))
    return path


def sides(folder: Path, dtype: str) -> tuple[dict[str, Callable[[], object]], MergeOptimizer]:
    """A step of each side on the same gradients."""
    folder.mkdir()
    (folder / "work").mkdir()
    settings = LearnSettings.make({})
    merging = Merging(load_recipe(recipe(folder, dtype), learning=True), folder / "work", MergeSettings())
    _, parts, holders = load(merging, settings)
    optimizer = MergeOptimizer(parts, holders, lr=0.03)
    torch.manual_seed(9)
    gradients = {t.name: torch.randn_like(t.parameter) * 1e-4 for t in optimizer.targets}
    tuned = [torch.nn.Parameter(t.parameter.detach().clone()) for t in optimizer.targets]
    adam = torch.optim.AdamW(tuned, lr=1e-5, fused=True)

    def tune() -> None:
        for p, g in zip(tuned, gradients.values(), strict=True):
            p.grad = g
        adam.step()

    def learn() -> None:
        for t in optimizer.targets:
            t.parameter.grad = gradients[t.name]
        optimizer.step()

    return {f"fine-tune, {dtype}": tune, f"learn, {dtype}": learn}, optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds")
    rounds = 3 if parser.parse_args().quick else 9
    torch.set_num_threads(1)
    ways: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for dtype in ("float32", "bfloat16"):
            found, optimizer = sides(Path(temporary) / dtype, dtype)
            ways |= found
        seconds = interleaved(ways, rounds, clock=time.thread_time, warm=1)
    ratios = {
        f"step of three experts, learn / fine-tune, {dtype}": seconds[f"learn, {dtype}"]
        / seconds[f"fine-tune, {dtype}"]
        for dtype in ("float32", "bfloat16")
    }
    weights = sum(p.base.numel() for p in optimizer.parts.values())
    finish("learn_step", {"weights": weights, "experts": len(EXPERTS), "threads": 1}, seconds, ratios, {})


if __name__ == "__main__":
    main()

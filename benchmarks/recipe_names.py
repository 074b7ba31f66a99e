"""Claim: `mftmerge build` against stock mergekit-yaml where tensors are stored under other names than transformers'.

Two models of many small tensors (LLaVA with 24 and 32 layers, Qwen3-MoE with 24 layers of 32 experts), so that nearly
all of the time goes into names. Whole processes, interleaved in one run; the results are compared bit by bit.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from common import interleaved, machine, write
from recipe_merge import equal, measure, ours, stock

from mftmerge.checkpoint import Checkpoint


def llava() -> Any:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    vision = transformers.CLIPVisionConfig(image_size=32, patch_size=8, num_hidden_layers=24, **small)
    text = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=32, **small)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    return transformers.LlavaForConditionalGeneration(config)


def qwen3_moe() -> Any:
    experts = {"num_experts": 32, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 24}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **heads, **experts))


MODELS: dict[str, Callable[[], Any]] = {"LLaVA": llava, "Qwen3-MoE": qwen3_moe}


def run_case(make: Callable[[], Any], folder: Path, repeats: int) -> dict[str, Any]:
    inputs = []
    for seed in range(2):
        torch.manual_seed(seed)
        path = folder / str(seed)
        make().save_pretrained(path)
        inputs.append({"model": str(path), "parameters": {"weight": 0.5}})
    recipe = folder / "recipe.yml"
    recipe.write_text(yaml.safe_dump({"merge_method": "linear", "models": inputs}))
    # Of LLaVA's checkpoint mergekit reads no language model, and says nothing; we refuse that unless asked.
    sides = {"mergekit": stock(recipe, folder / "stock")}
    sides["ours"] = ours(recipe, folder / "ours", "--overwrite", "--allow-lost")
    seconds = interleaved({side: partial(measure, command) for side, command in sides.items()}, repeats, warm=0)
    found: dict[str, Any] = {side: round(median, 1) for side, median in seconds.items()}
    found["times faster"] = round(found["mergekit"] / found["ours"], 2)
    found["weights compared"], found["weights that differ"] = equal(folder / "stock", folder / "ours")
    return {"tensors": len(Checkpoint.open(folder / "0").names), **found, "load average": round(os.getloadavg()[0], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    found: dict[str, Any] = {}
    for name, make in MODELS.items():
        with tempfile.TemporaryDirectory(prefix="recipe-names-") as folder:
            found[name] = run_case(make, Path(folder), repeats)
        print(name, found[name], flush=True)
    write("recipe_names", {**machine(), "repeats": repeats, "cases": found})


if __name__ == "__main__":
    main()

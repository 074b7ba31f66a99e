"""Models, masks and an adapter under the names that the files in recipes/ use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml
from helpers.tiny_models import tiny_checkpoint

from mftmerge.checkpoint import Checkpoint
from mftmerge.mask import Mask

EXPERTS = ("math", "code", "instruct")


def random_mask(model: Path, seed: int, keep: float = 0.9, part: str = "proj") -> Mask:
    """A random mask over the tensors of `model` whose names contain `part`."""
    rng, checkpoint = np.random.default_rng(seed), Checkpoint.open(model)
    names = [n for n in checkpoint.names if part in n]
    return Mask.from_bools({n: rng.random(checkpoint.entry(n).shape) < keep for n in names})


def make_kitchen(folder: Path, dtype: str = "bfloat16", **options: object) -> Path:
    """Write models/{base,math,code,instruct,adapter} and masks/*.mask into `folder`."""
    models, masks = folder / "models", folder / "masks"
    models.mkdir(parents=True)
    masks.mkdir()
    tiny_checkpoint(models / "base", dtype=dtype, seed=0, **options)  # type: ignore[arg-type]
    for i, expert in enumerate(EXPERTS):
        tiny_checkpoint(models / expert, dtype=dtype, seed=i + 1, **options)  # type: ignore[arg-type]
        random_mask(models / expert, seed=i).save(masks / f"{expert}.mask")
    return folder


def add_adapter(folder: Path) -> None:
    """Write a random LoRA adapter for the base model to models/adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "models/base")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(7)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    adapted.save_pretrained(folder / "models/adapter")


def written(config: dict[str, object] | str, path: Path) -> Path:
    """The path, at which the configuration (values, or YAML text) now is."""
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return path


def tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint as integers."""
    checkpoint = Checkpoint.open(path)
    return {n: checkpoint.read(n) for n in checkpoint.names}


def values(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint as float32, in which -0 equals 0."""
    checkpoint = Checkpoint.open(path)
    return {n: checkpoint.read_float32(n) for n in checkpoint.names}


def assert_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """The same names, and every tensor equal in all elements."""
    assert sorted(a) == sorted(b)
    different = [n for n in a if a[n].shape != b[n].shape or not np.array_equal(a[n], b[n])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, first {different[0]}"


def stock(config: dict[str, object], out: Path) -> Path:
    """mergekit's own run, in this process, of a configuration."""
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    LoaderCache.loaders.clear()
    options = MergeOptions(quiet=True, lora_merge_cache=str(out) + "-lora", random_seed=5, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(config), str(out), options)
    LoaderCache.loaders.clear()
    return out

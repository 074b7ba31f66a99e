"""Checkpoint names <-> parameter names: whatever is in the files must land where from_pretrained puts it, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from mftmerge import naming
from mftmerge.errors import BadInput

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma3", "mixtral", "gpt2"]


def load(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto")


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_conversion_agrees_with_from_pretrained_in_both_directions(
    tiny: Callable[..., Path], architecture: str, loaded: bool
) -> None:
    path = tiny(architecture)
    files = load_file(path / "model.safetensors")
    model = load(path)
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    if not loaded:  # a model that was never loaded has only its class's rules
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    there = naming.to_parameters(model, files)
    assert {k for k in there if k in parameters} == set(parameters)
    for name, value in parameters.items():
        assert torch.equal(there[name], value), name
    back = naming.to_checkpoint(model, parameters, names=files)
    assert set(back) == set(files)
    for name, value in files.items():
        assert torch.equal(back[name], value), name


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_masks_of_some_layers_survive_the_way_there_and_back(tiny: Callable[..., Path], dtype: torch.dtype) -> None:
    path = tiny("mixtral")
    files = load_file(path / "model.safetensors")
    model = load(path)
    g = torch.Generator().manual_seed(1)
    masks = {
        k: (torch.rand(t.shape, generator=g) < 0.9).to(dtype)
        for k, t in files.items()
        if ".1." in k[:16] and ("experts" in k or "q_proj" in k)
    }
    there = naming.to_parameters(model, masks)
    assert set(there) == {
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.1.self_attn.q_proj.weight",
    }
    back = naming.to_checkpoint(model, there)
    assert set(back) == set(masks)
    assert all(torch.equal(back[k], masks[k]) and back[k].dtype == dtype for k in masks)


def test_a_mask_of_one_expert_is_filled_or_refused(tiny: Callable[..., Path]) -> None:
    path = tiny("mixtral")
    model = load(path)
    name = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
    one = {name: torch.zeros(load_file(path / "model.safetensors")[name].shape, dtype=torch.bool)}
    with pytest.raises(BadInput, match="fuses 8 tensors"):
        naming.to_parameters(model, one)
    fused = naming.to_parameters(model, one, fill=True)["model.layers.0.mlp.experts.gate_up_proj"]
    rows = fused.shape[1] // 2
    assert not fused[2, rows:].any()
    assert fused.sum() == fused.numel() - one[name].numel()


def test_the_base_models_prefix_may_be_missing_from_the_file(tiny: Callable[..., Path]) -> None:
    model = load(tiny("gpt2"))
    kept = torch.ones(model.transformer.h[0].attn.c_attn.weight.shape, dtype=torch.bool)
    there = naming.to_parameters(model, {"h.0.attn.c_attn.weight": kept})
    assert set(there) == {"transformer.h.0.attn.c_attn.weight"}
    assert set(naming.to_checkpoint(model, there, names={"h.0.attn.c_attn.weight"})) == {"h.0.attn.c_attn.weight"}


def test_tied_embeddings_go_by_either_name(tiny: Callable[..., Path]) -> None:
    model = load(tiny("qwen2"))
    kept = torch.ones(model.lm_head.weight.shape, dtype=torch.bool)
    assert set(naming.to_parameters(model, {"lm_head.weight": kept})) == {"model.embed_tokens.weight"}
    with pytest.raises(BadInput, match="tied"):
        naming.to_parameters(model, {"lm_head.weight": kept, "model.embed_tokens.weight": ~kept})
    assert set(naming.to_checkpoint(model, {"model.embed_tokens.weight": kept}, names={"lm_head.weight"})) == {
        "lm_head.weight"
    }


def test_wrong_names_and_shapes_are_named(tiny: Callable[..., Path]) -> None:
    model = load(tiny("llama"))
    with pytest.raises(BadInput, match="no tensor 'nothing'"):
        naming.to_parameters(model, {"nothing": torch.ones(2)})
    with pytest.raises(BadInput, match="shape"):
        naming.to_parameters(model, {"model.norm.weight": torch.ones(2)})
    with pytest.raises(BadInput, match="no parameter"):
        naming.to_checkpoint(model, {"nothing": torch.ones(2)})


def test_a_plain_module_keeps_its_names() -> None:
    model = torch.nn.Linear(3, 2)
    assert set(naming.to_parameters(model, {"weight": torch.ones(2, 3)})) == {"weight"}
    assert set(naming.to_checkpoint(model, {"bias": torch.ones(2)})) == {"bias"}

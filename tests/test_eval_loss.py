"""Losses by row agree with the models' own loss, and the grid restores what it switches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mftmerge import loss, naming
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.evaluate import grid as grids
from mftmerge.evaluate.generation import Marker, Marks
from mftmerge.mask import Mask

ARCHITECTURES = ["llama", "qwen3", "gemma3", "mixtral", "gpt2"]


def load(path: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def rows(count: int = 7, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of different lengths; labels in the last part, with a hole."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        ids = rng.integers(3, 250, 9 + 6 * ((i * 3) % count)).tolist()
        labels = [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]
        labels[-2] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def plain(model: Any, data: list[dict[str, list[int]]]) -> np.ndarray:
    """One row at a time through the model's own loss."""
    result = []
    for row in data:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        tokens = int((labels[0, 1:] != -100).sum())
        with torch.no_grad():
            result.append([float(model(input_ids=ids, labels=labels).loss) * tokens, tokens])
    return np.array(result)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_row_losses_equal_the_models_own_loss(tiny: Callable[..., Path], architecture: str) -> None:
    model, data = load(tiny(architecture)), rows()
    found = loss.row_losses(model, data, batch_tokens=100)
    expected = plain(model, data)
    assert np.array_equal(found[:, 1], expected[:, 1])
    np.testing.assert_allclose(found[:, 0], expected[:, 0], rtol=2e-5)


def test_a_soft_cap_and_a_scaled_head_are_respected(tiny: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM, CohereConfig

    data = rows()
    capped = load(tiny("gemma3"))
    before = loss.row_losses(capped, data)
    capped.config.final_logit_softcapping = 0.05
    assert np.abs(loss.row_losses(capped, data) - before).max() > 1e-3
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    scaled = AutoModelForCausalLM.from_config(CohereConfig(vocab_size=300, logit_scale=3.0, **sizes)).eval()
    for model in (capped, scaled):
        np.testing.assert_allclose(loss.row_losses(model, data)[:, 0], plain(model, data)[:, 0], rtol=2e-5)


def test_logits_are_computed_only_where_there_are_labels(tiny: Callable[..., Path]) -> None:
    model, data, seen = load(tiny("llama")), rows(), []
    model.lm_head.register_forward_hook(lambda _, __, out: seen.append(out.shape[:-1].numel()))
    loss.row_losses(model, data)
    tokens = sum(seen)
    assert tokens == plain(model, data)[:, 1].sum()


def test_batches_keep_within_both_limits() -> None:
    lengths, labelled = [5, 30, 10, 12, 60], [1, 2, 9, 9, 3]
    found = list(loss.length_batches(lengths, 40, labelled, 12))
    assert found == [[4], [1], [3], [2, 0]]  # a row longer than the limit is a batch of its own
    assert list(loss.length_batches(lengths, 1000)) == [[4, 1, 3, 2, 0]]


def test_bfloat16_model_gets_a_float32_softmax(tiny: Callable[..., Path]) -> None:
    model, data = load(tiny("llama"), dtype=torch.bfloat16), rows()
    found = loss.row_losses(model, data)
    exact = plain(copy.deepcopy(model).float(), data)
    assert np.abs(found[:, 0] - exact[:, 0]).max() < 2e-3 * exact[:, 0].max()
    assert len(np.unique(found[:, 0])) == len(data)


def test_mode_and_weights_are_left_as_they_were(tiny: Callable[..., Path]) -> None:
    model = load(tiny("gpt2")).train()
    first = loss.row_losses(model, rows())
    assert model.training
    assert np.array_equal(first, loss.row_losses(model, rows()))  # no dropout


def test_a_loss_that_is_not_finite_is_an_error(tiny: Callable[..., Path]) -> None:
    model = load(tiny("llama"))
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(MftmergeError, match="row 1 is not finite"):
        loss.row_losses(model, rows())


def half_mask(model: Any, words: str = "mlp", seed: int = 0) -> Mask:
    rng = np.random.default_rng(seed)
    shapes = {n: s for n, s in naming.layout(model).items() if words in n and len(s) == 2}
    return Mask.from_bools({n: rng.random(s) < 0.5 for n, s in shapes.items()})


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_grid_switches_masks_and_restores_the_model(tiny: Callable[..., Path], architecture: str) -> None:
    model, data = load(tiny(architecture)), rows()
    words = "mlp" if architecture == "llama" else "w1"
    mask, other = half_mask(model, words), half_mask(model, words, seed=1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    result = grids.grid(model, {"a": mask, "b": other}, {"d": data, "e": data[:3]})
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())

    by_hand = {n: torch.from_numpy(mask.kept(n)) for n in mask.names}
    kept = naming.to_parameters(model, by_hand, fill=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in kept:
                parameter.mul_(kept[name])
    np.testing.assert_allclose(result.values("a", "d"), loss.row_losses(model, data), rtol=1e-5)
    assert not np.array_equal(result.values("a", "d"), result.values("b", "d"))
    assert result.values("b", "e").shape == (3, 2)
    assert result.models["a"]["mask"] == mask.digest
    assert result.models["base"]["mask"] is None


def test_shared_layers_run_once_a_row_and_change_nothing(tiny: Callable[..., Path]) -> None:
    model, data, runs = load(tiny("llama")), rows(), []
    masks = {name: half_mask(model, "layers.2.mlp", seed) for seed, name in enumerate("ab")}
    whole = grids.grid(model, masks, {"d": data}, prefix=False)
    model.model.layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    shared = grids.grid(model, masks, {"d": data})
    assert len(runs) == len(data) + 1  # each row once, and the cache's own check
    for row in ("base", "a", "b"):
        np.testing.assert_allclose(shared.values(row, "d"), whole.values(row, "d"), rtol=1e-5)
    assert grids.first_masked_layer(model, masks) == 2
    assert grids.first_masked_layer(model, {"head": half_mask(model, "lm_head")}) == 0


def test_grid_scores_under_the_mask_and_refuses_bad_names(tiny: Callable[..., Path]) -> None:
    model, data = load(tiny("llama")), rows()
    mask = half_mask(model)
    weight = model.model.layers[0].mlp.up_proj.weight

    class Zeros(Marker):
        max_new_tokens, drafts = 1, []

        def __init__(self) -> None: ...

        def __call__(self, model: Any, journal: Any = None) -> Marks:
            return Marks({"zeros": np.array([[float((weight == 0).float().mean()), 1.0]])}, ["said"], ["remark"])

    result = grids.grid(model, {"a": mask}, {"d": data, "e": data}, scorers={"d": Zeros()})
    assert result.extra["answers"] == {"base": {"d": ["said"]}, "a": {"d": ["said"]}}
    assert result.domains["d"]["remarks"] == ["remark"]
    assert result.mean("base", "d", "zeros") == 0
    assert result.mean("a", "d", "zeros") == pytest.approx(
        1 - mask.density("model.layers.0.mlp.up_proj.weight"), abs=1e-6
    )
    with pytest.raises(BadInput, match="two rows"):
        grids.grid(model, {"base": mask}, {"d": data})
    with pytest.raises(BadInput, match="reference 'x'"):
        grids.grid(model, {"a": mask}, {"d": data}, reference="x")

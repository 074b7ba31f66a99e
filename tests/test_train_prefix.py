"""The prefix cache and the short head give what the whole model gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mftmerge import prefix
from mftmerge.data import IGNORE, Tokens
from mftmerge.loss import token_losses

ROWS: list[Tokens] = [
    {"input_ids": ids, "labels": [IGNORE] * 3 + ids[3:]} for ids in (list(range(5, 5 + n)) for n in (6, 9, 12))
]


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def padded(rows: list[Tokens]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(r["input_ids"]) for r in rows) + 1
    ids = torch.tensor([r["input_ids"] + [0] * (width - len(r["input_ids"])) for r in rows])
    labels = torch.tensor([r["labels"] + [IGNORE] * (width - len(r["labels"])) for r in rows])
    return ids, labels


def count_calls(model: Any, layer: int) -> list[int]:
    """A list that grows by one each time that a layer's attention really runs."""
    from mftmerge.naming import decoder_layers

    calls: list[int] = []
    block = decoder_layers(model)[1][layer]
    attention = next(m for n, m in block.named_children() if "att" in n)
    attention.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "mixtral", "gpt2"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_cached_states_give_the_whole_models_logits(
    tiny: Callable[..., Path], architecture: str, on_disk: bool, tmp_path: Path
) -> None:
    model = load(tiny(architecture))
    ids, _ = padded(ROWS)
    expected = model(input_ids=ids, use_cache=False).logits
    cache = prefix.PrefixCache(model, 2, directory=tmp_path / "states" if on_disk else None)
    cache.add(ROWS)
    lower = count_calls(model, 1)
    with cache.use():
        for _ in range(2):
            found = model(input_ids=ids, use_cache=False).logits
            for i, row in enumerate(ROWS):
                n = len(row["input_ids"])
                torch.testing.assert_close(found[i, :n], expected[i, :n], rtol=1e-5, atol=1e-5)
            assert cache.stored_bytes == cache.nbytes(ROWS)
        assert len(lower) == len(ROWS) + 1  # each row once, and one row checked against the whole model
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
    assert not any("forward" in vars(m) for m in model.modules())


def test_other_batches_run_all_layers(tiny: Callable[..., Path]) -> None:
    model = load(tiny("llama"))
    cache = prefix.PrefixCache(model, 2)
    cache.add(ROWS)
    unknown = torch.tensor([[7, 8, 9, 10]])
    left_padded = torch.tensor([[0, 0, *ROWS[0]["input_ids"]]])
    known = torch.tensor([ROWS[0]["input_ids"]])
    attention = (left_padded != 0).long()
    with torch.no_grad():
        expected = [
            model(input_ids=unknown, use_cache=False).logits,
            model(input_ids=left_padded, attention_mask=attention, use_cache=False).logits,
        ]
        continued = model.generate(known, max_new_tokens=4, do_sample=False)
        with cache.use():
            model(input_ids=known, use_cache=False)
            assert torch.equal(model(input_ids=unknown, use_cache=False).logits, expected[0])
            assert torch.equal(
                model(input_ids=left_padded, attention_mask=attention, use_cache=False).logits, expected[1]
            )
            assert torch.equal(model.generate(known, max_new_tokens=4, do_sample=False), continued)


def test_states_follow_the_upper_layers_weights_only(tiny: Callable[..., Path]) -> None:
    model = load(tiny("llama"))
    cache = prefix.PrefixCache(model, 2)
    cache.add(ROWS)
    ids, _ = padded(ROWS[:1])
    with torch.no_grad(), cache.use():
        first = model(input_ids=ids, use_cache=False).logits
        model.model.layers[3].mlp.down_proj.weight.zero_()
        second = model(input_ids=ids, use_cache=False).logits
    assert not torch.equal(first, second)
    expected = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(second[:, :-1], expected[:, :-1], rtol=1e-5, atol=1e-5)


def test_beyond_the_budget_rows_are_computed_every_time(tiny: Callable[..., Path]) -> None:
    model = load(tiny("llama"))
    cache = prefix.PrefixCache(model, 2, budget=0)
    cache.add(ROWS)
    ids, _ = padded(ROWS)
    expected = model(input_ids=ids, use_cache=False).logits
    with cache.use():
        found = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found[2, :12], expected[2, :12], rtol=1e-5, atol=1e-5)
    assert cache.stored_bytes == 0


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "mixtral"])
def test_short_head_gives_the_models_loss_and_gradient(tiny: Callable[..., Path], architecture: str) -> None:
    model = load(tiny(architecture))
    ids, labels = padded(ROWS)
    count = int((labels[:, 1:] != IGNORE).sum())
    weight = next(p for n, p in model.named_parameters() if ".3." in n and p.ndim > 1)
    expected = model(input_ids=ids, labels=labels).loss
    (gradient,) = torch.autograd.grad(expected, weight)
    found = token_losses(model, ids, labels)[0].sum() / count
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(found, weight)[0], gradient, rtol=1e-4, atol=1e-7)
    assert model(input_ids=ids, use_cache=False).logits.shape[:2] == ids.shape


def test_dropout_is_drawn_in_training_and_states_serve_validation(tiny: Callable[..., Path]) -> None:
    """GPT-2 drops states of its lower layers: stored ones would train another model."""
    model = load(tiny("gpt2"))
    ids, labels = padded(ROWS[:1])
    cache = prefix.PrefixCache(model, 2)
    cache.add(ROWS)
    lower = count_calls(model, 1)
    model.train()
    torch.manual_seed(0)
    expected = token_losses(model, ids, labels)[0]
    with cache.use():
        torch.manual_seed(0)
        assert torch.equal(token_losses(model, ids, labels)[0], expected)
        model.eval()
        ran = len(lower)
        token_losses(model, ids, labels)
        assert len(lower) == ran


def test_states_inside_autocast_are_others(tiny: Callable[..., Path]) -> None:
    model = load(tiny("llama"))
    ids, _ = padded(ROWS[:1])
    cache = prefix.PrefixCache(model, 2)
    cache.add(ROWS)
    with torch.no_grad(), cache.use():
        plain = model(input_ids=ids, use_cache=False).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(
            cast[:, :-1], model(input_ids=ids, use_cache=False).logits[:, :-1], rtol=0, atol=1e-2
        )


def test_a_model_whose_layers_hand_on_other_things_runs_all_of_them(tiny: Callable[..., Path]) -> None:
    model = load(tiny("llama"))
    real = model.model.layers[2].forward
    model.model.layers[2].forward = lambda hidden, **k: real(hidden + model.model.layers[0].seen, **k)
    model.model.layers[0].register_forward_hook(lambda m, _, out: setattr(m, "seen", 0.5 * out))
    ids, _ = padded(ROWS[:1])
    expected = model(input_ids=ids, use_cache=False).logits
    cache = prefix.PrefixCache(model, 2)
    cache.add(ROWS)
    assert not cache.fits(ROWS[0])
    assert cache.why
    with cache.use():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)

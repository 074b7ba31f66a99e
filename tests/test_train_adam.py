"""Adam with moments in 8 bits: the format, the memory, and masks that are nearly those of 32 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mftmerge.errors import BadInput
from mftmerge.train import adam, scores, targets
from mftmerge.train.optimizer import MaskOptimizer

CPU = torch.device("cpu")


def quantised(values: torch.Tensor, signed: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.zeros(values.numel(), dtype=torch.uint8)
    scales = torch.zeros(-(-values.numel() // adam.BLOCK))
    adam.quantise(values, codes, scales, signed=signed, random=torch.Generator().manual_seed(seed))
    return codes, scales


@pytest.mark.parametrize("signed", [True, False])
def test_levels_are_256_and_finer_near_zero(signed: bool) -> None:
    found = adam.levels(signed, CPU)
    assert len(found) == 256
    assert torch.equal(found, found.unique())
    assert found.max() == 1
    assert (0.0 in found) == signed  # a denominator is never 0
    positive = found[found > 0]
    assert positive.min() < 1e-6
    assert positive.diff().max() < (0.015 if signed else 0.0075)


@pytest.mark.parametrize("signed", [True, False])
def test_the_level_below_is_that_of_a_search(signed: bool) -> None:
    found = adam.levels(signed, CPU)
    near = [found, found.nextafter(torch.tensor(-2.0)), found.nextafter(torch.tensor(2.0)), torch.zeros(2) * -1]
    values = torch.cat([*near, torch.linspace(-1 if signed else 0, 1, 100_001)]).clamp(-1 if signed else 0, 1)
    index, low, high = adam._below(values, signed)
    assert torch.equal(index, (torch.searchsorted(found, values, right=True) - 1).clamp(0, 254).int())
    assert torch.equal(low, found[index])
    assert torch.equal(high, found[index + 1])


@pytest.mark.parametrize("signed", [True, False])
def test_a_value_becomes_one_of_its_neighbours_and_is_right_on_average(signed: bool) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 1000)
    values = values if signed else values.abs()
    found = torch.stack([adam.dequantise(*quantised(values, signed, s), signed=signed) for s in range(400)])
    scale = torch.cat([b.abs().max().expand(len(b)) for b in values.split(adam.BLOCK)])
    assert ((found - values).abs() <= 0.0151 * scale + 1e-12).all()
    inside = values > -scale  # the format has 1 and no -1
    assert ((found.mean(0) - values).abs() <= 0.0025 * scale)[inside].all()
    assert torch.equal(found[0], adam.dequantise(*quantised(values, signed, 0), signed=signed))
    assert not torch.equal(found[0], found[1])


def test_a_slow_average_follows_in_8_bits_as_in_32() -> None:
    """The second moment changes by a 1000th a step, less than half of what 8 bits can show."""
    score = {b: torch.zeros(512) for b in (8, 32)}
    states = {b: {"score": score[b], **adam.start(score[b], b)} for b in score}
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
    g = torch.Generator().manual_seed(0)
    for i in range(300):
        gradient = torch.randn(512, generator=g) * torch.logspace(-2, 0, 512) * (1 if i < 150 else 3)
        for state in states.values():
            adam.step("w", state, gradient.clone(), None, group)
    exact = states[32]["exp_avg_sq"]
    root = adam.dequantise(states[8]["exp_avg_sq"], states[8]["exp_avg_sq_scale"], signed=False)
    ratio = root.square() / exact
    assert 0.97 < ratio.mean() < 1.03
    assert ratio.std() < 0.15
    assert (score[8] - score[32]).abs().mean() < 0.1 * score[32].abs().mean()
    assert float(states[8]["step"]) == 300


def train(path: Path, bits: int, steps: range, optimizer: Any = None, model: Any = None) -> tuple[Any, Any]:
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
        found = targets.find(model, "2-3")
        targets.freeze_others(model, found)
        optimizer = MaskOptimizer(found, scores.initial(found), lr=2e-3, adam_bits=bits)
    for step in steps:
        ids = torch.randint(3, 250, (4, 24), generator=torch.Generator().manual_seed(step % 2))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_the_mask_is_nearly_that_of_32_bits_for_a_quarter_of_the_moments_memory(tiny: Callable[..., Path]) -> None:
    (_, exact), (_, small) = (train(tiny("llama"), bits, range(25)) for bits in (32, 8))
    _, start = train(tiny("llama"), 32, range(0))
    first = start.mask()
    total = sum(m.numel() for m in first.values())
    a, b = exact.mask(), small.mask()
    moved = sum(int((a[n] != first[n]).sum()) for n in first)
    differ = sum(int((a[n] != b[n]).sum()) for n in first)
    assert moved > 0.1 * total
    assert differ < 0.02 * total

    def moments(optimizer: MaskOptimizer) -> float:
        states = [optimizer.state[t.parameter] for t in optimizer.targets]
        return sum(v.nbytes for s in states for k, v in s.items() if k.startswith("exp_avg")) / total

    assert moments(exact) == 8
    assert moments(small) == pytest.approx(2 + 8 / 256, abs=1e-3)


def test_training_resumed_in_8_bits_is_bit_identical(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny("llama")
    _, straight = train(path, 8, range(6))
    _, begun = train(path, 8, range(3))
    torch.save(begun.state_dict(), tmp_path / "state.pt")
    model, resumed = train(path, 8, range(0))
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    for key, saved in begun.state_dict()["state"][0].items():
        assert torch.equal(saved, resumed.state_dict()["state"][0][key]), key
    train(path, 8, range(3, 6), resumed, model)
    for name, value in straight.scores().items():
        assert torch.equal(value, resumed.scores()[name])
    with pytest.raises(BadInput, match="not one of adam_bits=32"):
        train(path, 32, range(0))[1].load_state_dict(torch.load(tmp_path / "state.pt"))
    with pytest.raises(BadInput, match="must be 8 or 32"):
        MaskOptimizer(resumed.targets, resumed.scores(), adam_bits=16)

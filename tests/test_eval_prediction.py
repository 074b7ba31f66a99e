"""Predicted losses: exact at the own mask, the formula's elsewhere; the model is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mftmerge import data, train_mask
from mftmerge.combine import combine
from mftmerge.evaluate import prediction
from mftmerge.evaluate.grid import grid
from mftmerge.live import attach
from mftmerge.loss import mean_loss, padded, row_losses, token_losses
from mftmerge.mask import Mask, MaskInfo
from mftmerge.names import layer_of


@pytest.fixture(scope="module")
def trained(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two masks with scores over a tiny model, on rows of two kinds."""
    path = tiny("llama", layers=2)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = {
        "up": [{"prompt": f"from {i}", "completion": f"{i} {i + 1} {i + 2} up"} for i in range(16)],
        "down": [{"prompt": f"back {i}", "completion": f"{i} {i - 1} {i - 2} down"} for i in range(16)],
    }
    tokens = {d: data.tokenize(r, tokenizer, 64) for d, r in rows.items()}
    options: dict[str, Any] = {
        "steps": 20,
        "batch_size": 8,
        "lr": 0.02,
        "scores": True,
        "eval_rows": 4,
        "layers": "0-1",
    }
    masks = {d: train_mask(model, tokens[d], tokenizer=tokenizer, **options).mask for d in tokens}
    return SimpleNamespace(model=model, masks=masks, tokens=tokens)


def loss(model: Any, mask: Mask, rows: Any) -> float:
    cells = grid(model, {"m": mask}, {"d": rows}).values("m", "d")
    return mean_loss(cells)


def test_a_prediction_is_the_second_order_model_around_the_own_mask(
    trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = trained.model
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    up, down = trained.masks.values()
    proposals = [up, combine("intersection", [up, down]), combine("union", [up, down])]  # drops more, and restores
    found = prediction.predict(model, trained.masks, trained.tokens, proposals)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert sorted(found) == ["down", "up"], "both masks gain"
    rows = trained.tokens["up"]
    assert found["up"].base == pytest.approx(mean_loss(row_losses(model, rows)), rel=1e-5)
    assert found["up"].own == pytest.approx(loss(model, up, rows), rel=1e-5)
    assert found["up"].losses[0] == found["up"].own, "nothing changes under the own mask"
    assert found["up"].shares[0] == 1

    parameters, tokens = dict(model.named_parameters()), 0
    along = np.zeros((2, 2, len(rows)))  # (proposals, layers, rows), by hand, a row at a time
    with attach(model, {"up": up}).use("up"):
        for r, row in enumerate(rows):
            losses, _ = token_losses(model, *padded([row])[:2])
            tokens += len(losses)
            gradients = torch.autograd.grad(losses.sum(), [parameters[n] for n in up])
            for p, proposal in enumerate(proposals[1:]):
                for n, g in zip(up, gradients, strict=True):
                    change = torch.from_numpy(proposal.kept(n).astype(np.float32) - up.kept(n).astype(np.float32))
                    along[p, layer_of(n), r] += float((g.double() * before[n] * change).sum())
    whole = along.sum(1)
    assert (np.abs(whole) > 0).all(), "a proposal changes something for every row"
    expected = found["up"].own + (whole.sum(1) + np.square(whole).sum(1) / 2) / tokens
    assert found["up"].losses[1:] == pytest.approx(expected, rel=1e-4)
    by_layer = (along.sum(2) + np.square(along).sum(2) / 2) / tokens
    assert found["up"].layers == (0, 1)
    assert found["up"].by_layer[0].tolist() == [0, 0]
    assert found["up"].by_layer[1:] == pytest.approx(by_layer, rel=1e-3, abs=1e-6)

    monkeypatch.setattr(prediction, "EFFECTS", 1)  # a row at a time: the same within rounding
    again = prediction.predict(model, trained.masks, trained.tokens, proposals)
    assert again["up"].losses == pytest.approx(found["up"].losses, rel=1e-5)


def test_a_domain_whose_mask_does_not_gain_is_left_out(trained: SimpleNamespace) -> None:
    nothing = combine("complement", [trained.masks["up"]])
    assert prediction.predict(trained.model, {"up": nothing}, trained.tokens, [nothing]) == {}


def test_it_says_why_nothing_can_be_predicted(trained: SimpleNamespace) -> None:
    assert prediction.predictable(trained.masks) is None
    up = trained.masks["up"]
    over = Mask.from_bools({n: up.kept(n) for n in up}, MaskInfo(on="delta"))
    assert "over a delta" in str(prediction.predictable({"up": over}))

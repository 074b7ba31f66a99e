"""Predicted losses: exact at the two masks they come from, near the truth between, nothing of the model is changed."""

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
from mftmerge.loss import mean_loss, row_losses
from mftmerge.mask import Mask
from mftmerge.overlap import untrained


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


def test_a_prediction_is_exact_at_the_masks_it_comes_from_and_near_between(trained: SimpleNamespace) -> None:
    before = {n: p.detach().clone() for n, p in trained.model.named_parameters()}
    slopes = prediction.measure(trained.model, trained.masks, trained.tokens)
    assert all(torch.equal(p, before[n]) for n, p in trained.model.named_parameters())
    assert all(p.grad is None and p.requires_grad for p in trained.model.parameters())
    assert sorted(slopes) == ["down", "up"], "both masks gain"
    for domain, slope in slopes.items():
        own, rows = trained.masks[domain], trained.tokens[domain]
        start = untrained(own)
        assert start is not None
        assert slope.base == pytest.approx(mean_loss(row_losses(trained.model, rows)), rel=1e-5)
        assert slope.loss(own) == pytest.approx(loss(trained.model, own, rows), rel=1e-5)
        assert slope.loss(start) == pytest.approx(loss(trained.model, start, rows), rel=1e-5)
        assert slope.share(own) == pytest.approx(1)
        half = {
            n: np.where(np.arange(own.size(n)).reshape(own.shape(n)) % 2 == 0, own.kept(n), start.kept(n)) for n in own
        }
        between = Mask.from_bools(half)
        truth = loss(trained.model, between, rows)
        assert slope.own < truth < slope.start
        assert abs(slope.loss(between) - truth) < 0.25 * (slope.start - slope.own)


def test_predictions_order_combinations_as_measurements_do(trained: SimpleNamespace) -> None:
    masks = list(trained.masks.values())
    made = [combine("union", masks), combine("intersection", masks)]
    made += [
        combine("score", masks, density=d, weights=w) for d in (0.9, 0.93, 0.96) for w in ((1, 1), (1, 0.2), (0.2, 1))
    ]
    slopes = prediction.measure(trained.model, trained.masks, trained.tokens)
    for domain, slope in slopes.items():
        truth = [loss(trained.model, m, trained.tokens[domain]) for m in made]
        guess = [slope.loss(m) for m in made]
        ranks = [np.argsort(np.argsort(v)) for v in (truth, guess)]
        assert np.corrcoef(*ranks)[0, 1] > 0.7


def test_it_says_why_nothing_can_be_predicted(trained: SimpleNamespace) -> None:
    assert prediction.predictable(trained.masks) is None
    bare = Mask.from_bools({n: trained.masks["up"].kept(n) for n in trained.masks["up"]})
    assert "started from" in str(prediction.predictable({"up": bare}))

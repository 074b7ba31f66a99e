"""States chosen by answers as well as by loss, the control's copies, and what is said where nothing was gained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mftmerge.errors import BadInput
from mftmerge.train.control import WeightOptimizer
from mftmerge.train.loop import Best
from mftmerge.train.run import train_mask
from mftmerge.train.settings import TrainSettings
from mftmerge.train.targets import Target
from mftmerge.train.validation import Judged
from mftmerge.train.verdict import advice

ROWS = [{"prompt": f"say {i % 5}", "completion": "yes" if i % 2 else "no"} for i in range(40)]


def state(loss: float, right: int | None = None) -> Judged:
    losses = np.array([[loss, 1.0]] * 4)
    return Judged(losses, None if right is None else np.array([[i < right, 1.0] for i in range(4)], np.float64))


class Counting:
    """In the place of an optimiser: its state is the number of states asked for."""

    def __init__(self) -> None:
        self.number = -1

    def mask(self) -> dict[str, torch.Tensor]:
        self.number += 1
        return {"n": torch.tensor(self.number // 2)}

    def masked_by(self, kept: Any) -> Any:
        return torch.no_grad()


def chosen(states: list[Judged], **settings: Any) -> tuple[int, Best]:
    given = iter(states)
    best = Best(Counting(), TrainSettings.make(settings), lambda: next(given))  # type: ignore[arg-type]
    for step in range(len(states)):
        best.consider(step)
    return best.step, best


def test_answers_choose_before_losses_and_losses_among_equals() -> None:
    assert chosen([state(3.0), state(1.0), state(2.0)])[0] == 1
    assert chosen([state(1.0, 1), state(3.0, 2), state(2.0, 2), state(0.5, 1)])[0] == 2
    step, best = chosen([state(1.0), state(2.0), state(3.0)], keep_last=True)
    assert (step, best.loss, best.since) == (2, 3.0, 2)
    _, best = chosen([state(1.0), state(2.0), state(3.0)], keep_last=True, patience=2)
    assert best.stopped_early


def test_what_best_remembers_survives_a_checkpoint(tmp_path: Path) -> None:
    _, best = chosen([state(1.0, 1), state(3.0, 2)])
    best.mask = best.scores = None
    torch.save(best.state_dict(), tmp_path / "best.pt")
    other = Best(Counting(), TrainSettings(), None)  # type: ignore[arg-type]
    other.load_state_dict(torch.load(tmp_path / "best.pt", weights_only=True))
    assert (other.step, other.key, other.found.share) == (1, (-0.5, 3.0), 0.5)  # type: ignore[union-attr]
    np.testing.assert_array_equal(other.initial.losses, state(1.0).losses)  # type: ignore[union-attr]


def test_a_run_by_exact_match_resumes_and_reports_both(tiny: Callable[..., Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"layers": "2-3", "steps": 6, "eval_every": 2, "metric": "exact:text"}
    options |= {"max_new_tokens": 6, "control": True, "control_lr": [0.001, 0.01], "eval_rows": 12}
    notes: list[str] = []
    result = train_mask(tiny("llama"), ROWS, tmp_path / "a.mask", eval_data=ROWS[:12], note=notes.append, **options)
    assert {"base", "initial", "mask", "weights"} <= result.marks.keys()
    shares = [h["exact"] for h in result.history if "exact" in h]
    assert len(shares) == 4
    best = max(s for s in shares)
    assert result.comparison["mask"]["exact"] == best
    assert result.comparison["mask"]["exact_difference"] == pytest.approx(best - result.comparison["base"]["exact"])
    assert any("of the answers right" in note for note in notes)
    # Both rates do better by answers or by loss than weights that nobody trained.
    assert (-result.comparison["weights"]["exact"], result.comparison["weights"]["loss"]) < (
        -result.comparison["base"]["exact"],
        result.comparison["base"]["loss"],
    )
    for wrong in ("exact", "pass@1"):
        with pytest.raises(BadInput, match="exact:number"):
            TrainSettings.make({"metric": wrong})
    with pytest.raises(BadInput, match="exact match"):
        train_mask(tiny("llama"), ROWS, tmp_path / "b.mask", **options | {"metric": "exact:words"})


def test_answers_are_checked_and_not_written_again(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the cache of the lower layers on, the validation after the first one takes the answers before as drafts."""
    path = tiny("llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    real, lower = model.model.layers[0].self_attn.forward, []  # runs where the layer does, and not where it is skipped
    monkeypatch.setattr(model.model.layers[0].self_attn, "forward", lambda *a, **k: lower.append(1) or real(*a, **k))
    counts = []
    for steps in (1, 3):
        lower.clear()
        options: dict[str, Any] = {"layers": "2-3", "steps": steps, "lr": 1e-15, "eval_every": 1, "batch_size": 4}
        options |= {"metric": "exact:text", "max_new_tokens": 6}
        train_mask(model, ROWS[:4], eval_data=ROWS[:12], tokenizer=tokenizer, **options)
        counts.append(len(lower))
    assert counts[0] == counts[1] > 0  # two more validations went through the upper layers alone


@pytest.mark.parametrize("lr", [1e-5, 1e-4])
def test_bfloat16_weights_learn_at_low_rates_too(lr: float) -> None:
    """A step of fused AdamW below half a unit in the last place of bfloat16 weights would be lost."""
    torch.manual_seed(0)
    start = (torch.randn(100, 100) * 0.05).bfloat16()
    travel = []
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.nn.Parameter(start.to(dtype, copy=True))
        optimizer = WeightOptimizer([Target("p", p, layer=0)], lr=lr)
        for _ in range(60):
            p.grad = torch.ones_like(p)
            optimizer.step()
            with optimizer.masked_by(optimizer.mask()):  # validation in between loses nothing
                pass
        travel.append(float((start.float() - optimizer.mask()["p"]).mean()))
        assert torch.equal(p.float(), optimizer.mask()["p"].to(dtype).float())
        optimizer.restore()
        assert torch.equal(p, start.to(dtype))
    assert travel[1] == pytest.approx(travel[0], rel=0.01)
    assert travel[0] == pytest.approx(60 * lr, rel=0.05)


def history(validation: list[float], loss: list[float], flipped: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"step": 0, "validation": validation[0]}]
    found += [{"step": i, "loss": x, "flipped": flipped} for i, x in enumerate(loss, 1)]
    for i, value in enumerate(validation[1:], 1):
        found[i * len(loss) // (len(validation) - 1)]["validation"] = value
    return found


def test_what_to_change_follows_from_how_the_losses_went() -> None:
    settings = TrainSettings.make({"steps": 60})
    flat = [1.0] * 12
    assert "never changed" in advice(history([1, 1], flat, 0), settings)
    assert f"--lr {settings.learning_rate / 10:.2g}" in advice(history([1, 1.08, 1.02], flat, 9), settings)
    falling = [1 - i / 20 for i in range(12)]
    assert "more rows" in advice(history([1, 1.001, 1.05], falling, 9), settings)
    assert "--target delta" in advice(history([1, 1.001, 1.002], flat, 9), settings)

"""The page on predictions holds what its program writes, and its numbers are what they say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from research.interference import page  # noqa: E402
from research.interference.predict import PREDICTORS  # noqa: E402


def test_the_page_is_what_the_program_writes() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.page(text) == text


def test_shares_are_of_the_gain_over_the_base_and_ranks_are_compared() -> None:
    losses = {
        "base": 2.0,
        "untrained mask": 2.2,
        "seed0/math mask": 1.0,
        "seed0/a": 1.5,
        "seed0/b": 1.2,
        "seed0/c": 1.9,
    }
    record = {"records": {name: {"validation": {"math": loss}} for name, loss in losses.items()}}
    said = {"a": (0.5, 0.6), "b": (0.9, 0.7), "c": (0.1, 0.0)}  # a predictor's value and the measured share
    found = {f"seed0/{n}": {"math": dict.fromkeys(PREDICTORS, p) | {"measured": m}} for n, (p, m) in said.items()}
    values = page.shares(found, record)
    assert values["seed0/a"]["math"]["second order"] == 0.5, "is a share already"
    assert values["seed0/a"]["math"]["mean slope"] == pytest.approx(-0.2 + 1.2 * 0.5), "from the untrained mask's -20 %"
    assert values["seed0/b"]["math"]["validation"] == pytest.approx(0.8)
    assert page.rank_agreement(values, "second order", "seed0", "math") == pytest.approx(1)
    values["seed0/a"]["math"]["second order"] = 2.0
    assert page.rank_agreement(values, "second order", "seed0", "math") == pytest.approx(0.5)
    assert page.searched(values, "second order", "seed0") == (pytest.approx(0.8), pytest.approx(0.5), 1)

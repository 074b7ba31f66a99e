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


def test_ranks_are_compared() -> None:
    said = {"a": (0.5, 0.6), "b": (0.9, 0.7), "c": (0.1, 0.0)}  # a predictor's share and the measured one
    values = {
        f"seed0/{n}": {"math": dict.fromkeys(PREDICTORS, p) | {"measured": m, "validation": m}}
        for n, (p, m) in said.items()
    }
    assert page.rank_agreement(values, "second order", "seed0", "math") == pytest.approx(1)
    values["seed0/a"]["math"]["second order"] = 2.0
    assert page.rank_agreement(values, "second order", "seed0", "math") == pytest.approx(0.5)
    assert page.searched(values, "second order", "seed0") == (0.7, 0.6, 1)


def test_layers_are_compared_over_all_combinations() -> None:
    changes = {"a": {"26": (0.1, 0.2), "27": (0.3, 0.4)}, "b": {"26": (0.2, 0.1), "27": (0.0, 0.0)}}
    found = {
        f"seed0/{n}": {"math": {i: {"predicted": p, "measured": m, "error": 0.06} for i, (p, m) in layers.items()}}
        for n, layers in changes.items()
    }
    assert page.layer_agreement(found, "seed0", "math") == pytest.approx(0.8)  # two of four neighbours swapped
    *_, said = page.layer_table(found)
    assert "4 layers of combinations a domain; 2 of 4" in said
    assert "is not met" in said, "a hair below"
    found["seed0/b"]["math"]["26"]["measured"] = 0.3
    assert page.layer_agreement(found, "seed0", "math") == pytest.approx(1)
    assert "is met" in page.layer_table(found)[-1]

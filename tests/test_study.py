"""The study's page holds what its program writes, and its numbers are what they say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from research.combining import combinations, page, tables  # noqa: E402


def test_the_page_is_what_the_program_writes() -> None:
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->\n" in text for name in page.blocks())
    assert page.page(text) == text


def toy() -> tables.Study:
    """Two seeds, one domain of four rows with ten tokens each."""

    def record(losses: list[float], validation: float) -> dict[str, Any]:
        return {"facts": {}, "test": {"math": losses}, "validation": {"math": validation}}

    records = {
        "base": record([20, 30, 40, 10], 3.0),
        "seed0/math mask": record([10, 20, 30, 0], 2.0),
        "seed1/math mask": record([10, 10, 30, 10], 1.0),
        "seed0/union": record([15, 25, 35, 5], 2.5),
        "seed1/union": record([20, 20, 30, 10], 2.0),
        "seed0/only here": record([10, 20, 30, 0], 2.0),
    }
    return tables.Study({"study": {"domains": ["math"]}, "tokens": {"math": [10] * 4}, "records": records})


def test_shares_are_of_the_mean_gains_over_the_seeds_that_have_them() -> None:
    study = toy()
    assert study.names() == ["math mask", "union"]
    assert study.names(every_seed=False) == ["only here"]
    assert study.loss("base", "math") == 2.5
    assert study.by_seed("union", "math") == [-0.5, -0.5]
    assert study.shares_by_seed("union", "math") == [0.5, 20 / 40]
    value, low, high = study.share("union", "math")
    assert value == pytest.approx((100 - 80) / (100 - 65 + 5))
    assert low <= value <= high
    assert study.share("only here", "math") == (1.0, 1.0, 1.0)
    assert study.validation_share("union") == pytest.approx((3 - 2.25) / (3 - 1.5))
    mean, error = study.difference("union", "base", "math")
    changes = np.array([-2.5, -7.5, -7.5, -2.5]) / 10
    assert mean == pytest.approx(changes.mean())
    assert error == pytest.approx(changes.std(ddof=1) / 2)


def test_ways_to_change_evidence() -> None:
    a, b = np.float32([[4, -2, 0, 2]]), np.float32([[-1, -1, 1, 8]])
    sizes = [np.sqrt(np.mean(e**2)) for e in combinations.normalised([a, b])]
    assert sizes[0] == pytest.approx(sizes[1]) == pytest.approx(np.mean([np.sqrt(6), np.sqrt(67 / 4)]))
    np.testing.assert_array_equal(combinations.elected([a, b])[1], [[0, -1, 1, 8]])
    np.testing.assert_array_equal(combinations.largest([a, b])[0], [[4, -2, 0, 0]])
    np.testing.assert_array_equal(combinations.trimmed(0.25)([a, b])[1], [[0, 0, 0, 8]])
    first, second = combinations.ranked([a, b])
    assert np.argsort(first[0]).tolist() == np.argsort(a[0], kind="stable").tolist()
    assert np.sign(second).tolist() == np.sign(b).tolist()

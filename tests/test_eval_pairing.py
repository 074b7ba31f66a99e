"""Paired differences: the formula against simulation, the words, and the table that holds them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mftmerge.errors import BadInput
from mftmerge.evaluate import pairing
from mftmerge.evaluate.pairing import PairedDifference, Values, bootstrap, paired, standard_error
from mftmerge.evaluate.results import GridResult


def simulated(rng: np.random.Generator, rows: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Two measurements with a true difference of -0.05 a token, rows of 5 to 60 tokens, a row's tokens correlated."""
    tokens = rng.integers(5, 60, rows)
    level = rng.normal(2, 0.5, rows)
    a = tokens * (level - 0.05 + rng.normal(0, 0.1, rows))
    return np.stack([a, tokens], 1), np.stack([tokens * level, tokens], 1)


def test_the_difference_is_per_token_and_its_error_matches_simulation() -> None:
    rng = np.random.default_rng(0)
    found = [paired(*simulated(rng)) for _ in range(2000)]
    means = np.array([d.mean for d in found])
    errors = np.array([d.standard_error for d in found])
    assert means.mean() == pytest.approx(-0.05, abs=0.002)
    assert math.sqrt((errors**2).mean()) == pytest.approx(means.std(), rel=0.06)


def test_equal_weights_give_the_textbook_standard_error() -> None:
    rng = np.random.default_rng(1)
    a, b = (np.stack([rng.normal(size=30), np.ones(30)], 1) for _ in range(2))
    d = a[:, 0] - b[:, 0]
    result = paired(a, b)
    assert result.mean == pytest.approx(d.mean())
    assert result.standard_error == pytest.approx(d.std(ddof=1) / math.sqrt(30))
    assert standard_error(a) == pytest.approx(a[:, 0].std(ddof=1) / math.sqrt(30))


def test_bootstrap_agrees_with_the_formula_and_repeats() -> None:
    a, b = simulated(np.random.default_rng(3), rows=200)
    difference = paired(a, b)
    low, high = bootstrap(a, b, resamples=4000)
    assert (low, high) == bootstrap(a, b, resamples=4000)
    assert (low, high) != bootstrap(a, b, resamples=4000, seed=1)
    assert low < difference.mean < high
    assert (high - low) / (2 * 1.96) == pytest.approx(difference.standard_error, rel=0.1)


def test_rows_that_differ_are_refused() -> None:
    a, b = simulated(np.random.default_rng(0))
    with pytest.raises(BadInput, match="not of the same rows"):
        paired(a, b[:-1])
    b[3, 1] += 1
    with pytest.raises(BadInput, match="not of the same rows"):
        bootstrap(a, b)


@pytest.mark.parametrize(
    ("difference", "error", "lower", "words"),
    [
        (-0.3, 0.1, True, "gain"),
        (-0.15, 0.1, True, "within noise"),
        (0.15, 0.1, True, "no gain"),
        (0.0, 0.1, True, "no gain"),
        (0.3, 0.1, True, "worse"),
        (0.3, 0.1, False, "gain"),
        (-0.3, 0.1, False, "worse"),
        (0.0, 0.0, True, "identical"),
    ],
)
def test_verdicts(difference: float, error: float, lower: bool, words: str) -> None:
    assert PairedDifference(difference, error, 10).verdict(lower_is_better=lower) == words


def test_one_row_never_shows_a_gain() -> None:
    one = paired(np.array([[1.0, 4.0]]), np.array([[9.0, 4.0]]))
    assert one.standard_error == math.inf
    assert one.verdict() == "within noise"


def result(**changes: object) -> GridResult:
    """Base, a mask that helps math, one that hurts it; exact match on math."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 50, 40)
    base = np.stack([tokens * rng.normal(2, 0.3, 40), tokens], 1)
    noise = rng.normal(0, 0.02, (2, 40))
    good, bad = (base + np.stack([tokens * (d + n), 0 * tokens], 1) for d, n in zip((-0.1, 0.1), noise, strict=True))
    right = np.stack([rng.random(40) < 0.5, np.ones(40)], 1)
    fields: dict = {
        "models": {
            "base": {"mask": None},
            "good|x": {"mask": "1", "density": 0.9},
            "bad": {"mask": "2", "density": 0.8},
        },
        "domains": {"math": {"rows": 40, "digest": "abc", "source": "math.jsonl"}},
        "cells": {
            ("base", "math", "loss"): base,
            ("good|x", "math", "loss"): good,
            ("bad", "math", "loss"): bad,
            ("base", "math", "exact"): right,
            ("good|x", "math", "exact"): right,
        },
        "reference": "base",
        "versions": {"torch": "2"},
    }
    return GridResult(**(fields | changes))


def test_json_keeps_every_row_so_that_later_pairings_are_possible(tmp_path: Path) -> None:
    made, path = result(resamples=200), tmp_path / "r.json"
    made.to_json(path)
    again = GridResult.from_json(path)
    assert again.difference("good|x", "math", reference="bad") == made.difference("good|x", "math", reference="bad")
    assert again.to_markdown() == made.to_markdown()
    whole = json.loads(path.read_text())
    assert whole["cells"][1]["verdict"] == "gain"
    assert whole["cells"][1]["difference"]["interval"][1] < 0
    with pytest.raises(BadInput, match="overwrite"):
        made.to_json(path)
    made.to_json(path, overwrite=True)
    path.write_text("{}")
    with pytest.raises(BadInput, match="not the JSON"):
        GridResult.from_json(path)
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_markdown_and_table_say_where_a_mask_did_not_help() -> None:
    from rich.console import Console

    made = result()
    text = made.to_markdown()
    assert "| good\\|x | 0.900 |" in text
    assert ", gain)" in text
    assert "- bad on math: worse (loss +0." in text
    assert "- good|x on math: identical (exact +0.0 % ± 0.0 %, 95 %" in text
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(made.table())
    shown = console.export_text()
    assert "worse" in shown
    assert "reference" in shown


def test_results_of_two_models_merge_only_on_the_same_rows() -> None:
    a = result()
    other = result(models={"next": {}}, cells={("next", "math", "loss"): a.values("bad", "math")})
    both = a.merged(other)
    assert both.verdict("next", "math") == "worse"
    assert list(both.models) == ["base", "good|x", "bad", "next"]
    with pytest.raises(BadInput, match="two rows"):
        a.merged(a)
    other.domains["math"]["digest"] = "other"
    with pytest.raises(BadInput, match="not of the same rows"):
        a.merged(other)


def test_heat_map_is_a_picture_and_refuses_unknown_kinds(tmp_path: Path) -> None:
    made = result()
    figure = made.plot(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    shown = {text.get_text() for text in figure.axes[0].texts}
    assert f"{made.mean('base', 'math'):.3f}" in shown
    assert sum("*" in text for text in shown) == 2
    with pytest.raises(BadInput, match="exists already"):
        made.plot(tmp_path / "map.png")
    with pytest.raises(BadInput, match="nope"):
        made.plot(tmp_path / "map.nope")
    assert [p.name for p in tmp_path.iterdir()] == ["map.png"]


def marks(both: int, first: int, second: int, neither: int) -> tuple[Values, Values]:
    """Marks of two models by how many rows both, only the first, only the second and none answered."""
    a = [1.0] * (both + first) + [0.0] * (second + neither)
    b = [1.0] * both + [0.0] * first + [1.0] * second + [0.0] * neither
    return np.array([[x, 1.0] for x in a]), np.array([[x, 1.0] for x in b])


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_newcombes_table(right: int, n: int, low: float, high: float) -> None:
    """Statistics in Medicine 17:857 (1998), table I, method 3."""
    assert pairing.wilson(right, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("cells", "low", "high"), [((36, 12, 2, 0), 0.0569, 0.3404), ((20, 12, 2, 16), 0.0562, 0.3292)]
)
def test_paired_interval_against_newcombes_table(cells: tuple[int, int, int, int], low: float, high: float) -> None:
    """Statistics in Medicine 17:2635 (1998), table II, method 10."""
    assert pairing.newcombe(*marks(*cells)) == pytest.approx((low, high), abs=1e-4)
    opposite = pairing.newcombe(*marks(*cells)[::-1])
    assert opposite == pytest.approx((-high, -low), abs=1e-4)


def test_mcnemar_counts_only_rows_that_differ() -> None:
    assert pairing.mcnemar(*marks(5, 1, 1, 5)) == 1
    assert pairing.mcnemar(*marks(0, 6, 0, 0)) == pytest.approx(2 / 64)
    assert pairing.mcnemar(*marks(900, 6, 0, 99)) == pytest.approx(2 / 64)
    assert pairing.mcnemar(*marks(0, 12, 2, 0)) == pytest.approx(0.0129, abs=1e-4)


def test_intervals_hold_their_level_for_few_rows() -> None:
    """Drawn 2,000 times: 30 rows, right with 0.97 and 0.9. The normal interval covers the difference too rarely."""
    rng = np.random.default_rng(0)
    inside = normal = 0
    for _ in range(2000):
        a, b = (np.stack([rng.random(30) < p, np.ones(30)], 1).astype(float) for p in (0.97, 0.9))
        low, high = pairing.newcombe(a, b)
        inside += low <= 0.07 <= high
        d = pairing.paired(a, b)
        normal += abs(d.mean - 0.07) <= 1.96 * d.standard_error
    assert inside / 2000 >= 0.94
    assert normal < inside

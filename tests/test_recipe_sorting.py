"""What comes first in a sort by torch, without sorting: the same weights, whatever the ties."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mftmerge.recipe import sorting

SIZE = 20_000
RANDOM = np.random.default_rng(0)
MAGNITUDES: dict[str, Callable[[], np.ndarray]] = {
    "few values": lambda: RANDOM.integers(0, 5, SIZE),
    "one value": lambda: np.ones(SIZE),
    "bfloat16": lambda: torch.from_numpy(RANDOM.standard_normal(SIZE)).bfloat16().abs().float().numpy(),
    "no ties": lambda: RANDOM.permutation(SIZE),
    "rising": lambda: np.arange(SIZE) // 3,
    "rising, then falling": lambda: np.minimum(np.arange(SIZE), SIZE - np.arange(SIZE)),  # here std::sort needs a heap
    "with NaN": lambda: np.where(np.arange(SIZE) % 100 == 0, np.nan, RANDOM.integers(0, 50, SIZE)),
    "few": lambda: RANDOM.integers(0, 3, 100),
}


@pytest.mark.parametrize("name", MAGNITUDES)
@pytest.mark.parametrize("descending", [True, False])
def test_the_elements_that_torch_s_sort_puts_there(name: str, descending: bool) -> None:
    values = MAGNITUDES[name]().astype(np.float32)
    n = values.size
    order = torch.from_numpy(values).argsort(descending=descending).numpy()
    for start, stop in ((0, 0), (0, 1), (0, n // 5), (0, n // 2), (n // 7, n // 2), (n // 2, n), (0, n)):
        expected = np.zeros(n, np.bool_)
        expected[order[start:stop]] = True
        found = sorting.kept(values.view(np.uint32).copy(), sorting.Range(descending, slice(start, stop)))
        assert np.array_equal(found, expected), (start, stop)


def test_nothing_is_sorted_where_torch_sorts_as_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere all of it is, with the same result: what this test is skipped for."""
    if not sorting.agrees():
        pytest.skip("this build of torch sorts in another way")

    def sort(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(sorting, "_by_sorting", sort)
    values = RANDOM.integers(0, 200, SIZE).astype(np.float32).view(np.uint32)
    assert sorting.kept(values, sorting.Range(True, slice(None, 7000))).sum() == 7000


def test_another_way_of_sorting_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorting, "agrees", lambda: False)
    monkeypatch.setattr(sorting, "first", lambda *_: np.zeros(SIZE, np.bool_))
    values = RANDOM.integers(0, 200, SIZE).astype(np.float32).view(np.uint32)
    assert sorting.kept(values, sorting.Range(True, slice(None, 7000))).sum() == 7000

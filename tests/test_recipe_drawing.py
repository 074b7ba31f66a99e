"""What is drawn many at a time is what torch draws one by one."""

from __future__ import annotations

import pytest
import torch

from mftmerge.recipe import drawing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probability", [None, 0.0, 1e-8, 0.1, 0.5, 1 - 2**-24, 1.0])
def test_as_torch_draws(dtype: torch.dtype, probability: float | None) -> None:
    ours, theirs = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    given = torch.rand(50, 1001) if probability is None else torch.full((50, 1001), probability)
    for _ in range(2):
        expected = torch.bernoulli(given.to(dtype), generator=theirs)
        found = drawing.drawn(given.to(dtype), ours)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
        assert torch.equal(ours.get_state(), theirs.get_state())


def test_this_torch_draws_so() -> None:
    """Elsewhere torch draws itself, with the same result."""
    assert drawing._agrees()


def test_another_way_of_drawing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "BITS", (1 << 23) - 1)
    drawing._agrees.cache_clear()
    try:
        assert not drawing._agrees()
        with drawing._Draw(torch.Generator().manual_seed(3)):
            found = torch.bernoulli(torch.full((1000,), 0.3))
    finally:
        drawing._agrees.cache_clear()
    assert torch.equal(found, torch.bernoulli(torch.full((1000,), 0.3), generator=torch.Generator().manual_seed(3)))


def test_pieces_of_rows_cover_a_tensor_once() -> None:
    from mftmerge.recipe import evaluation

    for shape in ((), (7,), (0, 4), (3, 5), (5, 2, 3), (4, evaluation.PIECE), (evaluation.PIECE, 3)):
        tensor = torch.arange(int(torch.tensor(shape).prod()) if shape else 1).reshape(shape)
        pieces = [tensor[rows].reshape(-1) for rows in evaluation._rows(tensor)]
        assert torch.equal(torch.cat(pieces), tensor.reshape(-1))
        assert max(p.numel() for p in pieces) <= max(evaluation.PIECE, tensor[:1].numel() if shape else 1)

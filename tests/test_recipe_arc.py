"""slerp in pieces: mergekit's bits, whatever the numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from recipe_kitchen import assert_equal, make_kitchen, stock, tensors

from mftmerge.recipe import arc
from mftmerge.recipe.build import build

SIZE = 10_000
DRAW = torch.Generator().manual_seed(3)
ENDS: dict[str, Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "any": lambda a, b: (a, b),
    "close": lambda a, b: (a, a + 0.01 * b),
    "equal": lambda a, b: (a, a),
    "opposite": lambda a, b: (a, -2 * a),
    "nothing": lambda a, b: (0 * a, b),
    "next to nothing": lambda a, b: (a, b * 1e-12),
    "infinite": lambda a, b: (a, torch.where(b > 2, torch.inf, b)),
}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit.merge_methods.slerp._CHUNK_ELEMENTS", 1024)
    monkeypatch.setattr(arc, "CHUNK", 1024)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.7])
def test_bits_of_mergekit(name: str, dtype: torch.dtype, t: float) -> None:
    for size in (1, 77, 1024, SIZE):
        a, b = (v.to(dtype) for v in ENDS[name](*torch.randn(2, size, generator=DRAW)))
        parts = arc.pieces(t, lambda part, a=a, b=b: (a[part], b[part]), size, dtype)
        found = torch.cat([piece.clone() for piece in parts])
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        expected = arc.slerp(torch.tensor([t], dtype=wide), a[None], b[None])[0]
        assert found.dtype == expected.dtype
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), size


def test_this_mergekit_is_the_one_that_was_read() -> None:
    assert arc.agrees()


@pytest.mark.parametrize(
    ("more", "agrees"),
    [
        ({}, True),
        ({"dtype": "float16"}, True),
        ({"dtype": "float64", "out_dtype": "float32"}, True),
        ({"out_dtype": "float32"}, True),
        ({}, False),
    ],
    ids=str,
)
@pytest.mark.usefixtures("small_chunks")
def test_models_of_two_types(
    more: dict[str, str], agrees: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the type that mergekit takes for both; and where its slerp is another one, that one is used."""
    if not agrees:
        monkeypatch.setattr(arc, "agrees", lambda: False)
        monkeypatch.setattr(arc, "pieces", None)
    for dtype in ("float32", "bfloat16"):
        make_kitchen(tmp_path / dtype, dtype=dtype)
    models = [str(tmp_path / dtype / "models" / name) for dtype, name in (("bfloat16", "math"), ("float32", "code"))]
    config = {"merge_method": "slerp", "models": [{"model": m} for m in models], "base_model": models[1]} | more
    config["parameters"] = {"t": [{"filter": "mlp", "value": [0, 0.4, 1]}, {"value": 0.7}]}
    (tmp_path / "r.yml").write_text(yaml.safe_dump(config))
    build(tmp_path / "r.yml", tmp_path / "ours")
    assert_equal(tensors(tmp_path / "ours"), tensors(stock(config, tmp_path / "theirs")))

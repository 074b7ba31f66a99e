"""The exact cut against a stable sort, with ties, signs, zeros, pieces and every method of finding it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mftmerge.errors import BadInput
from mftmerge.select import choose, kept_or_zero
from mftmerge.train import selection, targets


def by_sorting(values: Tensor, dropped: int) -> Tensor:
    kept = torch.ones(values.numel(), dtype=torch.bool)
    kept[torch.sort(values.reshape(-1), stable=True).indices[:dropped]] = False
    return kept.view(values.shape)


def cases() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(40, 50, generator=g)
    return {
        "normal": normal,
        "magnitudes": normal.abs(),
        "ties": normal.bfloat16().float().mul(8).round(),
        "constant": torch.full((7, 9), 0.25),
        "zeros": torch.where(normal > 0, 0.0, -0.0),
        "extreme": torch.tensor([3e38, -3e38, 1e-45, -1e-45, 0.0, 1.0, 1.0, -1.0, 1e-38]),
    }


@pytest.mark.parametrize("case", list(cases()))
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif("not torch.cuda.is_available()"))]
)
def test_kept_weights_equal_a_stable_sort(case: str, device: str) -> None:
    values = cases()[case]
    for dropped in sorted({0, 1, values.numel() // 10, values.numel() // 2, values.numel() - 1, values.numel()}):
        kept = selection.keep_top(values.to(device), dropped).cpu()
        assert torch.equal(kept, by_sorting(values, dropped)), dropped


@pytest.mark.parametrize("case", list(cases()))
def test_histograms_find_the_same_value_over_any_pieces(case: str) -> None:
    values = cases()[case]
    flat = values.reshape(-1)
    for dropped in {0, 1, flat.numel() // 10, flat.numel() - 1}:
        cut = selection.smallest_kept(values, dropped)
        assert selection.smallest_kept_over([values], dropped) == cut
        assert selection.smallest_kept_over([flat[:3], flat[3:4], flat[4:]], dropped) == cut
        assert cut == float(torch.sort(flat).values[dropped])


def test_selection_leaves_the_scores_alone() -> None:
    values = cases()["normal"]
    before = values.clone()
    selection.keep_top(values, 100)
    assert torch.equal(values, before)


@pytest.mark.parametrize("dim", [0, 1])
def test_patterns_break_ties_from_the_lowest_index(dim: int) -> None:
    values = torch.tensor([[1.0, 1.0, 1.0, 1.0], [3.0, 1.0, 1.0, 2.0], [4.0, 3.0, 2.0, 1.0], [0.0, 0.0, 5.0, 0.0]])
    expected = torch.tensor([[0, 0, 1, 1], [1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    values = values.t().contiguous() if dim == 0 else values
    expected = expected.t() if dim == 0 else expected
    assert torch.equal(selection.keep_pattern(values, 2, 4, dim), expected)


def test_layers_are_numbers_and_ranges() -> None:
    assert targets.parse_layers("0,2-3", 8) == [0, 2, 3]
    assert targets.parse_layers(None, 30) == [26, 27, 28, 29]
    for bad, message in [("9", "layers 0 to 7"), ("3-2", "layers 0 to 7"), ("a", "numbers and ranges")]:
        with pytest.raises(BadInput, match=message):
            targets.parse_layers(bad, 8)


def test_modules_are_named_or_listed_when_nothing_matches() -> None:
    from helpers.tiny_models import tiny_config
    from transformers import AutoModelForCausalLM

    def short(architecture: str, modules: str) -> set[str]:
        model = AutoModelForCausalLM.from_config(tiny_config(architecture, 300))
        return {t.name.split(".", 3)[3] for t in targets.find(model, "3", modules)}

    attention = {f"self_attn.{n}_proj.weight" for n in "qkvo"}
    mlp = {f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    assert short("llama", "attn,mlp") == attention | mlp == short("qwen3", "attn,mlp") == short("gemma3", "attn,mlp")
    assert short("llama", "attn") == attention
    assert short("llama", "q_proj,up_proj") == {"self_attn.q_proj.weight", "mlp.up_proj.weight"}
    assert short("llama", r"(q|k)_proj") == {"self_attn.q_proj.weight", "self_attn.k_proj.weight"}
    assert short("mixtral", "mlp") == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}  # never the router
    assert short("gpt2", "attn") == {"attn.c_attn.weight", "attn.c_proj.weight"}
    with pytest.raises(BadInput, match=r"there are mlp.down_proj.weight, .*self_attn.v_proj.weight"):
        short("llama", "nothing")
    with pytest.raises(BadInput, match="not a regular expression"):
        short("llama", "(")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_a_choice_by_mask_is_that_of_where_bit_for_bit(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 0.0, 1e-45])
    one, other = (torch.cat([torch.randn(64, generator=g), odd.roll(n)]).to(dtype) for n in (0, 2))
    kept = torch.rand(one.numel(), generator=g) > 0.5

    def raw(values: Tensor) -> Tensor:
        return values.contiguous().view(torch.uint8)

    assert torch.equal(raw(choose(kept, one, other)), raw(torch.where(kept, one, other)))
    assert torch.equal(raw(kept_or_zero(kept, one)), raw(torch.where(kept, one, one.new_zeros(()))))
    if dtype == torch.float32:
        assert torch.equal(raw(selection.negated(one, kept)), raw(torch.where(kept, -one, one)))
    wider = choose(kept, one, other.double())  # of two dtypes, the wider
    assert torch.equal(raw(wider), raw(torch.where(kept, one, other.double())))

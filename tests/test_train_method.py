"""The optimiser against a straight-through reference written here with autograd and `functional_call`: bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from mftmerge.errors import BadInput, MftmergeError
from mftmerge.train import scores as initial_scores
from mftmerge.train import targets
from mftmerge.train.optimizer import MaskOptimizer

ARCHITECTURES = ["llama", "qwen3", "gemma3", "mixtral", "gpt2"]


class StraightThrough(torch.autograd.Function):
    """Forward: the share kept by a plain sort of one matrix; backward: the gradient as it comes."""

    @staticmethod
    def forward(ctx: Any, ranked: Tensor, dropped: int, blocks: int) -> Tensor:
        flat = ranked.reshape(blocks, -1)
        order = torch.sort(flat, dim=1, stable=True).indices
        mask = torch.ones_like(flat)
        mask.scatter_(1, order[:, :dropped], 0.0)
        return mask.view(ranked.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None, None


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").train()


def batch(rows: int = 2, length: int = 12) -> dict[str, Tensor]:
    ids = torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def reference(
    model: Any, found: list[targets.Target], scores: dict[str, Tensor], keep_out_of: int, signed: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and dS by autograd; one of `keep_out_of` weights is dropped."""
    leaves = {n: s.clone().requires_grad_() for n, s in scores.items()}
    weights = {}
    for t in found:
        ranked = leaves[t.name] if signed else leaves[t.name].abs()
        mask = StraightThrough.apply(ranked, t.parameter.numel() // t.blocks // keep_out_of, t.blocks)
        weights[t.name] = t.parameter.detach() * mask.to(t.parameter.dtype)
    loss = functional_call(model, weights, kwargs=batch(), strict=False).loss
    return loss.detach(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("signed", [False, True], ids=["abs", "signed"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_score_gradient_equal_the_reference(
    tiny: Callable[..., Path], architecture: str, checkpointing: bool, signed: bool
) -> None:
    model = load(tiny(architecture))
    found = targets.find(model, "1-2")
    targets.freeze_others(model, found)
    scores = initial_scores.initial(found, "magnitude" if signed else "normal")
    torch.manual_seed(0)  # dropout (gpt2) draws the same in both
    loss, expected = reference(model, found, scores, 10, signed)

    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = MaskOptimizer(found, scores, signed=signed)
    torch.manual_seed(0)
    out = model(**batch(), use_cache=False).loss
    out.backward()
    assert torch.equal(out.detach(), loss)
    got = optimizer.score_gradients()
    assert set(got) == {t.name for t in found} == set(expected)
    for name, value in expected.items():
        assert value.abs().sum() > 0, name
        assert torch.equal(got[name], value), name
    lower = [p for n, p in model.named_parameters() if ".0." in n or "embed" in n or "wte" in n]
    assert lower
    assert all(p.grad is None for p in lower)


def test_several_steps_equal_adam_on_the_reference(tiny: Callable[..., Path]) -> None:
    model = load(tiny("llama"))
    other = copy.deepcopy(model)
    found, theirs = targets.find(model, "2-3"), targets.find(other, "2-3")
    targets.freeze_others(model, found)
    scores = initial_scores.initial(found, "normal")
    mine = MaskOptimizer(found, scores, lr=3e-3, signed=False, clip=0.5)
    leaves = {n: s.clone() for n, s in scores.items()}
    plain = torch.optim.Adam(leaves.values(), lr=3e-3, fused=True)
    for _ in range(4):
        model(**batch()).loss.backward()
        mine.step()
        mine.zero_grad()
        _, gradients = reference(other, theirs, leaves, 10, False)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()]))
        for name, leaf in leaves.items():
            leaf.grad = gradients[name] / (norm / 0.5).clamp(min=1)
        plain.step()
    for name, value in mine.scores().items():
        torch.testing.assert_close(value, leaves[name], rtol=1e-6, atol=1e-9)
        assert not torch.equal(value, scores[name])
    base = dict(other.named_parameters())
    for name, kept in mine.mask().items():
        assert torch.equal(dict(model.named_parameters())[name], torch.where(kept, base[name], 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_hold_exact_selections_and_come_back(tiny: Callable[..., Path], dtype: torch.dtype) -> None:
    model = load(tiny("llama"), dtype)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = targets.find(model, "3", "q_proj,down_proj")
    optimizer = MaskOptimizer(found, initial_scores.initial(found), lr=0.01)
    model(**batch()).loss.backward()
    optimizer.step()
    assert optimizer.flipped > 0
    assert optimizer.scores()[found[0].name].dtype == torch.float32
    mask = optimizer.mask()
    live = dict(model.named_parameters())
    for name, kept in mask.items():
        assert int((~kept).sum()) == kept.numel() // 10
        assert torch.equal(live[name], torch.where(kept, base[name], torch.zeros_like(base[name])))
    with optimizer.base_weights():
        assert all(torch.equal(live[n], base[n]) for n in base)
    assert not torch.equal(live[found[0].name], base[found[0].name])
    with optimizer.masked_by({n: torch.zeros_like(k) for n, k in mask.items()}):
        assert all(not live[n].any() for n in mask)
    optimizer.restore()
    assert all(torch.equal(live[n], base[n]) for n in base)


def matrix(rows: int = 8, columns: int = 10) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)))


def test_delta_target_drops_to_the_base() -> None:
    p = matrix()
    tuned, base = p.detach().clone(), torch.full_like(p, 7.0)
    t = targets.Target("w", p, 0)
    scores = initial_scores.initial([t], dropped={"w": base})
    optimizer = MaskOptimizer([t], scores, keep=0.5, dropped={"w": base})
    kept = optimizer.mask()["w"]
    assert torch.equal(p, torch.where(kept, tuned, base))
    assert (tuned - base).abs()[kept].min() >= (tuned - base).abs()[~kept].max()
    p.grad = torch.ones_like(p)
    assert torch.equal(optimizer.score_gradients()["w"], tuned - base)


def test_keep_warmup_reaches_the_share_in_equal_steps() -> None:
    p = matrix()
    optimizer = MaskOptimizer([("w", p)], {"w": p.detach().abs()}, keep="0.8", keep_warmup=4)
    pruned = [int((p == 0).sum())]
    for _ in range(5):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        pruned.append(int((p == 0).sum()))
    assert pruned == [0, 4, 8, 12, 16, 16]
    assert int((~optimizer.mask()["w"]).sum()) == 16


def test_reference_rounding_reproduces_the_published_count() -> None:
    p = matrix(10, 100)
    assert int((~MaskOptimizer([("w", p)], {"w": p.detach().abs()}).mask()["w"]).sum()) == 100
    optimizer = MaskOptimizer([("w", p)], {"w": p.detach().abs()}, reference_rounding=True)
    assert int((~optimizer.mask()["w"]).sum()) == 99


def test_global_scope_makes_one_cut() -> None:
    a, b = matrix(8), matrix(6)
    scores = {"a": torch.full_like(a, 1.0), "b": torch.full_like(b, 2.0)}
    mask = MaskOptimizer([("a", a), ("b", b)], scores, keep=0.9, scope="global").mask()
    assert not mask["a"].view(-1)[:14].any()  # 14 of 140 dropped, the ties of the first tensor from its lowest index
    assert mask["a"].view(-1)[14:].all()
    assert mask["b"].all()


def test_patterns_keep_two_of_four_inputs() -> None:
    p = nn.Parameter(torch.randn(6, 8))
    kept = MaskOptimizer([("w", p)], {"w": p.detach().abs()}, pattern=(2, 4)).mask()["w"]
    best = p.detach().abs().view(6, 2, 4).topk(2).indices
    assert torch.equal(kept.view(6, 2, 4), torch.zeros(6, 2, 4, dtype=torch.bool).scatter(-1, best, True))
    with pytest.raises(BadInput, match="10 inputs do not divide by 4"):
        MaskOptimizer([("w", matrix())], {"w": matrix().detach()}, pattern=(2, 4))


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    p = matrix()
    optimizer = MaskOptimizer([("w", p)], {"w": p.detach().abs()})
    before, scores = p.detach().clone(), optimizer.scores()["w"]
    p.grad = torch.full_like(p, torch.nan)
    with pytest.raises(MftmergeError, match="step 1: the gradient is not finite"):
        optimizer.step()
    assert torch.equal(p, before)
    assert torch.equal(optimizer.scores()["w"], scores)


def test_state_dict_continues_bit_for_bit(tmp_path: Path) -> None:
    def steps(optimizer: MaskOptimizer, p: nn.Parameter, numbers: range) -> None:
        for i in numbers:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p.dtype)
            optimizer.step()

    def fresh() -> tuple[nn.Parameter, MaskOptimizer]:
        p = nn.Parameter(matrix(20, 30).detach().bfloat16())
        return p, MaskOptimizer([("w", p)], {"w": p.detach().float().abs()}, lr=0.05)

    p, straight = fresh()
    steps(straight, p, range(6))
    q, first = fresh()
    steps(first, q, range(3))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    r, second = fresh()
    second.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(r, q)
    steps(second, r, range(3, 6))
    assert torch.equal(second.scores()["w"], straight.scores()["w"])
    assert torch.equal(second.mask()["w"], straight.mask()["w"])
    assert torch.equal(r, p)
    assert not torch.equal(p, q)


def test_fused_experts_are_cut_one_by_one(tiny: Callable[..., Path]) -> None:
    model = load(tiny("mixtral"))
    found = targets.find(model, "0", "mlp")
    assert {t.name.split(".")[-1]: t.blocks for t in found} == {"gate_up_proj": 8, "down_proj": 4}
    optimizer = MaskOptimizer(found, initial_scores.initial(found, "normal"), signed=False)
    for t in found:
        dropped = (~optimizer.mask()[t.name]).view(t.blocks, -1).sum(1)
        assert dropped.tolist() == [t.parameter.numel() // t.blocks // 10] * t.blocks


def test_passes_inside_autocast_see_each_mask(tiny: Callable[..., Path]) -> None:
    """Autocast keeps the weights that it has cast; whatever writes weights in place must make it forget them."""
    from mftmerge.train.control import WeightOptimizer

    for make in (
        lambda found: MaskOptimizer(found, initial_scores.initial(found), keep=0.5, lr=0.01),
        lambda found: WeightOptimizer(found, lr=0.01),
    ):
        model = load(tiny("llama"))
        found = targets.find(model, "2-3")
        targets.freeze_others(model, found)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            base = float(model(**batch()).loss.detach())
            optimizer = make(found)
            first = model(**batch()).loss
            first.backward()
            optimizer.step()
            second = float(model(**batch()).loss.detach())
            assert second != float(first.detach())
            optimizer.restore()
            assert float(model(**batch()).loss.detach()) == base
            state = {n: torch.zeros_like(v) for n, v in optimizer.mask().items()}
            with optimizer.masked_by(state):
                inside = float(model(**batch()).loss.detach())
            assert inside not in (base, second)
            assert float(model(**batch()).loss.detach()) != inside


def test_experts_stored_in_out_get_patterns_along_their_inputs() -> None:
    from transformers import GptOssConfig, GptOssForCausalLM, JetMoeConfig, JetMoeForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4}
    config = GptOssConfig(**sizes, num_experts_per_tok=2, layer_types=["full_attention"], pad_token_id=0)
    found = {t.name.rsplit(".", 1)[-1]: t for t in targets.find(GptOssForCausalLM(config), modules="experts")}
    assert {n: (t.input_dim, t.blocks) for n, t in found.items()} == {"gate_up_proj": (-2, 4), "down_proj": (-2, 4)}
    t = found["gate_up_proj"]
    kept = MaskOptimizer([t], initial_scores.initial([t]), pattern=(2, 4)).mask()[t.name]
    assert (kept.view(4, 16, 4, 64).sum(2) == 2).all()  # (experts, in / 4, 4, out)

    jet = JetMoeForCausalLM(JetMoeConfig(**sizes, num_experts_per_tok=2, kv_channels=16))
    found = {t.name.split(".layers.0.")[1]: t for t in targets.find(jet)}
    assert found["mlp.input_linear.weight"].blocks == found["self_attention.experts.input_linear.weight"].blocks == 4
    assert not any("router" in name for name in found)
    assert targets.share(jet, list(found.values())) > 0.98


def test_what_multiplies_no_activations_is_never_masked() -> None:
    from transformers import CohereConfig, CohereForCausalLM, MambaConfig, MambaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2}
    mamba = MambaForCausalLM(MambaConfig(**sizes, state_size=8))
    kinds = {t.name.split(".mixer.")[1] for t in targets.find(mamba)}
    assert kinds == {"in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"}
    cohere = CohereForCausalLM(CohereConfig(**sizes, intermediate_size=96, num_attention_heads=4, use_qk_norm=True))
    assert not any("norm" in t.name for t in targets.find(cohere))  # two-dimensional: a row a head


def test_a_parameter_of_several_layers_is_one_target(tiny: Callable[..., Path]) -> None:
    model = load(tiny("llama"))
    model.model.layers[3].mlp = model.model.layers[0].mlp
    found = targets.find(model, "3")
    assert [t.layer for t in found if ".mlp." in t.name] == [0, 0, 0]
    both = targets.find(model, "0,3", "mlp")
    assert len(both) == len({id(t.parameter) for t in both}) == 3
    assert {t.name for t in both} <= {n for n, _ in model.named_parameters()}


def test_the_text_model_of_a_vision_model_is_masked() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    found = targets.find(Gemma3ForConditionalGeneration(config))
    assert {t.layer for t in found} == {0, 1}
    assert all("language_model" in t.name for t in found)

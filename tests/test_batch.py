"""Switcher.batch: every row of a batch under its own mask; what it gives is what switching gives, rounding apart."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import random_mask
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mftmerge import rowmasks, rowproduct
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.live import Switcher, attach
from mftmerge.mask import Mask

NAMES = ["a", "b", None, "a", "c"]


def load(path: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def prompts(rows: int, tokens: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(5, 90, (rows, tokens)))


@contextmanager
def no_change(model: torch.nn.Module) -> Iterator[None]:
    before = {k: p.detach().view(torch.uint8).clone() for k, p in model.named_parameters()}
    modules = {n: dict(m.__dict__) for n, m in model.named_modules()}
    yield
    assert all(torch.equal(p.detach().view(torch.uint8), before[k]) for k, p in model.named_parameters())
    for name, module in model.named_modules():
        assert module.__dict__.keys() == modules[name].keys(), name
        assert len(module._forward_hooks) == 0, name


def switched(
    switcher: Switcher, model: torch.nn.Module, ids: torch.Tensor, names: Sequence[str | None]
) -> torch.Tensor:
    """Logits of each row under its mask, one run a row."""
    rows = []
    for i, name in enumerate(names):
        with switcher.use(name):
            rows.append(model(ids[i : i + 1]).logits)
    return torch.cat(rows)


@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3", "mixtral", "gpt2"])
@torch.no_grad()
def test_each_row_is_as_under_its_own_mask(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, architecture: str, with_base: bool, numba: bool
) -> None:
    if numba:
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(rowproduct, "possible", lambda weight: False)
    path = tiny(architecture)
    base = tiny(architecture, seed=7) if with_base else None
    model = load(path)
    switcher = attach(model, {n: random_mask(path, i, 0.6 + i / 10) for i, n in enumerate("abc")}, base=base)
    ids = prompts(len(NAMES))
    with no_change(model):
        for tokens in (7, 1):
            expected = switched(switcher, model, ids[:, :tokens], NAMES)
            apart = switched(switcher, model, ids[:, :tokens], [None] * 5)
            with switcher.batch(NAMES):
                found = model(ids[:, :tokens]).logits
            assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
            assert (found - apart)[[0, 1, 3, 4]].abs().max() > 100 * (found - expected).abs().max()  # masks do matter
        assert switcher.active is None


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mixtral", "gpt2"])
@torch.no_grad()
def test_greedy_answers_are_the_same_with_beams_and_sequences_too(tiny: Callable[..., Path], architecture: str) -> None:
    path = tiny(architecture)
    model = load(path)
    switcher = attach(model, {n: random_mask(path, i, 0.8) for i, n in enumerate("abc")})
    ids, how = prompts(len(NAMES)), {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    more = how | {"num_beams": 3, "num_return_sequences": 2}
    expected: list[torch.Tensor] = []
    beams: list[torch.Tensor] = []
    for i, name in enumerate(NAMES):
        with switcher.use(name):
            expected.append(model.generate(ids[i : i + 1], **how))
            beams.append(model.generate(ids[i : i + 1], **more))
    with no_change(model), switcher.batch(NAMES):
        found = model.generate(ids, **how)
        found_beams = model.generate(ids, **more)
    for i, one in enumerate(expected):
        assert torch.equal(found[i, : one.shape[1]], one[0])
    for i, pair in enumerate(beams):
        assert torch.equal(found_beams[2 * i : 2 * i + 2, : pair.shape[1]], pair)
    assert len({tuple(r) for r in found[:, ids.shape[1] :].tolist()}) >= 4  # the answers are not all one


@torch.no_grad()
def test_bfloat16_rounds_no_more_than_switching_does(tiny: Callable[..., Path]) -> None:
    path = tiny("llama", dtype="bfloat16")
    model, exact = load(path, torch.bfloat16), load(path)
    masks = {n: random_mask(path, i, 0.7) for i, n in enumerate("abc")}
    switcher, reference = attach(model, masks), attach(exact, masks)
    ids = prompts(len(NAMES), 1)
    wanted = switched(reference, exact, ids, NAMES)
    by_switching = (switched(switcher, model, ids, NAMES) - wanted).abs().mean()
    with switcher.batch(NAMES):
        assert (model(ids).logits - wanted).abs().mean() <= 1.5 * by_switching


@torch.no_grad()
def test_embeddings_heads_and_norms_can_be_masked(tiny: Callable[..., Path]) -> None:
    path = tiny("qwen2")
    model = load(path)
    rng = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": tuple(model.get_input_embeddings().weight.shape),
        "model.layers.0.self_attn.q_proj.bias": (64,),
        "model.layers.1.input_layernorm.weight": (64,),
    }
    masks = {n: Mask.from_bools({k: rng.random(s) < 0.7 for k, s in shapes.items()}) for n in "abc"}
    switcher = attach(model, masks)
    ids = prompts(len(NAMES))
    expected = switched(switcher, model, ids, NAMES)
    with switcher.batch(NAMES):
        assert (model(ids).logits - expected).abs().max() <= 2e-5 * expected.abs().max()


@torch.no_grad()
def test_a_list_that_does_not_fit_and_other_mistakes(tiny: Callable[..., Path]) -> None:
    path = tiny("llama")
    model = load(path)
    switcher = attach(model, {"a": random_mask(path, 1), "b": random_mask(path, 2)})
    ids = prompts(3)
    with no_change(model):
        for wrong in (["a"] * 2, ["a"] * 6, []):
            with pytest.raises(BadInput, match=rf"a batch of 3 rows for {len(wrong)} masks"), switcher.batch(wrong):
                model(ids)
        with pytest.raises(BadInput, match="no mask 'x' is attached; there are a, b"), switcher.batch(["x", "a"]):
            pass
        with pytest.raises(BadInput, match="a list with one name"), switcher.batch("ab"):
            pass
        with switcher.batch(["a", "b", None]) as rows:
            with pytest.raises(MftmergeError, match="a batch of masks is in use"):
                switcher.switch("a")
            rows.assign(["b", "b", "b"])
            with pytest.raises(MftmergeError, match="called outside its model"):
                model.model.layers[0].mlp.up_proj(torch.zeros(3, 64))
            caught: list[str] = []

            def other() -> None:
                try:
                    model(ids)
                except MftmergeError as e:
                    caught.append(str(e))

            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            assert "another thread uses its a batch of masks" in caught[0].replace("its batch", "its a batch")
            with torch.enable_grad(), pytest.raises(MftmergeError, match=r"torch.no_grad"):
                model(ids)
            raised = rows.rows(6)
            assert raised == ["b"] * 6
        with pytest.raises(ZeroDivisionError), switcher.batch(["a"] * 3):
            raise ZeroDivisionError
    switcher.switch("a")
    with switcher.batch([None] * 3):
        plain = model(ids).logits
    assert switcher.active == "a"
    switcher.switch(None)
    assert torch.equal(model(ids).logits, plain)


@torch.no_grad()
def test_what_fails_inside_a_layer_leaves_the_model_as_it_was(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("mixtral")
    model = load(path)
    switcher = attach(model, {"a": random_mask(path, 1), "b": random_mask(path, 2)})
    ids = prompts(2, 20)
    with no_change(model):
        for place in range(0, 24, 5):
            calls = 0
            own = torch.nn.functional.linear

            def failing(*arguments: torch.Tensor, own: Callable = own, place: int = place) -> torch.Tensor:
                nonlocal calls
                calls += 1
                if calls > place:
                    raise KeyboardInterrupt
                return own(*arguments)

            with monkeypatch.context() as patch:
                patch.setattr(torch.nn.functional, "linear", failing)
                with pytest.raises(KeyboardInterrupt), switcher.batch(["a", "b"]):
                    model(ids)


@torch.no_grad()
def test_weights_used_past_their_module_are_noticed(tiny: Callable[..., Path]) -> None:
    path = tiny("llama")
    model = load(path)
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: torch.nn.functional.linear(x, mlp.gate_proj.weight) @ mlp.up_proj.weight
    switcher = attach(model, {"a": random_mask(path, 1)})
    with pytest.raises(MftmergeError, match=r"layers.1.mlp.gate_proj.*no row was masked"), switcher.batch(["a"]):
        model(prompts(1))


def test_compiled_models_and_encoders_are_refused(tiny: Callable[..., Path]) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    path = tiny("llama")
    compiled = attach(torch.compile(load(path)), {"a": random_mask(path, 1)})
    with pytest.raises(BadInput, match="compiled"), compiled.batch(["a"]):
        pass
    small = T5Config(vocab_size=90, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    kept = np.ones((32, 32), bool)
    t5 = attach(
        T5ForConditionalGeneration(small),
        {"a": Mask.from_bools({"encoder.block.0.layer.0.SelfAttention.q.weight": kept})},
    )
    with pytest.raises(BadInput, match="decoder alone"), t5.batch(["a"]):
        pass


@torch.no_grad()
def test_masks_come_and_go_while_the_model_is_there(tiny: Callable[..., Path]) -> None:
    path, base = tiny("llama"), tiny("llama", seed=7)
    model = load(path)
    masks = {
        n: random_mask(path, i, 0.6, where) for i, (n, where) in enumerate({"a": "up", "b": "", "c": "q_pro"}.items())
    }
    all_at_once = attach(load(path), masks, base=base)
    switcher = attach(model, {"a": masks["a"]}, base=base)
    with no_change(model):
        switcher.add("b", masks["b"], base=base)
        switcher.switch("b")
        with pytest.raises(MftmergeError, match="a mask is on"):
            switcher.add("c", masks["c"], base=base)
        switcher.switch(None)
        switcher.add("c", masks["c"], base=base)
        with pytest.raises(BadInput, match="attached already"):
            switcher.add("c", masks["c"])
        with pytest.raises(BadInput):
            switcher.add("d", Mask.from_bools({"other": np.ones((3, 3), bool)}))
        assert switcher.names == ("a", "b", "c")
        ids = prompts(1)
        for name in ("a", "c", "b", None, "a"):
            with switcher.use(name), all_at_once.use(name):
                assert torch.equal(model(ids).logits, all_at_once._attachment.model(ids).logits), name
        size = switcher.nbytes
        switcher.remove("b")
        assert switcher.nbytes < size
        for name in ("a", "c", None):
            with switcher.use(name), all_at_once.use(name):
                assert torch.equal(model(ids).logits, all_at_once._attachment.model(ids).logits), name
        with pytest.raises(BadInput, match="no mask 'b'"):
            switcher.switch("b")
        switcher.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_dropped", [False, True])
def test_the_product_from_bits(dtype: torch.dtype, with_dropped: bool) -> None:
    pytest.importorskip("numba")
    torch.manual_seed(0)
    torch.set_num_threads(2)
    for out, columns, rows in ((1, 32, 1), (13, 96, 5), (3, 4096, 2), (700, 512, 3)):
        weight, other, x = (torch.randn(s).to(dtype) for s in ((out, columns), (out, columns), (rows, columns)))
        weight[0, 3] = float("inf")  # dropped below: not a number times 0
        kept = torch.rand(rows, out, columns) < 0.8
        kept[:, 0, 3] = False
        kept[rows // 2] = kept[rows // 2 - 1]  # two rows under one mask go together
        packed = [torch.from_numpy(np.packbits(k.numpy().reshape(-1), bitorder="little")) for k in kept]
        packed[rows // 2] = packed[rows // 2 - 1]
        assert rowproduct.possible(weight)
        found = rowproduct.row_product(x, weight, packed, other if with_dropped else None)
        masked = torch.where(kept, weight.double(), other.double() if with_dropped else torch.zeros(()).double())
        expected = torch.einsum("roc,rc->ro", masked, x.double())
        assert (found - expected).abs().max() < 1e-5 * columns**0.5 * 4
        alone = torch.cat(
            [
                rowproduct.row_product(x[r : r + 1], weight, packed[r : r + 1], other if with_dropped else None)
                for r in range(rows)
            ]
        )
        assert torch.equal(found, alone)  # a row's sums do not depend on its neighbours


def test_unfused_experts_are_refused() -> None:
    config = LlamaConfig(
        vocab_size=90, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    model.model.layers[0].experts = torch.nn.ModuleList([torch.nn.Linear(32, 32)])
    switcher = attach(model, {"a": Mask.from_bools({"model.layers.0.experts.0.weight": np.ones((32, 32), bool)})})
    with pytest.raises(BadInput, match="sees other rows than the batch's"), switcher.batch(["a"]):
        pass
    assert rowmasks.FEW > 0

"""attach/Switcher: exact after any number of switches, only what changes is written, errors rather than mix-ups."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import random_mask
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mftmerge.apply import apply_mask
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.live import attach
from mftmerge.mask import Mask


def load(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: p.detach().view(torch.uint8).clone() for k, p in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "mixtral", "gpt2"])
def test_a_switched_model_equals_the_applied_checkpoint(
    tiny: Callable[..., Path], tmp_path: Path, architecture: str, with_base: bool
) -> None:
    path = tiny(architecture, dtype="bfloat16")
    base = tiny(architecture, dtype="bfloat16", seed=7) if with_base else None
    masks = {"code": random_mask(path, 1, 0.9), "math": random_mask(path, 2, 0.8)}
    applied = {}
    for name, mask in masks.items():
        apply_mask(mask, path, tmp_path / name, base=base)
        applied[name] = state(load(tmp_path / name))
    model = load(path)
    original = state(model)
    switcher = attach(model, masks, base=base)
    assert same(state(model), original)
    rng = np.random.default_rng(3)
    for name in [None, "code", "math", None, *rng.choice(["code", "math"], 8)]:
        switcher.switch(name)
        assert switcher.active == name
        assert same(state(model), applied[name] if name else original)
    before = switcher.active
    other = "code" if before == "math" else "math"

    def failing() -> None:
        with switcher.use(other):
            assert same(state(model), applied[other])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert switcher.active == before
    switcher.detach()
    assert same(state(model), original)
    with pytest.raises(MftmergeError, match="detached"):
        switcher.switch("code")


def test_the_accelerators_path_does_the_same(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch-only code that runs on a GPU, run here on the CPU: same weights, same counts."""
    from mftmerge import live

    path = tiny("llama", dtype="bfloat16")
    masks = {"a": random_mask(path, 1), "b": random_mask(path, 2)}
    results = []
    for numpy_sees_it in (True, False):
        monkeypatch.setattr(live, "_on_cpu", lambda _, answer=numpy_sees_it: answer)
        for base in (None, tiny("llama", dtype="bfloat16", seed=7)):
            model = load(path)
            switcher = attach(model, masks, base=base)
            written = [switcher.switch(name) for name in ("a", "b")]
            results.append((state(model), written, switcher.nbytes))
            switcher.switch(None)
            assert same(state(model), state(load(path)))
    for one, other in zip(results[:2], results[2:], strict=True):
        assert same(one[0], other[0])
        assert one[1:] == other[1:]


def test_masks_over_different_tensors_and_single_experts(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny("mixtral")
    masks = {"a": random_mask(path, 1, where="experts.1.w3"), "b": random_mask(path, 2, where="q_proj")}
    apply_mask(masks["a"], path, tmp_path / "a")
    model = load(path)
    original = state(model)
    switcher = attach(model, masks)
    dropped = {k: sum(m.size(n) - m.count(n) for n in m.names) for k, m in masks.items()}
    assert switcher.switch("a") == dropped["a"]
    assert same(state(model), state(load(tmp_path / "a")))
    assert switcher.switch("b") == dropped["a"] + dropped["b"]
    assert switcher.switch("b") == 0
    switcher.switch(None)
    assert same(state(model), original)


def test_only_what_differs_between_two_masks_is_written(tiny: Callable[..., Path]) -> None:
    path = tiny("llama")
    one = random_mask(path, 1)
    kept = {n: one.kept(n).copy() for n in one.names}
    first = one.names[0]
    kept[first][0] = ~kept[first][0]
    model = load(path)
    switcher = attach(model, {"one": one, "other": Mask.from_bools(kept)})
    switcher.switch("one")
    assert switcher.switch("other") == kept[first].shape[1]


def test_memory_is_the_bits_and_the_dropped_originals(tiny: Callable[..., Path]) -> None:
    path = tiny("llama", dtype="bfloat16")
    masks = {str(i): random_mask(path, i) for i in range(3)}
    switcher = attach(load(path), masks)
    names = masks["0"].names
    dropped = sum(int((~np.all([m.kept(n) for m in masks.values()], axis=0)).sum()) for n in names)
    assert switcher.nbytes == sum(3 * masks["0"].size(n) // 8 for n in names) + 2 * dropped


def test_nan_and_negative_zero_come_back_with_their_bits(tiny: Callable[..., Path]) -> None:
    model = load(tiny("llama", dtype="bfloat16"))
    name = "model.layers.0.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    with torch.no_grad():
        weight.view(torch.int16).random_(-(2**15), 2**15, generator=torch.Generator().manual_seed(0))
    before = weight.detach().view(torch.int16).clone()
    assert weight.isnan().any()
    switcher = attach(model, {"none": Mask.from_bools({name: np.zeros(tuple(weight.shape), bool)})})
    switcher.switch("none")
    assert not weight.detach().view(torch.int16).any()
    switcher.switch(None)
    assert torch.equal(weight.detach().view(torch.int16), before)


def test_tied_embeddings_switch_under_both_names(tiny: Callable[..., Path]) -> None:
    path = tiny("qwen2")
    model = load(path)
    embeddings = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    kept = np.random.default_rng(0).random(tuple(embeddings.shape)) < 0.5
    with attach(model, {"m": Mask.from_bools({"lm_head.weight": kept})}).use("m"):
        assert torch.equal(model.model.embed_tokens.weight, embeddings * torch.from_numpy(kept))
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_nested_use_and_unknown_names_are_refused(tiny: Callable[..., Path]) -> None:
    path = tiny("llama")
    model = load(path)
    switcher = attach(model, {"a": random_mask(path, 1), "b": random_mask(path, 2)})
    with switcher.use("a"):
        for attempt in (lambda: switcher.switch("b"), switcher.detach, lambda: switcher.use("a").__enter__()):
            with pytest.raises(MftmergeError, match="'a' is in use"):
                attempt()
        assert switcher.active == "a"
    assert switcher.active is None
    with pytest.raises(BadInput, match="there are a, b"):
        switcher.switch("c")
    with pytest.raises(BadInput, match="at least one"):
        attach(model, {})


def test_a_forward_pass_in_another_thread_is_an_error_not_a_mix_up(tiny: Callable[..., Path]) -> None:
    path = tiny("llama")
    model = load(path)
    switcher = attach(model, {"a": random_mask(path, 1)})
    ids = torch.tensor([[5, 6, 7]])

    def in_thread(call: Callable[[], object]) -> list[BaseException | None]:
        caught: list[BaseException | None] = []

        def body() -> None:
            try:
                call()
                caught.append(None)
            except MftmergeError as e:
                caught.append(e)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join(60)
        return caught

    assert in_thread(lambda: model(ids)) == [None]
    with switcher.use("a"):
        model(ids)
        [error] = in_thread(lambda: model(ids))
        assert "another thread uses its mask 'a'" in str(error)
        [error] = in_thread(lambda: switcher.switch(None))
        assert "in use" in str(error)
    # Switching in the middle of a forward pass, from within it and from another thread.
    errors: list[BaseException | None] = []
    hook = model.model.layers[1].register_forward_hook(
        lambda *_: errors.extend(in_thread(lambda: switcher.switch("a")))
    )
    model(ids)
    hook.remove()
    assert "the model is running" in str(errors[0])
    assert switcher.active is None
    switcher.switch("a")  # a forward pass that failed is not counted as running
    switcher.switch(None)
    with pytest.raises(IndexError):
        model(torch.tensor([[10**6]]))
    switcher.switch("a")


def test_weights_changed_by_someone_else_are_noticed(tiny: Callable[..., Path]) -> None:
    path = tiny("llama")
    model = load(path)
    switcher = attach(model, {"a": random_mask(path, 1)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    optimizer.step()
    with pytest.raises(MftmergeError, match="was changed or moved"):
        switcher.switch("a")
    model = load(path)
    switcher = attach(model, {"a": random_mask(path, 1)})
    model.to(torch.bfloat16)
    with pytest.raises(MftmergeError, match="was changed or moved"):
        switcher.switch("a")


def test_backward_after_a_switch_is_an_error(tiny: Callable[..., Path]) -> None:
    path = tiny("llama")
    model = load(path)
    switcher = attach(model, {"a": random_mask(path, 1)})
    loss = model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss
    switcher.switch("a")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_interrupted_switch_is_repaired_by_the_next(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mftmerge import live

    path = tiny("llama")
    model = load(path)
    original = state(model)
    switcher = attach(model, {"a": random_mask(path, 1), "b": random_mask(path, 2)})
    switcher.switch("a")
    real, calls = live._write, []

    def failing(*arguments: object, **options: object) -> int:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(live, "_write", failing)
    with pytest.raises(KeyboardInterrupt):
        switcher.switch("b")
    assert not same(state(model), original)
    switcher.switch(None)
    assert same(state(model), original)


def test_what_cannot_be_switched_is_refused(tiny: Callable[..., Path]) -> None:
    path = tiny("llama")
    mask = random_mask(path)
    config = load(path).config
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(config)
    with pytest.raises(BadInput, match="offloaded"):
        attach(meta, {"a": mask})
    with torch.inference_mode():
        frozen = AutoModelForCausalLM.from_config(config)
    with pytest.raises(BadInput, match="inference mode"):
        attach(frozen, {"a": mask})
    with pytest.raises(BadInput, match="quantised or sharded"):
        attach(
            torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.ones(2, dtype=torch.int8), False)}),
            {"a": Mask.from_bools({"w": np.ones(2, bool)})},
        )
    wrong = Mask.from_bools({"model.layers.0.mlp.up_proj.weight": np.ones((2, 2), bool)})
    with pytest.raises(BadInput, match="shape"):
        attach(load(path), {"a": wrong})
    with pytest.raises(BadInput, match="no tensor"):
        attach(load(path), {"a": Mask.from_bools({"elsewhere": np.ones((2, 2), bool)})})


def test_generation_differs_inside_and_not_outside(tiny: Callable[..., Path]) -> None:
    path = tiny("llama")
    model = load(path)
    mask = random_mask(path, 1, density=0.5)
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    switcher = attach(model, {"a": mask})
    with switcher.use("a"):
        inside = model(ids).logits
        model.generate(ids, max_new_tokens=3, do_sample=False)
    with torch.inference_mode(), switcher.use("a"):
        assert torch.equal(model(ids).logits, inside)
    assert not torch.equal(inside, before)
    assert torch.equal(model(ids).logits, before)

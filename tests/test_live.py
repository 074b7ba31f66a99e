"""attach/Switcher: exact after any number of switches, only what changes is written, errors rather than mix-ups."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import io
import pickle
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
from mftmerge.checkpoint import Checkpoint
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.live import attach, attached
from mftmerge.mask import Mask, MaskInfo


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
    from mftmerge import live, maskedparameter

    path = tiny("llama", dtype="bfloat16")
    masks = {"a": random_mask(path, 1), "b": random_mask(path, 2)}
    results = []
    for numpy_sees_it in (True, False):
        for module in (live, maskedparameter):
            monkeypatch.setattr(module, "on_cpu", lambda _, answer=numpy_sees_it: answer)
        for base in (None, tiny("llama", dtype="bfloat16", seed=7)):
            model = load(path)
            switcher = attach(model, masks, base=base)
            written = [switcher.switch(name) for name in ("a", "b")]
            results.append((state(model), written, switcher.nbytes))
            switcher.switch(None)
            assert same(state(model), state(load(path)))
    for one, other in zip(results[:2], results[2:], strict=True):
        assert same(one[0], other[0])
        assert one[1] == other[1]
        assert other[2] < one[2]  # an accelerator's memory holds what masks drop alone


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


def test_masks_over_weights_and_over_deltas_side_by_side(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Each takes its dropped weights from where it says; where that is not known, attaching asks."""
    path, one, two = (tiny("llama", dtype="bfloat16", seed=s) for s in (0, 3, 4))

    def over(base: Path | None, seed: int) -> Mask:
        if base is None:
            return random_mask(path, seed, 0.5)
        opened = Checkpoint.open(base)
        prints = {n: opened.fingerprint(n) for n in random_mask(path).names}
        return random_mask(path, seed, 0.5, info=MaskInfo(on="delta", delta_base=str(base), delta_fingerprints=prints))

    masks = {"weights": over(None, 1), "one": over(one, 2), "two": over(two, 3), "also one": over(one, 4)}
    expected = {}
    for name, mask in masks.items():
        apply_mask(mask, path, tmp_path / name)
        expected[name] = state(load(tmp_path / name))
    model = load(path)
    original = state(model)
    switcher = attach(model, masks)
    for name in np.random.default_rng(0).choice([*masks], 12):
        switcher.switch(name)
        assert same(state(model), expected[name])
    switcher.detach()
    assert same(state(model), original)
    with attach(model, {"m": masks["one"]}, on="weights").use("m"):
        apply_mask(masks["one"], path, tmp_path / "zeros", on="weights")
        assert same(state(model), state(load(tmp_path / "zeros")))
    unknown = random_mask(path, info=MaskInfo(on="delta", delta_base="owner/name"))
    with pytest.raises(BadInput, match=r'base="owner/name".*on="weights"'):
        attach(model, {"m": unknown})
    attach(model, {"m": unknown}, base=one).switch("m")


def test_memory_is_the_bits_and_the_originals(tiny: Callable[..., Path]) -> None:
    path = tiny("llama", dtype="bfloat16")
    masks = {str(i): random_mask(path, i) for i in range(3)}
    switcher = attach(load(path), masks)
    names = masks["0"].names
    assert switcher.nbytes == sum(3 * masks["0"].size(n) // 8 for n in names)  # nothing was written over yet
    switcher.switch("0")
    assert switcher.nbytes == sum(3 * masks["0"].size(n) // 8 for n in names) + sum(
        2 * masks["0"].size(n) for n in names
    )


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


def interrupting(monkeypatch: pytest.MonkeyPatch, at: int, times: int = 1) -> list[int]:
    """The writes number `at`, and so many after it, end in a KeyboardInterrupt."""
    from mftmerge.maskedparameter import MaskedParameter

    real, calls = MaskedParameter.write, [0]

    def failing(self: MaskedParameter, before: str | None, after: str | None) -> int:
        calls[0] += 1
        if at <= calls[0] < at + times:
            raise KeyboardInterrupt
        return real(self, before, after)

    monkeypatch.setattr(MaskedParameter, "write", failing)
    return calls


def test_an_interrupted_switch_goes_back(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny("llama")
    model = load(path)
    original = state(model)
    switcher = attach(model, {"a": random_mask(path, 1), "b": random_mask(path, 2)})
    switcher.switch("a")
    under_a = state(model)
    interrupting(monkeypatch, at=5)
    with pytest.raises(KeyboardInterrupt):
        switcher.switch("b")
    assert switcher.active == "a"
    assert same(state(model), under_a)
    switcher.switch(None)
    assert same(state(model), original)


def test_a_switch_that_cannot_go_back_is_repaired_by_the_next(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("llama")
    model = load(path)
    original = state(model)
    switcher = attach(model, {"a": random_mask(path, 1), "b": random_mask(path, 2)})
    switcher.switch("a")
    interrupting(monkeypatch, at=5, times=10**6)
    with pytest.raises(KeyboardInterrupt):
        switcher.switch("b")
    assert not same(state(model), original)
    with pytest.raises(MftmergeError, match="interrupted"):
        model(torch.tensor([[5, 6, 7]]))
    monkeypatch.undo()
    switcher.switch(None)
    assert same(state(model), original)
    assert switcher.switch("b") > 0
    switcher.detach()
    assert same(state(model), original)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, ZeroDivisionError])
def test_whatever_ends_a_forward_pass_the_mask_comes_off(tiny: Callable[..., Path], error: type[BaseException]) -> None:
    path = tiny("llama")
    model = load(path)
    original = state(model)
    switcher = attach(model, {"a": random_mask(path, 1)})

    def stop(*_: object) -> None:
        raise error

    hook = model.model.layers[1].register_forward_hook(stop)
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(error), switcher.use("a"):
        model(ids)
    assert switcher.active is None
    assert same(state(model), original)
    with pytest.raises(error):  # without a block as well: nothing counts as running afterwards
        model(ids)
    with pytest.raises(error):
        model.generate(ids, max_new_tokens=2)
    hook.remove()
    switcher.switch("a")
    model(ids)
    switcher.detach()
    assert same(state(model), original)


def test_an_interrupt_while_the_mask_comes_off(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny("llama")
    model = load(path)
    original = state(model)
    switcher = attach(model, {"a": random_mask(path, 1)})

    def block() -> None:
        with switcher.use("a"):
            interrupting(monkeypatch, at=5)

    with pytest.raises(KeyboardInterrupt):
        block()
    assert switcher.active is None
    assert same(state(model), original)


def test_an_interrupted_detach_can_be_repeated(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny("llama")
    model = load(path)
    original = state(model)
    switcher = attach(model, {"a": random_mask(path, 1)})
    switcher.switch("a")
    interrupting(monkeypatch, at=5)
    with pytest.raises(KeyboardInterrupt):
        switcher.detach()
    switcher.detach()
    assert same(state(model), original)
    model(torch.tensor([[5, 6, 7]]))


WRITES: dict[str, Callable[[torch.nn.Parameter], object]] = {
    "data.add_": lambda p: p.data.add_(1.0),
    "data.copy_": lambda p: p.data.copy_(p.data * 2),
    "data[0] =": lambda p: p.data.__setitem__(0, 7.0),
    "numpy": lambda p: np.add(p.detach().numpy(), 1, out=p.detach().numpy()),
    "one bit": lambda p: p.data.view(torch.int32).__setitem__((-1, -1), p.data.view(torch.int32)[-1, -1] ^ 1),
    "exchanged rows": lambda p: p.data.copy_(p.data.flip(0)),
}


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("active", [None, "a"])
def test_writes_that_no_version_counter_sees_are_noticed_and_not_undone(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, how: str, active: str | None, accelerator: bool
) -> None:
    from mftmerge import live, maskedparameter

    if accelerator:
        for module in (live, maskedparameter):
            monkeypatch.setattr(module, "on_cpu", lambda _: False)
    path = tiny("llama")
    model = load(path)
    mask = random_mask(path, 1)
    switcher = attach(model, {"a": mask, "b": random_mask(path, 2)})
    switcher.switch(active)
    name = mask.names[5]
    parameter, original = model.get_parameter(name), load(path).get_parameter(name)
    WRITES[how](parameter)
    new = parameter.detach().clone()
    with pytest.raises(MftmergeError, match=f"{name}.*was changed"):
        switcher.switch("b")
    assert torch.equal(parameter, new)
    if active is None:  # the way out: what somebody wrote is the model's weights by now
        switcher.detach()
        assert torch.equal(parameter, new)
    else:
        with pytest.warns(UserWarning, match="was changed while a mask was on"):
            switcher.detach()
        kept = torch.from_numpy(mask.kept(name))
        assert torch.equal(parameter, torch.where(kept, new, original))
    others = {k: p for k, p in state(load(path)).items() if k != name}
    assert same({k: p for k, p in state(model).items() if k != name}, others)
    attach(model, {"a": mask}).switch("a")


def test_a_write_that_changes_nothing_is_none(tiny: Callable[..., Path]) -> None:
    path = tiny("llama")
    model = load(path)
    original = state(model)
    switcher = attach(model, {"a": random_mask(path, 1)})
    switcher.switch("a")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.0)
    switcher.switch(None)
    assert same(state(model), original)


def test_a_change_inside_a_block_is_said_and_the_mask_comes_off(tiny: Callable[..., Path]) -> None:
    path = tiny("llama")
    mask = random_mask(path, 1)
    name = mask.names[5]
    kept, original = torch.from_numpy(mask.kept(name)), load(path).get_parameter(name).detach()
    for error in (None, ZeroDivisionError):
        model = load(path)
        switcher = attach(model, {"a": mask})

        def block(switcher=switcher, model=model, error=error) -> None:  # type: ignore[no-untyped-def]
            with switcher.use("a"):
                model.get_parameter(name).data.add_(1.0)
                if error:
                    raise error

        if error is None:
            with pytest.raises(MftmergeError, match=r"was changed while a mask was on.*attach them again"):
                block()
        else:  # the block's own error is not replaced
            with pytest.warns(UserWarning, match="attach them again"), pytest.raises(error):
                block()
        assert torch.equal(model.get_parameter(name), torch.where(kept, original + 1, original))
        others = {k: p for k, p in state(load(path)).items() if k != name}
        assert same({k: p for k, p in state(model).items() if k != name}, others)


@pytest.mark.parametrize("how", ["to", "data", "replaced"])
def test_a_model_that_was_moved_under_a_mask_gets_its_weights_back(tiny: Callable[..., Path], how: str) -> None:
    path = tiny("llama")
    model = load(path)
    mask = random_mask(path, 1)
    switcher = attach(model, {"a": mask})
    switcher.switch("a")
    if how == "to":
        model.to(torch.bfloat16)
    else:
        for module in model.modules():
            for leaf, p in list(module.named_parameters(recurse=False)):
                if how == "data":
                    p.data = p.data.bfloat16()
                else:
                    setattr(module, leaf, torch.nn.Parameter(p.data.bfloat16()))
    with pytest.raises(MftmergeError, match="was changed or moved"):
        switcher.switch(None)
    with pytest.warns(UserWarning, match="was changed while a mask was on"):
        switcher.detach()
    assert same(state(model), state(load(path).to(torch.bfloat16)))


@pytest.mark.parametrize("active", [None, "a"])
def test_copies_and_pickles_are_models_of_their_own(tiny: Callable[..., Path], active: str | None) -> None:
    path = tiny("llama")
    model = load(path)
    ids = torch.tensor([[5, 6, 7]])
    switcher = attach(model, {"a": random_mask(path, 1)})
    with switcher.use(active):
        now = state(model)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies.append(torch.load(buffer, weights_only=False))
        expected = model(ids).logits
    switcher.switch("a")
    for other in copies:
        assert same(state(other), now)
        assert torch.equal(other(ids).logits, expected)
        attach(other, {"b": random_mask(path, 2)}).switch("b")
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(MftmergeError, match="belongs to one model"):
            attempt(switcher)


def wrapped(model: torch.nn.Module, how: str) -> torch.nn.Module:
    if how == "compile":
        return torch.compile(model, backend="eager")
    if how == "data parallel":
        return torch.nn.DataParallel(model)
    if how == "compiled data parallel":
        return torch.compile(torch.nn.DataParallel(model), backend="eager")
    if how == "shell":
        return torch.nn.ModuleDict({"module": model})
    from peft import LoraConfig, get_peft_model

    made = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"], r=2, init_lora_weights=False))
    return torch.compile(made, backend="eager") if how == "compiled peft" else made


@pytest.mark.parametrize(
    "how", ["compile", "data parallel", "compiled data parallel", "shell", "peft", "compiled peft"]
)
def test_masks_on_a_wrapped_model(tiny: Callable[..., Path], tmp_path: Path, how: str) -> None:
    path = tiny("llama")
    mask = random_mask(path, 1, density=0.5)
    apply_mask(mask, path, tmp_path / "applied")
    ids = torch.tensor([[5, 6, 7]])
    torch.manual_seed(0)
    model = wrapped(load(path), how)
    torch.manual_seed(0)
    expected = wrapped(load(tmp_path / "applied"), how)
    call = (lambda m: m["module"](ids).logits) if how == "shell" else (lambda m: m(ids).logits)
    before, original = call(model), state(model)
    switcher = attach(model, {"a": mask})
    with switcher.use("a"):
        assert torch.equal(call(model), call(expected))
        assert same(state(model), state(expected))
    assert torch.equal(call(model), before)
    assert same(state(model), original)
    switcher.detach()


@pytest.mark.parametrize("how", ["compile", "compile in place"])
def test_compiled_models_are_watched(how: str) -> None:
    model: torch.nn.Module = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
    if how == "compile":
        model = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    x = torch.ones(1, 4)
    plain, caught = model(x), []
    switcher = attach(model, {"a": Mask.from_bools({"0.weight": np.zeros((4, 4), bool)})})

    def elsewhere() -> None:
        try:
            model(x)
        except MftmergeError as e:
            caught.append(str(e))

    with switcher.use("a"):
        assert not model(x).any()
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join(60)
    assert "another thread uses its mask 'a'" in caught[0]
    assert torch.equal(model(x), plain)
    copied = copy.deepcopy(model)
    switcher.switch("a")
    assert torch.equal(copied(x), plain)
    switcher.detach()
    assert torch.equal(model(x), plain)


def test_tensors_that_an_adapter_has_copied_are_refused(tiny: Callable[..., Path]) -> None:
    from peft import LoraConfig, get_peft_model

    path = tiny("llama")
    model = get_peft_model(load(path), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    shape = tuple(load(path).lm_head.weight.shape)
    with pytest.raises(BadInput, match="modules_to_save"):
        attach(model, {"a": Mask.from_bools({"lm_head.weight": np.ones(shape, bool)})})
    attach(model, {"a": random_mask(path)}).switch("a")


def test_merging_an_adapter_under_attached_masks_is_noticed(tiny: Callable[..., Path]) -> None:
    path = tiny("llama")
    model = wrapped(load(path), "peft")
    switcher = attach(model, {"a": random_mask(path, 1)})
    model.merge_adapter()
    merged = state(model)
    with pytest.raises(MftmergeError, match="was changed"):
        switcher.switch("a")
    switcher.detach()
    assert same(state(model), merged)


def test_under_autocast_each_mask_has_its_effect(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """autocast keeps weights that it has cast; switching must not leave it the old ones."""
    path = tiny("llama")
    masks = {"a": random_mask(path, 1, density=0.5), "b": random_mask(path, 2, density=0.5)}
    ids = torch.tensor([[5, 6, 7]])
    expected: dict[str | None, torch.Tensor] = {}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected[None] = load(path)(ids).logits
        for name, mask in masks.items():
            apply_mask(mask, path, tmp_path / name)
            expected[name] = load(tmp_path / name)(ids).logits
    model = load(path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        switcher = attach(model, masks)
        for name in (None, "a", "b", "a", None):
            with switcher.use(name):
                assert torch.equal(model(ids).logits, expected[name])
            assert torch.equal(model(ids).logits, expected[None])
        switcher.switch("b")
        assert torch.equal(model(ids).logits, expected["b"])
        switcher.detach()
        assert torch.equal(model(ids).logits, expected[None])


def test_another_task_does_not_get_a_mask_silently(tiny: Callable[..., Path]) -> None:
    path = tiny("llama")
    model = load(path)
    switcher = attach(model, {"a": random_mask(path, 1, density=0.5)})
    ids = torch.tensor([[5, 6, 7]])
    plain = model(ids).logits
    found: dict[str, object] = {}

    async def with_mask(inside: asyncio.Event, finished: asyncio.Event) -> None:
        with switcher.use("a"):
            inside.set()
            found["own"] = model(ids).logits
            child = asyncio.create_task(call("child"))  # started inside the block: it is meant
            thread = asyncio.to_thread(lambda: model(ids).logits)
            await child
            found["thread"] = await thread
            await finished.wait()

    async def call(name: str) -> None:
        try:
            found[name] = model(ids).logits
        except MftmergeError as e:
            found[name] = str(e)

    async def other(inside: asyncio.Event, finished: asyncio.Event) -> None:
        await inside.wait()
        await call("other")
        try:
            model.model(ids)
        except MftmergeError as e:
            found["inner"] = str(e)
        finished.set()

    async def main() -> None:
        inside, finished = asyncio.Event(), asyncio.Event()
        await asyncio.gather(with_mask(inside, finished), other(inside, finished))
        await call("after")

    asyncio.run(main())
    assert isinstance(found["own"], torch.Tensor)
    assert torch.equal(found["own"], found["child"])  # type: ignore[arg-type]
    assert torch.equal(found["own"], found["thread"])  # type: ignore[arg-type]
    assert "another task uses its mask 'a'" in str(found["other"])
    assert "another task uses its mask 'a'" in str(found["inner"])
    assert torch.equal(found["after"], plain)  # type: ignore[arg-type]


def test_parts_of_the_model_are_watched_too(tiny: Callable[..., Path]) -> None:
    path = tiny("llama")
    model = load(path)
    switcher = attach(model, {"a": random_mask(path, 1)})
    ids, caught = torch.tensor([[5, 6, 7]]), []

    def elsewhere() -> None:
        for call in (lambda: model.model(ids), lambda: model.generate(ids, max_new_tokens=1)):
            try:
                call()
            except MftmergeError as e:
                caught.append(str(e))

    with switcher.use("a"):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join(60)
    assert len(caught) == 2
    assert all("another thread uses its mask 'a'" in c for c in caught)


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


def test_attaching_under_another_switchers_mask_is_refused(tiny: Callable[..., Path]) -> None:
    """A notebook's cell that is run twice: the masked weights would count as the model's own."""
    path = tiny("llama")
    model = load(path)
    original = state(model)
    attach(model, {"a": random_mask(path, 1, density=0.5)}).switch("a")
    with pytest.raises(BadInput, match=r"mask 'a' of an earlier attach\(\) is on"):
        attach(model, {"b": random_mask(path, 2)})
    for lost in attached(model):
        lost.detach()
    assert same(state(model), original)
    assert attached(model) == []
    attach(model, {"b": random_mask(path, 2)}).switch("b")


def test_a_thread_with_a_copy_of_the_context_belongs_to_the_block(tiny: Callable[..., Path]) -> None:
    path = tiny("llama")
    model = load(path)
    switcher = attach(model, {"a": random_mask(path, 1, density=0.5)})
    ids, found = torch.tensor([[5, 6, 7]]), []
    with switcher.use("a"):
        run = contextvars.copy_context().run
        thread = threading.Thread(target=run, args=(lambda: found.append(model(ids).logits),))
        thread.start()
        thread.join(60)
        assert torch.equal(found[0], model(ids).logits)

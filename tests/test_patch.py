"""Patches: bit for bit there and back, refused elsewhere, small, and whatever is in the file safe to open."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import random_mask, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from mftmerge import rice
from mftmerge.apply import apply_mask
from mftmerge.checkpoint import Checkpoint
from mftmerge.cli.main import main
from mftmerge.errors import BadInput
from mftmerge.patch import apply_patch, checkpoint_patch, mask_patch, patch_model
from mftmerge.patchexport import save_for_trl, vllm_patches
from mftmerge.patchfile import Patch


def equal(a: Path, b: Path) -> bool:
    mine, theirs = tensors(a), tensors(b)
    return mine.keys() == theirs.keys() and all(
        torch.equal(mine[k].view(torch.uint8), theirs[k].view(torch.uint8)) for k in mine
    )


def test_the_reverse_patch_is_no_input_and_not_in_the_output(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model, file = tiny("llama"), tmp_path / "p.safetensors"
    mask_patch(model, None, random_mask(model, 1, 0.9), values=False).save(file)
    base = shutil.copytree(model, tmp_path / "base")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    before = {p: p.read_bytes() for p in (base / "model.safetensors", file)}
    for reverse, words in (
        (base / "model.safetensors", "input"),
        (file, "input"),
        (tmp_path / "out" / "back.safetensors", "lies in"),
        (tmp_path, "is a directory"),
    ):
        with pytest.raises(BadInput, match=words):
            apply_patch(file, model, tmp_path / "out", base=base, reverse=reverse, overwrite=True)
    assert before == {p: p.read_bytes() for p in before}


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_there_and_back_bit_for_bit(
    tiny: Callable[..., Path], tmp_path: Path, dtype: str, with_base: bool, values: bool
) -> None:
    model = tiny("llama", dtype=dtype, layers=2, max_shard_size="100KB")
    base = tiny("llama", dtype=dtype, layers=2, seed=7) if with_base else None
    masks = {"a": random_mask(model, 1, 0.9), "b": random_mask(model, 2, 0.8, "mlp")}
    states: dict[str | None, Path] = {None: model}
    for name, mask in masks.items():
        apply_mask(mask, model, tmp_path / name, base=base)
        states[name] = tmp_path / name
    for number, (here, there) in enumerate([("a", "b"), ("b", "a"), (None, "a"), ("b", None)]):
        file = tmp_path / f"{number}.patch.safetensors"
        mask_patch(model, masks.get(here), masks.get(there), base=base, values=values).save(file)
        reverse = tmp_path / f"{number}.reverse.safetensors"
        known: dict[str, Any] = {} if values else {"base": model, "delta_base": base}
        more = {} if values else {"reverse": reverse}
        apply_patch(file, states[here], tmp_path / f"to{number}", **known, **more)
        assert equal(tmp_path / f"to{number}", states[there])
        back = {"undo": True} if values else {}
        apply_patch(file if values else reverse, states[there], tmp_path / f"back{number}", **known, **back)
        assert equal(tmp_path / f"back{number}", states[here])
        live = AutoModelForCausalLM.from_pretrained(states[here], dtype="auto")
        undo = patch_model(live, file, **known)
        expected = tensors(states[there])
        names = Checkpoint.open(model).names
        assert all(torch.equal(live.get_parameter(n), expected[n]) for n in names if n in expected)
        patch_model(live, file if values else undo, **known, **back)
        before = tensors(states[here])
        assert all(torch.equal(live.get_parameter(n), before[n]) for n in names)


def test_anything_else_is_refused_and_nothing_written(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model, other = tiny("llama", layers=2), tiny("llama", layers=2, seed=3)
    mask = random_mask(model, 1, 0.9)
    patch = mask_patch(model, None, mask)
    bare = mask_patch(model, None, mask, values=False)
    out = tmp_path / "out"
    for wrong, words in (
        (lambda: apply_patch(patch, other, out), "is not what this patch starts from"),
        (lambda: apply_patch(patch, model, out, undo=True), "is not what this patch leads to"),
        (lambda: apply_patch(bare, model, out), "give the model that its masks share"),
        (lambda: apply_patch(bare, model, out, base=other), "of the base is not the one"),
        (lambda: apply_patch(bare, model, out, base=model, undo=True), "leads one way"),
        (lambda: apply_patch(patch, model, out, reverse=tmp_path / "r"), "leads back itself"),
        (lambda: apply_patch(patch, tiny("llama"), out), "is not what this patch starts from"),
        (lambda: apply_patch(patch, tiny("gpt2"), out), "no tensor"),
        (lambda: checkpoint_patch(model, tiny("gpt2")), "a patch needs the same tensors"),
    ):
        with pytest.raises(BadInput, match=words):
            wrong()
        assert not list(tmp_path.iterdir())
    apply_patch(patch, model, out)
    with pytest.raises(BadInput, match="it has been applied already"):
        apply_patch(patch, out, tmp_path / "twice")
    live = AutoModelForCausalLM.from_pretrained(other)
    before = {k: p.clone() for k, p in live.named_parameters()}
    live.get_parameter("model.layers.0.mlp.up_proj.weight").data.copy_(
        tensors(model)["model.layers.0.mlp.up_proj.weight"]
    )
    with pytest.raises(BadInput, match="is not what this patch starts from"):
        patch_model(live, patch)
    assert sum(not torch.equal(p, before[k]) for k, p in live.named_parameters()) == 1  # the one written above
    with pytest.raises(BadInput, match="the patch has F32"):
        patch_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16), patch)


def stepped(tmp_path: Path, share: float = 0.003, size: int = 1 << 21) -> tuple[Path, Path]:
    """Two bfloat16 checkpoints, some of whose weights differ by a step or two, as after an optimiser's step."""
    rng = np.random.default_rng(0)
    old = torch.from_numpy(rng.normal(0, 0.02, size).astype(np.float32)).to(torch.bfloat16)
    new = old.view(torch.int16).clone()
    at = torch.from_numpy(np.flatnonzero(rng.random(size) < share))
    new[at] += torch.from_numpy(rng.choice([-1, 1, 1, -1, 2, -2], len(at)).astype(np.int16))
    for name, values in (("old", old), ("new", new.view(torch.bfloat16))):
        (tmp_path / name).mkdir()
        save_file({"w": values.view(1024, -1)}, tmp_path / name / "model.safetensors")
    return tmp_path / "old", tmp_path / "new"


def test_sizes(tiny: Callable[..., Path], tmp_path: Path) -> None:
    old, new = stepped(tmp_path)
    patch = checkpoint_patch(old, new)
    patch.save(tmp_path / "p.safetensors")
    size, weights = (tmp_path / "p.safetensors").stat().st_size, 1 << 21
    assert 8 * size / weights <= 0.05
    a, b = (Checkpoint.open(p).read("w") for p in (old, new))
    import zstandard

    assert 1.5 * size <= len(zstandard.ZstdCompressor(19).compress((a ^ b).tobytes()))
    apply_patch(tmp_path / "p.safetensors", old, tmp_path / "again")
    assert equal(tmp_path / "again", new)
    big = tiny("llama", dtype="bfloat16", hidden=256, layers=2)
    masks = [random_mask(big, seed, 0.9) for seed in (1, 2)]
    bare = mask_patch(big, *masks, values=False)
    assert 8 * bare.nbytes <= 0.5 * sum(map(masks[0].size, masks[0]))  # the entropy is 0.469


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 1 << 40), max_size=200), st.integers(0, 1 << 20))
def test_rice_codes_come_back(values: list[int], scale: int) -> None:
    numbers = np.array([v % (scale + 1) for v in values], np.int64)
    k = rice.best_k(numbers)
    assert np.array_equal(rice.decode(*rice.encode(numbers, k), len(numbers), k), numbers)
    signed = numbers - scale // 2
    assert np.array_equal(rice.unzigzag(rice.zigzag(signed)), signed)
    sorted_ = np.unique(numbers)
    assert np.array_equal(rice.positions(rice.gaps(sorted_), scale + 2), sorted_)


def test_every_bit_pattern_has_its_place_in_the_order() -> None:
    from mftmerge.patch import _from_ordered, _ordered

    every = np.arange(1 << 16, dtype=np.uint16)
    numbers = _ordered(every, 16)
    assert np.array_equal(np.sort(numbers), np.arange(-(1 << 15), 1 << 15))
    assert np.array_equal(_from_ordered(numbers, np.uint16), every)
    values = torch.from_numpy(every.view(np.int16)).view(torch.float16).float().numpy()
    finite = np.isfinite(values)
    order = numbers[finite].argsort()
    assert (np.diff(values[finite][order]) >= 0).all()


def test_damaged_and_hostile_files_are_refused_in_one_line(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("llama", layers=2)
    mask = random_mask(model, 1, 0.9, "layers.0.mlp")
    rng = np.random.default_rng(0)
    opened = 0

    def use(file: Path, base: Path | None) -> None:
        nonlocal opened
        patch = Patch.load(file)
        opened += 1
        apply_patch(patch, model, tmp_path / "out", base=base)

    for values in (True, False):
        sound = tmp_path / f"{values}.safetensors"
        mask_patch(model, None, mask, values=values).save(sound)
        data = sound.read_bytes()
        for turn in range(150):
            damaged = bytearray(data)
            kind = turn % 3
            if kind == 0:
                damaged[rng.integers(len(data))] ^= 1 << rng.integers(8)
            elif kind == 1:
                del damaged[rng.integers(len(data)) :]
            else:
                at = rng.integers(len(data) - 50)
                damaged[at : at + 50] = rng.bytes(50)
            file = tmp_path / "damaged.safetensors"
            file.write_bytes(damaged)
            with pytest.raises(BadInput) as refused:  # a flipped bit that changes nothing would be a hole
                use(file, model if not values else None)
            assert "\n" not in str(refused.value)
            assert not (tmp_path / "out").exists()
    assert opened > 50  # damage in the streams is found when they are used
    with pytest.raises(SystemExit) as stopped:
        main(["patch-apply", str(tmp_path / "damaged.safetensors"), "--model", str(model), "-o", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [1 << 47, 1 << 47]}, "no such shape"),
        ({"shape": [-1]}, "wrong"),
        ({"dtype": "F4"}, "dtype"),
        ({"values": "pickle"}, "wrong"),
        ({"values": "base"}, "streams"),
        ({"before": "x"}, "wrong"),
        ({"positions": {"count": 1 << 60, "k": 1}}, "wrong"),
        ({"positions": {"count": 3, "k": 60}}, "wrong"),
        ({"extra": 1}, "wrong"),
    ],
)
def test_headers_that_lie(tiny: Callable[..., Path], tmp_path: Path, change: dict[str, Any], words: str) -> None:
    model = tiny("llama", layers=2)
    name = "model.layers.0.mlp.up_proj.weight"
    patch = mask_patch(model, None, random_mask(model, 1, 0.9, name))
    header = patch.header.model_dump(mode="json", exclude_defaults=True) | {"format": 1}
    header["tensors"][name] |= change
    text = json.dumps(header)
    from safetensors.numpy import save_file as save_numpy

    metadata = {"mftmerge_patch": text, "mftmerge_patch_crc32": f"{zlib.crc32(text.encode()):08x}"}
    save_numpy(patch.streams, tmp_path / "p.safetensors", metadata)
    with pytest.raises(BadInput, match=words):
        Patch.load(tmp_path / "p.safetensors")


def test_other_programs_layouts(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """vLLM's rules, and what TRL's reader does with its file, written out: neither reader is in their releases here."""
    from safetensors import safe_open

    model = tiny("llama", dtype="bfloat16", layers=2)
    masks = [random_mask(model, seed, 0.9) for seed in (1, 2)]
    apply_mask(masks[0], model, tmp_path / "a")
    apply_mask(masks[1], model, tmp_path / "b")
    patch = mask_patch(model, *masks)
    state, expected = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    for each in vllm_patches(patch, tmp_path / "a"):
        assert each._fields == ("name", "shape", "dtype", "values", "indices")
        assert each.indices.dtype in (torch.int32, torch.int64)
        assert each.values.ndim == each.indices.ndim == 1
        assert len(each.indices.unique()) == len(each.indices) == len(each.values)
        assert each.dtype.is_floating_point
        flat = torch.full((int(np.prod(each.shape)),), float("nan"), dtype=each.dtype)
        flat.index_copy_(0, each.indices.long(), each.values)  # as load_checkpoint_weight_patches does
        loaded = flat.view(each.shape)
        state[each.name] = torch.where(loaded.isnan(), state[each.name], loaded)
    assert all(torch.equal(state[k], expected[k]) for k in state)
    save_for_trl(patch, tmp_path / "a", tmp_path / "trl.safetensors")
    received = tensors(tmp_path / "a")
    with safe_open(tmp_path / "trl.safetensors", framework="pt") as file:
        assert file.metadata()["encoding"] == "raw"
        assert file.metadata()["format"] == "sparse_weight_patch"
        names = sorted({k.removesuffix(".val") for k in file.keys() if k.endswith(".val")})  # noqa: SIM118
        for name in names:
            received[name].view(-1)[file.get_tensor(f"{name}.idx").to(torch.int32).long()] = file.get_tensor(
                f"{name}.val"
            )
    assert all(torch.equal(received[k], expected[k]) for k in received)
    wide = tiny("llama", layers=2)
    with pytest.raises(BadInput, match="bfloat16"):
        save_for_trl(mask_patch(wide, None, random_mask(wide)), wide, tmp_path / "f32.safetensors")


def test_the_commands(tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("llama", layers=2)
    random_mask(model, 1).save(tmp_path / "a.mask")
    shutil.copytree(model, tmp_path / "m")

    def run(*words: str) -> int:
        with pytest.raises(SystemExit) as stopped:
            main([w.replace("@", str(tmp_path)) for w in words])
        return int(stopped.value.code or 0)

    assert run("patch", "--model", "@/m", "--to", "@/a.mask", "-o", "@/p.patch.safetensors") == 0
    assert run("patch-apply", "@/p.patch.safetensors", "--model", "@/m", "-o", "@/out", "--json") == 0
    assert run("patch", "--model", "@/m", "--to-model", "@/out", "-o", "@/q.patch.safetensors") == 0
    assert run("patch-apply", "@/q.patch.safetensors", "--model", "@/out", "-o", "@/back", "--undo") == 0
    assert equal(tmp_path / "back", tmp_path / "m")
    assert (tmp_path / "back" / "tokenizer.json").exists()
    assert run("patch", "--model", "@/m", "-o", "@/r.patch.safetensors") == 2
    assert run("patch", "--model", "@/m", "--to", "@/a.mask", "-o", "@/p.patch.safetensors") == 2
    assert "exists already" in capsys.readouterr().err

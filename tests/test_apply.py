"""mftmerge apply: exact on every dtype, complete output, checks before any byte is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import random_mask, tensors
from safetensors.torch import load_file, save_file

from mftmerge.apply import apply_mask
from mftmerge.checkpoint import SINGLE, Checkpoint
from mftmerge.errors import BadInput
from mftmerge.mask import Mask, MaskInfo, Parent
from mftmerge.select import select

ARCHITECTURES = ["llama", "qwen3", "gemma3", "mixtral", "gpt2"]
DTYPES = {
    "bfloat16": torch.int16,
    "float16": torch.int16,
    "float32": torch.int32,
    "float64": torch.int64,
    "float8_e4m3fn": torch.uint8,
    "float8_e5m2": torch.uint8,
}


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else bytes(tensor.numpy().tobytes())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keeping_everything_reproduces_every_tensor_bit_for_bit(
    tiny: Callable[..., Path], tmp_path: Path, architecture: str
) -> None:
    path = tiny(architecture, dtype="bfloat16", max_shard_size="150KB")
    mask = random_mask(path, density=2.0)
    assert len(mask.names) > 10
    apply_mask(mask, path, tmp_path / "out")
    before, after = tensors(path), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(bits_of(before[k]) == bits_of(after[k]) for k in before)
    for file in path.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_selection_is_exact_for_every_bit_pattern(tmp_path: Path, dtype: str, with_base: bool) -> None:
    """Random bit patterns, so NaNs with payloads, infinities, -0.0 and denormals, and sizes that fill no byte."""
    integer, width = DTYPES[dtype], getattr(torch, dtype).itemsize
    g = torch.Generator().manual_seed(5)

    def random_bits(*shape: int) -> torch.Tensor:
        raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * width), generator=g, dtype=torch.uint8)
        return raw.view(getattr(torch, dtype))

    shapes = {"a": (3, 7), "b": (257, 1031), "c": (1, 1), "untouched": (5, 5)}
    one, two = {k: random_bits(*s) for k, s in shapes.items()}, {k: random_bits(*s) for k, s in shapes.items()}
    for name, tensors_ in (("model", one), ("base", two)):
        (tmp_path / name).mkdir()
        save_file(tensors_, tmp_path / name / "model.safetensors")
    rng = np.random.default_rng(1)
    kept = {k: rng.random(s) < 0.7 for k, s in shapes.items() if k != "untouched"}
    apply_mask(
        Mask.from_bools(kept), tmp_path / "model", tmp_path / "out", base=tmp_path / "base" if with_base else None
    )
    result = tensors(tmp_path / "out")
    for name in shapes:
        a = one[name].view(integer)
        dropped = two[name].view(integer) if with_base else torch.zeros_like(a)
        keep = torch.from_numpy(kept[name]) if name in kept else torch.ones(shapes[name], dtype=torch.bool)
        assert torch.equal(result[name].view(integer), torch.where(keep, a, dropped)), name


def test_select_refuses_bits_that_do_not_fit() -> None:
    from mftmerge.errors import MftmergeError

    with pytest.raises(MftmergeError, match="damaged"):
        select(np.ones(9, np.uint16), np.array([255], np.uint8))


def test_output_is_complete_and_loads(tiny: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "model"
    shutil.copytree(tiny("llama", dtype="bfloat16", max_shard_size="150KB"), path)
    (path / "LICENSE").write_text("terms")
    (path / "README.md").write_text("---\nlicense: mit\nmodel-index: x\n---\n\n# Old\nold words\n")
    (path / "pytorch_model.bin").write_bytes(b"pickle")
    (path / "modeling_x.py").write_text("boom")
    (path / "model.fp16.safetensors").write_bytes(b"other weights")
    (path / "pytorch_model.bin.index.json").write_text("{}")
    info = MaskInfo(
        operation="vote",
        options={"threshold": 2},
        parents=(Parent("code.mask", "c" * 32), Parent("both.mask", "b" * 32, operation="union")),
    )
    report = apply_mask(random_mask(path, info=info), path, tmp_path / "out")
    out = tmp_path / "out"
    before = {p.name for p in path.iterdir()}
    left_out = {"pytorch_model.bin", "modeling_x.py", "model.fp16.safetensors", "pytorch_model.bin.index.json"}
    assert {p.name for p in out.iterdir()} == before - left_out
    assert (out / "LICENSE").read_text() == "terms"
    readme = (out / "README.md").read_text()
    for part in (
        "license: mit",
        ": vote (threshold 2)",
        "code.mask [cccccccccccc]",
        ": union",
        "old words",
        "mftmerge",
    ):
        assert part in readme
    assert "model-index" not in readme
    assert str(tmp_path) not in readme
    assert any("Python code" in n for n in report.notes)
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(path).chat_template
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    state = tensors(out)
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, state["model.layers.0.mlp.up_proj.weight"])
    apply_mask(random_mask(path), path, tmp_path / "code", include=["*.py"])
    assert (tmp_path / "code" / "modeling_x.py").read_text() == "boom"
    assert not (tmp_path / "code" / "pytorch_model.bin").exists()


def test_base_difference_is_counted_and_can_be_required(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny("llama")
    checkpoint = Checkpoint.open(path)
    names = random_mask(path).names
    info = MaskInfo(base="x", fingerprints={n: checkpoint.fingerprint(n) for n in names})
    mask = random_mask(path, info=info)
    same = apply_mask(mask, path, tmp_path / "same", require_base=True).difference
    assert same is not None
    assert (same.tensors, same.of_tensors) == (0, len(names))
    tuned = tmp_path / "tuned"
    shutil.copytree(path, tuned)
    state = load_file(path / "model.safetensors")
    state[names[0]][0, 0] += 1
    state[names[3]][1, 2] *= 2
    save_file(state, tuned / "model.safetensors", metadata={"format": "pt"})
    report = apply_mask(mask, tuned, tmp_path / "out")
    assert report.difference is not None
    assert report.difference.tensors == 2
    assert report.difference.weights == sum(mask.size(names[i]) for i in (0, 3))
    assert f"2 of {len(names)} covered tensors differ" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(BadInput, match=f"2 of {len(names)} covered tensors differ"):
        apply_mask(mask, tuned, tmp_path / "refused", require_base=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "same", "tuned"]
    with pytest.raises(BadInput, match="no fingerprints"):
        apply_mask(random_mask(path), path, tmp_path / "refused", require_base=True)


def test_delta_of_the_base_itself_is_the_base(tiny: Callable[..., Path], tmp_path: Path) -> None:
    tuned, base = tiny("llama", seed=1, dtype="bfloat16"), tiny("llama", dtype="bfloat16")
    mask = random_mask(tuned, density=-1.0)
    apply_mask(mask, tuned, tmp_path / "out", base=base)
    result, expected, original = tensors(tmp_path / "out"), tensors(base), tensors(tuned)
    assert all(torch.equal(result[n], (expected if n in mask else original)[n]) for n in result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda k: {**k, "model.layers.9.mlp.up_proj.weight": np.ones((2, 2), bool)},
            "1 of 29 covered tensors are mis",
        ),
        (lambda k: {n: v[:-1] for n, v in k.items()}, "has shape"),
        (lambda k: {"model.layers.0.mlp.up_proj.weigth": next(iter(k.values()))}, "another architecture"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tiny: Callable[..., Path], tmp_path: Path, change: Callable[..., dict[str, np.ndarray]], message: str
) -> None:
    path = tiny("llama")
    mask = random_mask(path)
    wrong = Mask.from_bools(change({n: mask.kept(n) for n in mask.names}))
    with pytest.raises(BadInput, match=message):
        apply_mask(wrong, path, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_names_may_differ_by_the_base_models_prefix(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny("gpt2")
    mask = random_mask(path)
    bare = Mask.from_bools({n.removeprefix("transformer."): mask.kept(n) for n in mask.names})
    report = apply_mask(bare, path, tmp_path / "bare")
    apply_mask(mask, path, tmp_path / "full")
    assert report.notes
    assert (tmp_path / "bare/model.safetensors").read_bytes() == (tmp_path / "full/model.safetensors").read_bytes()


def test_tied_embeddings_are_masked_wherever_they_are_stored(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny("qwen2")  # tied: only the embeddings are stored
    embeddings = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    kept = np.random.default_rng(0).random(tuple(embeddings.shape)) < 0.5
    by_head = Mask.from_bools({"lm_head.weight": kept})
    apply_mask(by_head, path, tmp_path / "one")
    expected = embeddings * torch.from_numpy(kept)
    assert torch.equal(tensors(tmp_path / "one")["model.embed_tokens.weight"], expected)
    both = tmp_path / "both"
    shutil.copytree(path, both)
    state = load_file(path / "model.safetensors")
    save_file({**state, "lm_head.weight": embeddings.clone()}, both / "model.safetensors", metadata={"format": "pt"})
    apply_mask(by_head, both, tmp_path / "two")
    result = tensors(tmp_path / "two")
    assert torch.equal(result["lm_head.weight"], expected)
    assert torch.equal(result["model.embed_tokens.weight"], expected)


def test_two_stored_embeddings_that_differ_are_not_tied_whatever_config_says(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    path = tmp_path / "both"
    shutil.copytree(tiny("qwen2"), path)  # its config.json says tied
    state = load_file(path / "model.safetensors")
    embeddings = state["model.embed_tokens.weight"]
    save_file({**state, "lm_head.weight": embeddings + 1}, path / "model.safetensors", metadata={"format": "pt"})
    kept = np.random.default_rng(0).random(tuple(embeddings.shape)) < 0.5
    apply_mask(Mask.from_bools({"lm_head.weight": kept}), path, tmp_path / "out")
    result = tensors(tmp_path / "out")
    assert torch.equal(result["lm_head.weight"], (embeddings + 1) * torch.from_numpy(kept))
    assert torch.equal(result["model.embed_tokens.weight"], embeddings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    assert torch.equal(model.lm_head.weight, result["lm_head.weight"])


@pytest.mark.parametrize("scale", ["l.weight_scale_inv", "l.weight_scale", "l.scale", "l.weight.scale"])
@pytest.mark.parametrize("change", ["other", "absent", "added"])
def test_eight_bit_weights_with_other_scales_are_not_mixed(tmp_path: Path, scale: str, change: str) -> None:
    def write(name: str, value: float | None = None) -> Path:
        (tmp_path / name).mkdir()
        weights = {"l.weight": torch.ones(4).to(torch.float8_e4m3fn), "l.input_scale": torch.tensor([len(name)])}
        if value is not None:
            weights[scale] = torch.tensor([value])
        save_file(weights, tmp_path / name / SINGLE)
        return tmp_path / name

    mask = Mask.from_bools({"l.weight": np.array([1, 1, 0, 0], bool)})
    model = write("model") if change == "added" else write("model", 2.0)
    base = write("base") if change == "absent" else write("base", 0.5)
    with pytest.raises(BadInput, match="another scale"):
        apply_mask(mask, model, tmp_path / "out", base=base)
    apply_mask(mask, model, tmp_path / "zeros")
    apply_mask(mask, model, tmp_path / "same", base=model)


def test_fused_experts_in_the_file_are_refused_with_the_way_out(tiny: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = tiny("mixtral")
    model = AutoModelForCausalLM.from_pretrained(path)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    with pytest.raises(BadInput, match="stores its experts fused"):
        apply_mask(random_mask(path, where="experts"), tmp_path / "fused", tmp_path / "out")


def test_integers_are_not_weights(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    save_file({"q": torch.ones(4, 4, dtype=torch.int8)}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(BadInput, match="I8"):
        apply_mask(Mask.from_bools({"q": np.ones((4, 4), bool)}), tmp_path / "m", tmp_path / "out")


def test_a_base_of_another_type_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny("llama", dtype="bfloat16")
    with pytest.raises(BadInput, match="exact selection needs both alike"):
        apply_mask(random_mask(path), path, tmp_path / "out", base=tiny("llama"))


def test_target_is_never_replaced_unasked(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path, out = tiny("llama"), tmp_path / "out"
    mask = random_mask(path)
    apply_mask(mask, path, out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(BadInput, match="overwrite=True"):
        apply_mask(random_mask(path, 1), path, out)
    assert (out / "model.safetensors").read_bytes() == before
    apply_mask(random_mask(path, 1), path, out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    with pytest.raises(BadInput, match="no checkpoint directory"):
        apply_mask(mask, path, tmp_path / "home", overwrite=True)
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(BadInput, match="not a directory"):
        apply_mask(mask, path, tmp_path / "link", overwrite=True)
    with pytest.raises(BadInput, match="itself an input"):
        apply_mask(mask, out, out, overwrite=True)


@pytest.mark.parametrize("which", ["mask", "model", "base", "inside the model"])
def test_overwrite_never_touches_an_input_or_what_is_no_checkpoint(
    tiny: Callable[..., Path], tmp_path: Path, which: str
) -> None:
    run, inputs = tmp_path / "run", {"mask": tmp_path / "a.mask", "model": tmp_path / "m", "base": tmp_path / "b"}
    shutil.copytree(tiny("llama"), run)
    (run / "notes.txt").write_text("mine")
    (run / ".git").mkdir()
    if which in inputs:
        inputs[which] = run / inputs[which].name
    random_mask(run).save(inputs["mask"])
    for name in ("model", "base"):
        shutil.copytree(tiny("llama"), inputs[name])
    before = {p: p.is_file() and p.read_bytes() for p in run.rglob("*")}
    out = run if which in inputs else inputs["model"] / "sub"
    with pytest.raises(BadInput, match="an input"):
        apply_mask(inputs["mask"], inputs["model"], out, base=inputs["base"], overwrite=True)
    assert {p: p.is_file() and p.read_bytes() for p in run.rglob("*")} == before
    if which in inputs:
        return
    apply_mask(inputs["mask"], inputs["model"], run, overwrite=True)
    assert (run / "notes.txt").read_text() == "mine"
    assert (run / ".git").is_dir()


def delta_mask(tuned: Path, base: Path, reference: str | None, *, seed: int = 0) -> Mask:
    """A mask that says it was learnt over the difference of two checkpoints."""
    plain, opened = random_mask(tuned, seed, 0.5), Checkpoint.open(base)
    info = MaskInfo(
        on="delta", delta_base=reference, delta_fingerprints={n: opened.fingerprint(n) for n in plain.names}
    )
    return random_mask(tuned, seed, 0.5, info=info)


def test_a_mask_over_a_delta_is_never_applied_as_zeros_unasked(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned, base, other = tiny("llama"), tiny("llama", seed=3), tiny("llama", seed=4)
    expected = tmp_path / "expected"
    apply_mask(random_mask(tuned, 0, 0.5), tuned, expected, base=base)
    for reference in (None, str(tmp_path / "gone"), "owner/name", "x\x1b[2J", str(other)):
        with pytest.raises(BadInput, match=r"base .*on='weights'") as caught:
            apply_mask(delta_mask(tuned, base, reference), tuned, tmp_path / "out")
        assert str(caught.value).isprintable()
        assert not (tmp_path / "out").exists()
    given = apply_mask(delta_mask(tuned, base, None), tuned, tmp_path / "given", base=base)
    assert not given.notes
    found = apply_mask(delta_mask(tuned, base, str(base)), tuned, tmp_path / "found")
    assert "dropped weights have the values of" in found.notes[0]
    assert "Dropped weights have the value of" in (tmp_path / "found" / "README.md").read_text()
    zeros = apply_mask(delta_mask(tuned, base, str(base)), tuned, tmp_path / "zeros", on="weights")
    assert "learnt over a delta" in zeros.notes[0]
    apply_mask(random_mask(tuned, 0, 0.5), tuned, tmp_path / "plain")
    wrong = apply_mask(delta_mask(tuned, base, None), tuned, tmp_path / "wrong", base=other)
    assert "the base is not the one that the mask's delta was learnt from" in wrong.notes[0]
    with pytest.raises(BadInput, match="not both"):
        apply_mask(delta_mask(tuned, base, None), tuned, tmp_path / "x", base=base, on="weights")
    for a, b in (("given", "expected"), ("found", "expected"), ("zeros", "plain")):
        assert all((v == tensors(tmp_path / b)[k]).all() for k, v in tensors(tmp_path / a).items())


def test_command_line(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny("llama", dtype="bfloat16")
    random_mask(path).save(tmp_path / "a.mask")
    program = "from mftmerge.cli.main import main; main(); "

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", program, "apply", *arguments], capture_output=True, text=True)

    first = run(str(tmp_path / "a.mask"), "--model", str(path), "-o", str(tmp_path / "out"))
    assert first.returncode == 0, first.stderr
    assert "28 tensors masked" in first.stdout
    again = run(str(tmp_path / "a.mask"), "--model", str(path), "-o", str(tmp_path / "out"))
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert "--overwrite" in again.stderr
    assert run(str(tmp_path / "b.mask"), "--model", str(path), "-o", str(tmp_path / "o")).returncode == 2
    assert run(str(tmp_path / "a.mask"), "--model", str(tmp_path), "-o", str(tmp_path / "o")).returncode == 2


def test_apply_never_imports_torch(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny("llama")
    random_mask(path).save(tmp_path / "a.mask")
    code = (
        "import sys; from mftmerge.apply import apply_mask;"
        f"apply_mask({str(tmp_path / 'a.mask')!r}, {str(path)!r}, {str(tmp_path / 'out')!r});"
        "assert not {'torch', 'transformers', 'mergekit'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"

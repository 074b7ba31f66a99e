"""Mask files: round trips, plain safetensors readers, sidecars, atomic writing, lazy reading, the commands' output."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mftmerge import maskfile as writer
from mftmerge.cli import main
from mftmerge.combine import OPERATIONS, combine, combine_files
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.inspection import inspect
from mftmerge.mask import Mask, MaskInfo, Parent
from mftmerge.maskheader import BLOCK
from mftmerge.names import layer_of, module_of

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: object) -> Done:
    """The command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return Done(int(stop.value.code or 0), out.getvalue(), err.getvalue())


def random_mask(seed: int = 0, scores: bool = False, initial: bool = False, **shapes: tuple[int, ...]) -> Mask:
    rng = np.random.default_rng(seed)
    shapes = shapes or {"model.layers.0.mlp.up_proj.weight": (33, 40), "model.layers.1.mlp.up_proj.weight": (5, 7)}
    sizes = {n: math.prod(s) for n, s in shapes.items()}
    kept = {n: np.unpackbits(np.frombuffer(rng.bytes(k), np.uint8), count=k) for n, k in sizes.items()}
    bools = {n: kept[n].astype(np.bool_).reshape(s) for n, s in shapes.items()}
    values = {n: rng.standard_normal(s, np.float32) for n, s in shapes.items()} if scores else None
    before = {n: v + np.float32(1) for n, v in values.items()} if initial and values else None
    info = MaskInfo(0.9, "a/base", dict.fromkeys(shapes, "ab"), {"seed": seed, "steps": 3, "init": "magnitude"})
    return Mask.from_bools(bools, info, values, before)


def same(a: Mask, b: Mask) -> None:
    assert a.names == b.names
    assert a.digest == b.digest
    assert a.info == b.info
    for name in a.names:
        assert a.shape(name) == b.shape(name)
        assert a.count(name) == b.count(name)
        np.testing.assert_array_equal(a.kept(name), b.kept(name))


@given(
    st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda n: "::" not in n and n != "__metadata__" and
                    n.isprintable()), st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=4),
    st.booleans(), st.sampled_from(["embed", "sidecar", "none"]), st.booleans(),
)  # fmt: skip
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, shapes: Any, archive: bool, scores: Any, initial: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.mask"
    mask = random_mask(1, True, initial, **shapes) if shapes else Mask.from_bools({})
    mask.save(path, archive=archive, scores=scores)
    loaded = Mask.load(path)
    same(loaded, mask)
    assert loaded.has_scores == (mask.has_scores and scores != "none")
    for name in mask.names if loaded.has_scores else ():
        np.testing.assert_array_equal(loaded.scores(name), mask.scores(name))
        assert loaded.has_initial_scores == initial
        if initial:
            np.testing.assert_array_equal(loaded.initial_scores(name), mask.initial_scores(name))
    inspect(path)


@pytest.mark.parametrize("archive", [False, True])
def test_any_stretch_can_be_read(tmp_path: Path, archive: bool) -> None:
    size, rng = BLOCK * 8 + 1000, np.random.default_rng(0)
    mask = random_mask(w=(size,))
    mask.save(tmp_path / "x.mask", archive=archive)
    loaded, packed = Mask.load(tmp_path / "x.mask"), mask.packed("w")
    for _ in range(200):  # across the end of an archived block
        start, length = int(rng.integers(BLOCK - 300, BLOCK + 120)) * 8, int(rng.integers(0, 3000))
        stop = min(start + length, size)
        np.testing.assert_array_equal(loaded.read("w", start, start + length), packed[start // 8 : -(-stop // 8)])


def test_the_bits_are_where_the_format_says(tmp_path: Path) -> None:
    """Element i of a tensor is bit i % 8 of byte i // 8, read here with safetensors alone."""
    mask = random_mask(scores=True)
    mask.save(tmp_path / "x.mask")
    entries = load_file(tmp_path / "x.mask")
    for name in mask.names:
        flat = mask.kept(name).reshape(-1)
        assert [bool(entries[name][i // 8] >> i % 8 & 1) for i in range(flat.size)] == flat.tolist()
        np.testing.assert_array_equal(entries[f"{name}::score"], mask.scores(name))


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("scores", ["embed", "sidecar"])
def test_plain_safetensors_opens_it(tmp_path: Path, archive: bool, scores: Any) -> None:
    mask = random_mask(scores=True, initial=True)
    mask.save(tmp_path / "x.mask", archive=archive, scores=scores)
    with safe_open(tmp_path / "x.mask", "pt") as file:
        header = json.loads(file.metadata()["mftmerge"])
        names = file.keys()
        assert all(file.get_tensor(n).numel() for n in names)
    assert set(mask.names) <= set(names)
    assert header["format"] == 1
    assert header["tensors"][mask.names[0]]["density"] == pytest.approx(mask.density(mask.names[0]), abs=1e-6)
    assert header["info"]["training"]["seed"] == 0


def test_sizes(tmp_path: Path) -> None:
    mask = Mask.from_bools({"w": np.random.default_rng(0).random((2000, 2000)) < 0.9})
    mask.save(tmp_path / "raw.mask")
    mask.save(tmp_path / "small.mask", archive=True)
    assert (tmp_path / "raw.mask").stat().st_size * 8 / 4e6 < 1.0011
    assert (tmp_path / "small.mask").stat().st_size * 8 / 4e6 < 0.48


def test_scores_in_a_sidecar_belong_to_their_mask(tmp_path: Path) -> None:
    random_mask(1, True).save(tmp_path / "x.mask", scores="sidecar")
    sidecar = tmp_path / "x.scores.safetensors"
    assert Mask.load(tmp_path / "x.mask").has_scores
    hidden = sidecar.rename(tmp_path / "elsewhere")
    assert not Mask.load(tmp_path / "x.mask").has_scores
    random_mask(2, True).save(tmp_path / "y.mask", scores="sidecar")
    (tmp_path / "y.scores.safetensors").rename(sidecar)
    with pytest.raises(BadInput, match=r"x\.scores.*another mask"):
        Mask.load(tmp_path / "x.mask")
    content = bytearray(hidden.read_bytes())
    content[-1] ^= 1
    sidecar.write_bytes(content)
    with pytest.raises(BadInput, match="damaged"):
        inspect(tmp_path / "x.mask")


def test_a_failing_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.mask"
    random_mask(1).save(path)
    before = path.read_bytes()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    for name in ("pwrite", "fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(writer.os, name, full)
            with pytest.raises(MftmergeError, match=r"x\.mask: cannot be written \(No space"):
                random_mask(2).save(path)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["x.mask"]
    with pytest.raises(BadInput, match="overwrite=True"):
        random_mask(2).save(path, overwrite=False)
    with pytest.raises(BadInput, match="no directory"):
        random_mask(2).save(tmp_path / "absent" / "x.mask")
    with pytest.raises(BadInput, match="cannot be called"):
        random_mask(**{"w::score": (3,)}).save(path)


def test_arrays_that_do_not_fit_are_refused() -> None:
    ones = np.full(2, 255, np.uint8)
    with pytest.raises(BadInput, match="do not fit"):
        Mask({"w": ones}, {"w": (17,)})
    with pytest.raises(BadInput, match="padding"):
        Mask({"w": ones}, {"w": (15,)})
    with pytest.raises(BadInput, match="all scores or none"):
        Mask({"w": ones, "v": ones}, {"w": (16,), "v": (16,)}, scores={"w": np.zeros(16, np.float32)})
    with pytest.raises(BadInput, match="shape"):
        Mask({"w": ones}, {"w": (16,)}, scores={"w": np.zeros(15, np.float32)})


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("density", [None, 0.3])
@pytest.mark.parametrize("archive", [False, True])
def test_files_combine_as_masks_do(tmp_path: Path, op: str, density: float | None, archive: bool) -> None:
    """Raw and archived inputs, tensors that span blocks and pieces, a tensor that only one mask covers."""
    large = 300_000 if op == "score" else BLOCK * 8 + 77
    shapes: dict[str, tuple[int, ...]] = {"a": (7, 9), "b": (large,), "c": (0,)}
    masks = [random_mask(seed, op == "score", seed == 2, **shapes) for seed in (1, 2)]
    masks.append(random_mask(3, op == "score", extra=(99,), **shapes))
    paths = [tmp_path / f"{i}.mask" for i in range(3)]
    for i, (mask, path) in enumerate(zip(masks, paths, strict=True)):
        mask.save(path, archive=i == 1)
    most = 1 if op == "complement" else 3
    out = tmp_path / "out.mask"
    report = combine_files(op, paths[:most], out, density=density, archive=archive)
    expected = combine(op, masks[:most], names=[p.name for p in paths[:most]], density=density)
    same(Mask.load(out), expected)
    assert (report.kept, report.size) == (
        sum(map(expected.count, expected.names)),
        sum(map(expected.size, expected.names)),
    )
    for one, mask in zip(report.inputs, masks, strict=False):
        changed = sum(int((mask.kept(n) != expected.kept(n)).sum()) for n in mask.names if n in expected)
        assert (one.changed, one.density, one.digest) == (changed, mask.density(), mask.digest)


def test_the_family_is_recorded(tmp_path: Path) -> None:
    for seed in (1, 2):
        random_mask(seed).save(tmp_path / f"{seed}.mask")
    paths = [tmp_path / "1.mask", tmp_path / "2.mask"]
    combine_files("vote", paths, tmp_path / "v.mask", weights=[2, 1], threshold="0.6", archive=True)
    combine_files("difference", [tmp_path / "v.mask", paths[0]], tmp_path / "d.mask", density="0.2")
    info = Mask.load(tmp_path / "d.mask").info
    first, second = random_mask(1), random_mask(2)
    grandparents = Parent("1.mask", first.digest, 2.0), Parent("2.mask", second.digest, 1.0)
    vote = Mask.load(tmp_path / "v.mask")
    options = {"weights": [2.0, 1.0], "threshold": 0.6}
    parents = Parent("v.mask", vote.digest, None, "vote", options, grandparents), Parent("1.mask", first.digest)
    assert info == MaskInfo(0.2, "a/base", first.info.fingerprints, {}, {}, "difference", {"density": 0.2}, parents)
    shown = run("inspect", tmp_path / "d.mask").stdout
    assert [line.split(" [")[0] for line in shown.split("\n\n")[-1].splitlines()] == [
        "d.mask: difference (density 0.2)", "  v.mask", "    1.mask", "    2.mask", "  1.mask"
    ]  # fmt: skip


def test_different_bases_are_noted(tmp_path: Path) -> None:
    paths = []
    for name in ("x", "y"):
        paths.append(tmp_path / f"{name}.mask")
        info = MaskInfo(base=name, fingerprints={"w": name, "v": "same"})
        Mask.from_bools({n: np.ones(9, np.bool_) for n in ("w", "v")}, info).save(paths[-1])
    report = combine_files("union", paths, tmp_path / "out.mask")
    assert "different bases: x, y" in report.notes[0]
    assert Mask.load(tmp_path / "out.mask").info.fingerprints == {"v": "same"}
    assert Mask.load(tmp_path / "out.mask").info.base is None


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [
        ("model.layers.12.self_attn.q_proj.weight", 12, "self_attn.q_proj"),
        ("model.layers.3.block_sparse_moe.experts.7.w1.weight", 3, "block_sparse_moe.experts.w1"),
        ("transformer.h.0.attn.c_attn.weight", 0, "attn.c_attn"),
        ("h.0.mlp.c_fc.bias", 0, "mlp.c_fc.bias"),
        ("model.embed_tokens.weight", None, "model.embed_tokens"),
        pytest.param(f"layers.{'9' * 5000}.w1", None, "w1", id="a hostile number"),
    ],
)
def test_layers_and_modules_of_names(name: str, layer: int | None, module: str) -> None:
    assert (layer_of(name), module_of(name)) == (layer, module)


def test_inspect_shows_densities_and_draws(tmp_path: Path) -> None:
    path = tmp_path / "x.mask"
    random_mask(1, True).save(path)
    done = run("inspect", path, "--json", "--plot", tmp_path / "x.png")
    shown, mask = json.loads(done.stdout), Mask.load(path)
    assert shown["by_layer"] == {"0": mask.density(mask.names[0]), "1": mask.density(mask.names[1])}
    assert shown["by_module"] == {"mlp.up_proj": mask.density()}
    assert shown["digest"] == mask.digest
    assert shown["file_bytes"] == path.stat().st_size
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    assert f"density {mask.density():.4f}" in run("inspect", path).stdout
    assert run("inspect", path, "--plot", tmp_path / "x.txt").returncode == 2


def test_combine_command_prints_what_it_did(tmp_path: Path) -> None:
    paths = [tmp_path / f"{seed}.mask" for seed in (1, 2)]
    for seed, path in enumerate(paths, 1):
        random_mask(seed).save(path)
    out = tmp_path / "out.mask"
    done = run("combine", *paths, "--op", "vote", "--threshold", "2", "-o", out)
    assert done.returncode == 0, done.stderr
    result, first = Mask.load(out), random_mask(1)
    changed = sum(int((first.kept(n) != result.kept(n)).sum()) for n in first.names)
    assert f"1.mask  density {first.density():.4f}, 2 tensors, {changed:,} bits changed" in done.stdout
    assert f"vote, threshold 2: density {result.density():.4f}" in done.stdout
    assert run("combine", *paths, "-o", out).returncode == 2
    report = json.loads(run("combine", *paths, "-o", out, "--overwrite", "--json").stdout)
    assert report["density"] == Mask.load(out).density()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--op", "merge"], "unknown operation 'merge'"),
        (["--threshold", "0"], "threshold 0"),
        (["--threshold", "half"], "threshold 'half'"),
        (["--weights", "1,x"], "--weights"),
        (["--density", "1.5"], "density 1.5"),
        (["--uncovered", "drop"], "abstain"),
        (["--op", "score"], "no scores"),
        (["absent.mask"], "absent.mask"),
    ],
)
def test_bad_input_is_one_line_and_no_output(tmp_path: Path, arguments: list[str], word: str) -> None:
    random_mask(1).save(tmp_path / "1.mask")
    done = run("combine", tmp_path / "1.mask", *arguments, "-o", tmp_path / "out.mask")
    assert done.returncode == 2
    assert word in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == ["1.mask"]


def test_combine_inspect_and_compare_do_not_import_torch(tmp_path: Path) -> None:
    random_mask(1).save(tmp_path / "1.mask")
    script = """
import sys
from mftmerge.cli import main
for arguments in (["combine", sys.argv[1], "-o", sys.argv[1] + ".out"], ["inspect", sys.argv[1]],
                  ["compare", sys.argv[1], sys.argv[1] + ".out"]):
    try:
        main(arguments)
    except SystemExit as stop:
        assert not stop.code, stop.code
print("imported", sorted({"torch", "transformers", "mergekit"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "1.mask"], capture_output=True, text=True)
    assert "imported []" in done.stdout, done.stdout + done.stderr


MEASURE = """
import sys
import numpy
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
before = peak()
from mftmerge.combine import combine_files
op, density, *paths = sys.argv[1:]
combine_files(op, paths[:-1], paths[-1], density=None if density == "none" else density)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's peak memory")
@pytest.mark.parametrize(("op", "density"), [("union", "none"), ("vote", "none"), ("vote", "0.9"), ("score", "0.9")])
def test_memory_does_not_grow_with_the_mask(tmp_path: Path, op: str, density: str) -> None:
    """Masks of 60 MB together, or with 96 MB of scores for `score`, at most 64 MB above the interpreter with numpy."""
    size = 8_000_000 if op == "score" else 160_000_000
    for seed in range(3):
        rng = np.random.default_rng(seed)
        packed = np.frombuffer(rng.bytes(size // 8), np.uint8)
        scores = {"w": rng.standard_normal(size, np.float32)} if op == "score" else None
        Mask({"w": packed}, {"w": (size,)}, scores=scores).save(tmp_path / f"{seed}.mask")
    paths = [tmp_path / f"{seed}.mask" for seed in range(3)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, op, density, *paths, tmp_path / "out.mask"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(done.stdout) < 64


def test_foreign_masks_are_imported(tmp_path: Path) -> None:
    import torch

    rng = np.random.default_rng(0)
    kept = {f"model.layers.{i}.mlp.up_proj": rng.random((9, 13)) < 0.9 for i in range(2)}
    torch.save({n: torch.from_numpy(v).float() for n, v in kept.items()}, tmp_path / "masks.pt")
    for dtype in (np.bool_, np.uint8, np.float16, np.float32):
        arrays = {f"{n}.weight": v.astype(dtype) for n, v in kept.items()}
        save_file(arrays, tmp_path / f"{np.dtype(dtype)}.safetensors")
    for source in [*tmp_path.glob("*.safetensors"), tmp_path / "masks.pt"]:
        done = run("import", source, "-o", tmp_path / "out.mask", "--overwrite")
        assert done.returncode == 0, done.stderr
        mask = Mask.load(tmp_path / "out.mask")
        assert mask.names == tuple(f"{n}.weight" for n in kept)
        for name, value in kept.items():
            np.testing.assert_array_equal(mask.kept(f"{name}.weight"), value)


def test_foreign_files_that_are_no_masks_are_refused(tmp_path: Path, tiny: Any) -> None:
    import torch

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "owned"),)

    name = "model.layers.0.mlp.up_proj"
    cases = {
        "evil.pt": (Evil(), "without running code"),
        "list.pt": ([torch.ones(3)], "holds a list"),
        "half.pt": ({name: torch.full((160, 64), 0.5)}, "0.5"),
        "shape.pt": ({name: torch.ones(3, 3)}, "shape"),
        "alien.pt": ({"blocks.0.w": torch.ones(3)}, "no tensor"),
        "empty.pt": ({}, "no tensors"),
    }
    for file, (content, word) in cases.items():
        torch.save(content, tmp_path / file)
        done = run("import", tmp_path / file, "-o", tmp_path / "out.mask", "--model", tiny())
        assert done.returncode == 2
        assert word in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "out.mask").exists()
    assert not (tmp_path / "owned").exists()


def test_the_reader_in_the_description_of_the_format_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "mask-format.md").read_text(encoding="utf-8")
    mask, found = random_mask(scores=True), dict[str, Any]()
    mask.save(tmp_path / "code.mask")
    monkeypatch.chdir(tmp_path)
    exec(page.split("```python\n")[1].split("```")[0], found)
    assert set(found["kept"]) == set(mask.names)
    for name, kept in found["kept"].items():
        np.testing.assert_array_equal(kept, mask.kept(name))

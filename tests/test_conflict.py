"""What two skills fight over: the sums against a loop over weights, chance, the command on masks and checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mftmerge import conflict
from mftmerge.cli import main
from mftmerge.errors import BadInput
from mftmerge.mask import Mask


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return int(stop.value.code or 0)


def draw(seed: int, size: int = 4000) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=size) * (rng.random(size) < 0.7)).astype(np.float32)


def test_the_sums_are_those_of_a_loop_over_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conflict, "PIECE", 999)  # pieces that do not divide the length
    a, b = draw(0), draw(1)
    agreed = opposed = either = 0.0
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        either += max(abs(x), abs(y))
        if x * y > 0:
            agreed += min(abs(x), abs(y))
        elif x * y < 0:
            opposed += min(abs(x), abs(y))
    found = conflict.conflict(a, b)
    assert (found.agreed, found.opposed, found.either) == pytest.approx((agreed, opposed, either), rel=1e-6)
    assert found.share("agreed") + found.share("opposed") + found.share("ignored") == pytest.approx(1)


def test_evidence_that_is_the_same_agrees_and_its_negative_opposes() -> None:
    a = draw(0)
    same, against = conflict.conflict(a, a), conflict.conflict(a, -a)
    assert (same.share("agreed"), same.share("opposed")) == (pytest.approx(1), 0)
    assert (against.share("agreed"), against.share("opposed")) == (0, pytest.approx(1))
    assert conflict.conflict(np.zeros(5, np.float32), np.zeros(5, np.float32)).share("opposed") == 0


def test_independent_evidence_is_at_chance() -> None:
    found = conflict.conflict(draw(0, 400_000), draw(1, 400_000))
    assert found.opposed / found.opposed_by_chance == pytest.approx(1, abs=0.02)
    assert found.agreed / found.agreed_by_chance == pytest.approx(1, abs=0.02)


def test_what_is_not_finite_counts_as_no_evidence() -> None:
    a, b = np.array([np.nan, 1, np.inf, -1], np.float32), np.array([1, 1, 1, 1], np.float32)
    found = conflict.conflict(a, b)
    assert (found.agreed, found.opposed) == (1, 1)


@pytest.fixture
def masks(tmp_path: Path) -> list[Path]:
    """Three masks with scores over two layers; the third opposes the first in layer 1 alone."""
    shape, paths = (20, 30), []
    names = [f"model.layers.{i}.mlp.{m}.weight" for i in range(2) for m in ("up_proj", "down_proj")]
    first = {n: np.random.default_rng(i).normal(size=shape).astype(np.float32) for i, n in enumerate(names)}
    other = {n: np.random.default_rng(9 + i).normal(size=shape).astype(np.float32) for i, n in enumerate(names)}
    third = {n: -first[n] if ".1." in n else other[n] for n in names}
    start = {n: np.zeros(shape, np.float32) for n in names}
    for label, scores in (("a", first), ("b", other), ("c", third)):
        mask = Mask.from_bools({n: s > 0 for n, s in scores.items()}, scores=scores, initial=start)
        paths.append(tmp_path / f"{label}.mask")
        mask.save(paths[-1])
    return paths


def test_the_command_names_who_opposes_whom_and_where(masks: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", *masks, "--json") == 0
    pairs = {(p["a"], p["b"]): p for p in json.loads(capsys.readouterr().out)["conflicts"]}
    assert len(pairs) == 3
    pair = pairs["a.mask", "c.mask"]
    assert pair["by_layer"]["1"]["opposed"] == pytest.approx(1)
    assert pair["by_layer"]["0"]["opposed"] == pytest.approx(pair["by_layer"]["0"]["opposed_by_chance"], abs=0.1)
    assert all(".1." in name for name, _ in pair["worst"][:2])
    picture = masks[0].parent / "map.png"
    assert run("compare", *masks, "--conflict-plot", picture) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    said = capsys.readouterr().out
    assert "most of what is opposed: model.layers.1" in said
    assert f"wrote {picture}" in said


def test_checkpoints_are_compared_by_their_task_vectors(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny("llama", layers=2)
    place = []
    for label, sign in (("up", 1), ("down", -1)):
        place.append(tmp_path / label)
        shutil.copytree(base, place[-1])
        tensors = load_file(place[-1] / "model.safetensors")
        rng = np.random.default_rng(0)
        moved = {n: t + sign * rng.random(t.shape).astype(t.dtype) if "mlp" in n else t for n, t in tensors.items()}
        save_file(moved, place[-1] / "model.safetensors", metadata={"format": "pt"})
    assert run("compare", *place, "--base", base, "--json") == 0
    found = json.loads(capsys.readouterr().out)["conflicts"][0]
    assert found["opposed"] == pytest.approx(1, abs=1e-5)
    assert {name for name, c in found["by_tensor"].items() if c["opposed"]} == {
        n for n in found["by_tensor"] if "mlp" in n
    }


def test_what_cannot_be_compared_is_said(
    masks: list[Path], tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny("llama", layers=2)
    assert run("compare", base, "--base", base) == 2
    assert run("compare", base, base, "--base", base, "--plot", "x.png") == 2
    plain = masks[0].parent / "plain.mask"
    Mask.from_bools({"w": np.ones((3, 3), bool)}).save(plain)
    assert run("compare", plain, masks[0], "--conflict-plot", masks[0].parent / "x.png") == 2
    assert "needs masks with scores" in capsys.readouterr().err
    other = masks[0].parent / "other"
    shutil.copytree(base, other)
    tensors = load_file(other / "model.safetensors")
    name = next(n for n, t in tensors.items() if t.ndim == 2)
    tensors[name] = np.ascontiguousarray(tensors[name][:-1])
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="has shape"):
        conflict.of_checkpoints(base, {"a": base, "b": other})

"""Our merge methods against their papers' formulas, written here once more in plain numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from recipe_kitchen import assert_equal, make_kitchen, tensors, values

from mftmerge.cli.main import main
from mftmerge.errors import MftmergeError
from mftmerge.mask import Mask
from mftmerge.recipe.build import build
from mftmerge.recipe.methods import register

NAMES = ("math", "code", "instruct")


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kitchen(tmp_path_factory.mktemp("kitchen"), dtype="float32")


def merged(
    kitchen: Path, out: Path, method: str, models: list[dict[str, object]], **more: object
) -> dict[str, np.ndarray]:
    for model, name in zip(models, NAMES, strict=True):
        model["model"] = str(kitchen / "models" / name)
    config = {"merge_method": method, "base_model": str(kitchen / "models/base"), "models": models, **more}
    path = out / "r.yml"
    path.write_text(yaml.safe_dump(config))
    build(path, out / "out")
    return values(out / "out")


def deltas(kitchen: Path) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    base = values(kitchen / "models/base")
    return base, [{n: v - base[n] for n, v in values(kitchen / "models" / m).items()} for m in NAMES]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_consensus(k: int, kitchen: Path, tmp_path: Path) -> None:
    weights, limits = (0.5, 1.0, 0.8), (0.4, 0.6, 0.5)
    models: list[dict[str, object]] = [
        {"parameters": {"weight": w, "tall_lambda": t}} for w, t in zip(weights, limits, strict=True)
    ]
    result = merged(kitchen, tmp_path, "consensus", models, parameters={"k": k, "lambda": 0.7})
    base, parts = deltas(kitchen)
    kept = total = 0
    for name, start in base.items():
        scaled = [np.float32(w) * d[name] for w, d in zip(weights, parts, strict=True)]
        multi = np.sum(scaled, axis=0)
        wanted = sum(np.abs(s) >= t * np.abs(multi - s) for s, t in zip(scaled, limits, strict=True))
        expected = start + np.where(wanted >= k, np.float32(0.7) * multi, 0)
        assert np.mean(np.abs(result[name] - expected) > 1e-6) < 1e-4  # but for rounding at the limit itself
        kept, total = kept + int((wanted >= k).sum()), total + start.size
    assert kept == total if k == 1 else 0.01 < kept / total < 0.99  # the largest change is always wanted by its task


def test_localize_and_stitch(kitchen: Path, tmp_path: Path) -> None:
    models: list[dict[str, object]] = [
        {"mask": str(kitchen / "masks/math.mask")},
        {"mask": str(kitchen / "masks/code.mask")},
        {"parameters": {"density": 0.25}},
    ]
    result = merged(kitchen, tmp_path, "localize_and_stitch", models, parameters={"lambda": 0.9})
    base, parts = deltas(kitchen)
    masks = [Mask.load(kitchen / f"masks/{m}.mask") for m in NAMES[:2]]
    for name, start in base.items():
        regions = [m.kept(name) if name in m else np.ones(start.shape, bool) for m in masks]
        order = np.argsort(-np.abs(parts[2][name]).reshape(-1), kind="stable")[: round(0.25 * start.size)]
        largest = np.zeros(start.size, bool)
        largest[order] = True
        regions.append(largest.reshape(start.shape))
        held = np.sum(regions, axis=0)
        total = np.sum([np.where(r, d[name], 0) for r, d in zip(regions, parts, strict=True)], axis=0)
        np.testing.assert_allclose(result[name], start + 0.9 * total / np.maximum(held, 1), atol=1e-6)
        assert np.array_equal(result[name][held == 0], start[held == 0])


@pytest.mark.parametrize("task", [None, 1])
def test_emr(task: int | None, kitchen: Path, tmp_path: Path) -> None:
    models: list[dict[str, object]] = [{"parameters": {"task": i == task}} for i in range(3)]
    result = merged(kitchen, tmp_path, "emr", models)
    base, parts = deltas(kitchen)
    for name, start in base.items():
        stack = np.stack([d[name] for d in parts])
        sign = np.where(stack.sum(axis=0) > 0, 1, -1)
        unified = sign * np.max(np.where(stack * sign > 0, np.abs(stack), 0), axis=0)
        if task is not None:
            agree = stack[task] * unified > 0
            scale = np.abs(stack[task]).sum() / max(np.abs(unified * agree).sum(), 1e-30)
            unified = unified * agree * scale
        np.testing.assert_allclose(result[name], start + unified, atol=2e-6)


def test_emr_of_one_model_is_that_model(kitchen: Path, tmp_path: Path) -> None:
    from mergekit.merge_methods import merge_tensors

    register()
    generator = torch.Generator().manual_seed(0)
    base, model = torch.randn(50, 3, generator=generator), torch.randn(50, 3, generator=generator)
    rebuilt = merge_tensors([base, model], "emr", parameters={"task": True}, base_index=0)
    torch.testing.assert_close(rebuilt, model)


def test_masked_in_mergekit_s_own_command(kitchen: Path, tmp_path: Path) -> None:
    """`mftmerge mergekit-yaml`: the mask as a parameter, with and without a base."""
    for base in (None, str(kitchen / "models/base")):
        config = {
            "merge_method": "masked",
            "models": [{"model": str(kitchen / "models/math")}],
            "parameters": {"mask": str(kitchen / "masks/math.mask")},
        } | ({"base_model": base} if base else {})
        path, recipe = tmp_path / "config.yml", tmp_path / "recipe.yml"
        path.write_text(yaml.safe_dump(config))
        theirs = tmp_path / f"theirs-{bool(base)}"
        with pytest.raises(SystemExit) as e:
            main(["mergekit-yaml", str(path), str(theirs), "--quiet"])
        assert e.value.code == 0
        use = {"file": str(kitchen / "masks/math.mask"), "on": "delta" if base else "weights"}
        del config["parameters"]
        config["models"] = [{"model": str(kitchen / "models/math"), "mask": use}]
        recipe.write_text(yaml.safe_dump(config))
        build(recipe, tmp_path / f"ours-{bool(base)}")
        assert_equal(tensors(theirs), tensors(tmp_path / f"ours-{bool(base)}"))


def test_masked_can_insist_on_cover(kitchen: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.yml"
    config = {
        "merge_method": "masked",
        "models": [{"model": str(kitchen / "models/math")}],
        "parameters": {"mask": str(kitchen / "masks/math.mask"), "missing": "error"},
    }
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(MftmergeError, match="does not cover"):
        build(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fused_experts_are_masked_by_their_checkpoint_names(tmp_path: Path, tiny) -> None:  # type: ignore[no-untyped-def]
    """mergekit fuses Mixtral's experts while reading; the mask still names what the checkpoint stores."""
    model = tiny("mixtral")
    stored = tensors(model)
    name = next(n for n in stored if "experts" in n and "0" in n)
    kept = np.random.default_rng(0).random(stored[name].shape) < 0.5
    Mask.from_bools({name: kept}).save(tmp_path / "m.mask")
    (tmp_path / "r.yml").write_text(f"merge_method: masked\nmodels: [{{model: {model}, mask: m.mask}}]\n")
    report = build(tmp_path / "r.yml", tmp_path / "out")
    result = tensors(tmp_path / "out")
    before = sum(int(np.count_nonzero(t)) for t in stored.values())
    after = sum(int(np.count_nonzero(t)) for t in result.values())
    assert before - after == int((~kept).sum())
    assert report.tensors == len(result)

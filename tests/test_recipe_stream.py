"""Our own executor: bit for bit mergekit's results, in bounded memory."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from recipe_kitchen import assert_equal, make_kitchen, tensors

from mftmerge.mask import Mask
from mftmerge.recipe import kernels
from mftmerge.recipe.build import build
from mftmerge.recipe.settings import lookup


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def kitchen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kitchen(tmp_path_factory.mktemp(request.param), dtype=request.param)


def recipes(models: Path) -> dict[str, dict[str, object]]:
    def inputs(**parameters: object) -> list[dict[str, object]]:
        return [{"model": str(models / n), "parameters": parameters} for n in ("math", "code", "instruct")]

    base = {"base_model": str(models / "base")}
    gradient = [{"filter": "mlp", "value": [0.1, 0.9, 0.4]}, {"value": 0.37}]
    return {
        "linear": {"merge_method": "linear", "models": inputs(weight=gradient)},
        "sum": {"merge_method": "linear", "models": inputs(weight=0.3), "parameters": {"normalize": False}},
        "linear with base": {
            **{"merge_method": "linear", "models": inputs(weight=0.3), "parameters": {"weight": 2}, **base},
        },
        "task": {"merge_method": "task_arithmetic", "models": inputs(weight=gradient), **base},
        "task mean": {
            **{"merge_method": "task_arithmetic", "models": inputs(weight=0.7), **base},
            "parameters": {"normalize": True, "lambda": 0.8},
            "dtype": "float32",
            "out_dtype": "bfloat16",
        },
        "ties": {"merge_method": "ties", "models": inputs(weight=gradient, density=[0.2, 0.7]), **base},
        "ties int8": {
            **{"merge_method": "ties", "models": inputs(weight=0.5, density=0.33), **base},
            "parameters": {"int8_mask": True, "normalize": "false", "lambda": "1.5e0"},
            "dtype": "float16",
        },
        "ties edge": {"merge_method": "ties", "models": inputs(weight=1, density=[0, 1, 1e-9]), **base},
        "copy": {"merge_method": "passthrough", "models": [{"model": str(models / "math")}], "out_dtype": "float16"},
    }


NAMES = list(recipes(Path(".")))


@pytest.mark.parametrize("name", NAMES)
def test_bit_equal_to_mergekit(name: str, kitchen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mftmerge.recipe.stream.PIECE", 1024)  # pieces end within rows
    path = tmp_path / "r.yml"
    path.write_text(yaml.safe_dump(recipes(kitchen / "models")[name]))
    ours = build(path, tmp_path / "ours")
    assert ours.executors == ("stream",)
    build(path, tmp_path / "theirs", executor="mergekit")
    assert_equal(tensors(tmp_path / "ours"), tensors(tmp_path / "theirs"))
    for file in ("config.json", "tokenizer.json"):
        a, b = ((tmp_path / side / file).read_text() for side in ("ours", "theirs"))
        assert json.loads(a) == json.loads(b)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_number_of_models(count: int, dtype: torch.dtype) -> None:
    """Sums over the models do not depend on how a tensor is cut into pieces, as long as they start at even places
    (from four models on, torch adds up the last few elements of a tensor in another order)."""
    from mergekit.merge_methods import merge_tensors

    generator = torch.Generator().manual_seed(count)
    data = [torch.randn(37, 41, generator=generator).to(dtype) for _ in range(count + 1)]
    weights = [0.1 + 0.2 * i for i in range(count)]
    flat = [d.reshape(-1) for d in data]
    for method, elect in (("task_arithmetic", False), ("ties", True)):
        theirs = merge_tensors(
            data, method, parameters={"weight": weights, "lambda": 0.9, "normalize": True}, base_index=0
        )
        pieces = [
            kernels.task_arithmetic(p[0], [q - p[0] for q in p[1:]], weights, True, 0.9, elect)
            for p in zip(*(f.split(256) for f in flat), strict=True)
        ]
        assert torch.equal(torch.cat(pieces), theirs.reshape(-1))
    theirs = merge_tensors(data[1:], "linear", parameters={"weight": weights})
    pieces = [kernels.linear(p, weights, True) for p in zip(*(f.split(256) for f in flat[1:]), strict=True)]
    assert torch.equal(torch.cat(pieces), theirs.reshape(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [1, 17, 500, 999])
def test_cut_keeps_the_largest_and_of_equals_the_first(dtype: torch.dtype, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    delta = (torch.randn(1000, generator=generator) * 4).round().to(dtype) / 4  # many equal magnitudes
    pieces = [(a, min(a + 96, 1000)) for a in range(0, 1000, 96)]
    cut = kernels.find_cut(lambda a, b: delta[a:b], pieces, dtype == torch.float32, count, lambda f, p: map(f, p))
    kept = torch.cat([cut.kept(delta[a:b], a) for a, b in pieces])
    expected = torch.zeros(1000, dtype=torch.bool)
    expected[torch.sort(delta.abs().float(), descending=True, stable=True).indices[:count]] = True
    assert torch.equal(kept, expected)
    assert cut.ambiguous == (int((delta.abs() >= delta.abs()[expected].min()).sum()) > count)


def test_stream_differs_from_mergekit_only_among_equal_magnitudes(kitchen: Path, tmp_path: Path) -> None:
    models = kitchen / "models"
    config = {
        "merge_method": "ties",
        "base_model": str(models / "base"),
        "models": [{"model": str(models / "math"), "parameters": {"weight": 1, "density": 0.3}}],
    }
    path = tmp_path / "r.yml"
    path.write_text(yaml.safe_dump(config))
    build(path, tmp_path / "sorted")
    build(path, tmp_path / "first", executor="stream")
    base, a, b = (tensors(p) for p in (models / "base", tmp_path / "sorted", tmp_path / "first"))
    for name in base:
        assert (a[name] != base[name]).sum() == (b[name] != base[name]).sum()


def test_masks_on_inputs_and_output_stream(kitchen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(kitchen)
    monkeypatch.setattr("mftmerge.recipe.stream.PIECE", 1024)
    kinds = itertools.product(("weights", "delta"), ("weights", "delta"))
    for i, (own, result) in enumerate(kinds):
        path = tmp_path / f"{i}.yml"
        path.write_text(f"""
            merge_method: ties
            base_model: {{model: models/base, mask: masks/instruct.mask}}
            models:
              - model: models/math
                mask: {{file: masks/math.mask, on: {own}}}
                parameters: {{weight: 1, density: 0.6}}
              - {{model: models/code, parameters: {{weight: 0.5}}}}
            mask: {{file: masks/code.mask, on: {result}}}
        """)
        assert build(path, tmp_path / f"{i}-ours").executors == ("stream",)
        build(path, tmp_path / f"{i}-theirs", executor="mergekit")
        assert_equal(tensors(tmp_path / f"{i}-ours"), tensors(tmp_path / f"{i}-theirs"))


@pytest.mark.parametrize("t", [0.0, 0.25, 1 / 3, 1.0])
@pytest.mark.parametrize(
    "setting",
    [0.5, "1e-3", [0, 1], [1, 2, 5], ["1", "3e0"], [{"filter": "q", "value": [3, 4]}, {"value": 7}], [True, False]],
)
def test_settings_are_read_as_mergekit_does(setting: object, t: float) -> None:
    from mergekit.config import ConditionalParameter, evaluate_setting

    rules = setting
    if isinstance(setting, list) and isinstance(setting[0], dict):
        rules = [ConditionalParameter(**rule) for rule in setting]
    is_bool = isinstance(setting, list) and isinstance(setting[0], bool)
    for name in ("x.q.weight", "x.k.weight"):
        theirs = evaluate_setting(name, rules, t, validate=bool if is_bool else float)  # type: ignore[arg-type]
        assert float(lookup(setting, name, t)) == theirs


def test_streaming_imports_no_mergekit(kitchen: Path, tmp_path: Path) -> None:
    """It is what makes small merges quick; and memory stays far below the model's size."""
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipes(kitchen / "models")["ties"]))
    code = (
        "import sys; from mftmerge.recipe.build import build\n"
        f"build({str(tmp_path / 'r.yml')!r}, {str(tmp_path / 'out')!r})\n"
        "print([m for m in ('mergekit.config', 'mergekit.merge', 'transformers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_shards_and_index(kitchen: Path, tmp_path: Path) -> None:
    from mftmerge.recipe import stream
    from mftmerge.recipe.schema import load_recipe

    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipes(kitchen / "models")["copy"]))
    recipe = load_recipe(tmp_path / "r.yml")
    stream.merge(recipe.documents[0], recipe.folder, tmp_path / "many", shard_bytes=100_000)
    stream.merge(recipe.documents[0], recipe.folder, tmp_path / "one")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert_equal(tensors(tmp_path / "many"), tensors(tmp_path / "one"))


def test_mask_bits_are_read_in_pieces() -> None:
    from mftmerge.recipe.stream import _kept

    kept = np.random.default_rng(0).random(1003) < 0.5
    mask = Mask.from_bools({"w": kept})
    pieces = [_kept(mask, "w", a, min(a + 104, 1003)).numpy() for a in range(0, 1003, 104)]
    assert np.array_equal(np.concatenate(pieces), kept)

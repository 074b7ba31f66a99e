"""Exports: stock mergekit, in a process without mftmerge, computes what our builder builds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from recipe_kitchen import add_adapter, make_kitchen

from mftmerge.errors import MftmergeError
from mftmerge.recipe.build import build
from mftmerge.recipe.export import ExportReport, export
from mftmerge.recipe.verify import compare, run_stock

RECIPES = Path(__file__).parent.parent / "recipes"
FILES = sorted(p.name for p in RECIPES.glob("*.yml"))
# Recipes whose forms the files in recipes/ do not reach. {m}: the models' folder.
MORE = {
    "delta_on_three.yml": """
        merge_method: linear
        models:
          - {model: models/math, parameters: {weight: 1}}
          - {model: models/code, parameters: {weight: 2}}
          - {model: models/instruct, parameters: {weight: 3}}
        mask: {file: masks/math.mask, on: delta, base: models/base}
    """,
    "both_masks.yml": """
        merge_method: masked
        models: [{model: models/math, mask: masks/math.mask}]
        mask: {op: intersection, of: [masks/code.mask, masks/instruct.mask]}
    """,
    "sliced_output.yml": """
        merge_method: passthrough
        slices:
          - sources: [{model: models/math, layer_range: [0, 2]}]
          - sources: [{model: models/code, layer_range: [1, 3]}]
        mask: masks/math.mask
        dtype: float16
    """,
    "stage_delta.yml": """
        name: first
        merge_method: linear
        models:
          - {model: models/math, parameters: {weight: 1}}
          - {model: models/code, parameters: {weight: 1}}
        ---
        merge_method: task_arithmetic
        base_model: models/base
        models:
          - {model: first, mask: {file: masks/code.mask, on: delta}, parameters: {weight: 0.5}}
          - {model: models/instruct, parameters: {weight: 0.5}}
        dtype: float32
    """,
    "random.yml": """
        merge_method: dare_ties
        base_model: models/base
        models:
          - {model: models/math, mask: {file: masks/math.mask, on: delta}, parameters: {weight: 0.5, density: 0.5}}
          - {model: models/code, parameters: {weight: 0.5, density: 0.5}}
        mask: masks/code.mask
    """,
    "baked_stage.yml": """
        name: rebuilt
        merge_method: emr
        base_model: models/base
        models: [{model: models/math, parameters: {task: true}}, {model: models/code}]
        mask: masks/code.mask
        ---
        name: unused
        merge_method: passthrough
        models: [{model: models/math}]
        ---
        merge_method: slerp
        base_model: rebuilt
        models: [{model: rebuilt}, {model: models/instruct, mask: masks/instruct.mask}]
        parameters: {t: 0.3}
    """,
    "consensus_over_stage.yml": """
        name: mean
        merge_method: linear
        models: [{model: models/math}, {model: models/code}]
        parameters: {weight: 1}
        ---
        merge_method: consensus
        base_model: models/base
        models: [{model: mean}, {model: models/instruct}]
        parameters: {k: 1, tall_lambda: 1.5, weight: 0.5}
    """,
    "lora_masked_output.yml": """
        merge_method: linear
        models:
          - {model: models/base+models/adapter, mask: masks/math.mask, parameters: {weight: 1}}
          - {model: models/code, parameters: {weight: 1}}
        mask: {op: xor, of: [masks/code.mask, {op: complement, of: [masks/math.mask]}]}
        out_dtype: float16
    """,
    "weighted_consensus.yml": """
        merge_method: consensus
        base_model: models/base
        models:
          - {model: models/math, mask: {file: masks/math.mask, on: delta}, parameters: {weight: [0.2, 0.9]}}
          - {model: models/code, parameters: {weight: 0.7}}
        mask: masks/instruct.mask
    """,
}


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_kitchen(tmp_path_factory.mktemp("kitchen"))
    add_adapter(folder)
    for name, text in MORE.items():
        lines = [line.removeprefix("        ") for line in text.strip("\n").splitlines()]
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def recipe_path(kitchen: Path, name: str) -> Path:
    return kitchen / name if name in MORE else RECIPES / name


@pytest.fixture(scope="module")
def exported(kitchen: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ExportReport, Path]]:
    """Every recipe exported, and stock mergekit's result: one process runs them all."""
    out = tmp_path_factory.mktemp("exported")
    reports: dict[str, tuple[ExportReport, Path]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(kitchen)
        for name in [*FILES, *MORE]:
            reports[name] = export(recipe_path(kitchen, name), out / name), out / f"stock-{name}"
    jobs = [(r.config, "mergekit-multi" in r.command, theirs) for r, theirs in reports.values()]
    (out / "work").mkdir()
    run_stock(jobs, out / "work", seed=0)
    return reports


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FILES, *MORE])
def test_stock_mergekit_gives_the_same(
    name: str,
    kitchen: Path,
    exported: dict[str, tuple[ExportReport, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(kitchen)
    build(recipe_path(kitchen, name), tmp_path / "ours", seed=0)
    verified = compare(tmp_path / "ours", exported[name][1])
    assert verified.weights > 100_000


@pytest.mark.slow
def test_forms(exported: dict[str, tuple[ExportReport, Path]]) -> None:
    """The chosen forms are the cheap ones."""
    documents = {n: len(list(yaml.safe_load_all(r.config.read_text()))) for n, (r, _) in exported.items()}
    checkpoints = {n: len(list(r.out.glob("checkpoints/*"))) for n, (r, _) in exported.items()}
    assert (documents["mask_one_expert.yml"], checkpoints["mask_one_expert.yml"]) == (1, 1)
    assert (documents["vote_mask_on_merge.yml"], checkpoints["vote_mask_on_merge.yml"]) == (2, 1)
    assert (documents["delta_on_three.yml"], checkpoints["delta_on_three.yml"]) == (3, 2)
    assert (documents["emr.yml"], checkpoints["emr.yml"]) == (1, 1)
    assert "no method that computes emr" in exported["emr.yml"][0].forms[0]


def test_verify(kitchen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(kitchen)
    report = export(RECIPES / "vote_mask_on_merge.yml", tmp_path / "out", verify=True)
    assert report.verification is not None
    assert report.verification.tensors == 39
    config = report.config.read_text()
    assert str(tmp_path / "out/checkpoints") in config
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]
    json.dumps(yaml.safe_load_all(config), default=list)


def test_compare_sees_one_weight(kitchen: Path, tmp_path: Path) -> None:
    shutil.copytree(kitchen / "models/math", tmp_path / "a")
    shutil.copytree(kitchen / "models/math", tmp_path / "b")
    data = np.memmap(tmp_path / "b/model.safetensors", np.uint8, "r+")
    data[-1] ^= 1
    data.flush()
    with pytest.raises(MftmergeError, match="1 weights"):
        compare(tmp_path / "a", tmp_path / "b")

"""Exports: stock mergekit, in a process without mftmerge, computes what our builder builds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.tiny_models import tiny_checkpoint
from recipe_kitchen import add_adapter, make_kitchen

from mftmerge.errors import BadInput, MftmergeError
from mftmerge.mask import Mask, MaskInfo
from mftmerge.matching import over_delta
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
    "adapter_of_base.yml": """
        merge_method: task_arithmetic
        base_model: models/base+models/adapter
        models:
          - {model: models/math, mask: {file: masks/math.mask, on: delta}, parameters: {weight: 0.5}}
          - {model: models/code, parameters: {weight: 0.5}}
    """,
    "adapter_of_stage.yml": """
        name: first
        merge_method: linear
        models: [{model: models/base}, {model: models/code}]
        parameters: {weight: 1}
        ---
        merge_method: linear
        models: [{model: first+models/adapter, mask: masks/code.mask}, {model: models/math}]
        parameters: {weight: 1}
    """,
    "stage_as_base.yml": """
        name: first
        merge_method: linear
        models: [{model: models/math}, {model: models/code}]
        parameters: {weight: 1}
        ---
        merge_method: task_arithmetic
        base_model: {model: first, mask: masks/code.mask}
        models:
          - {model: models/instruct, mask: {file: masks/math.mask, on: delta}, parameters: {weight: 0.5}}
          - {model: models/math, mask: {file: masks/math.mask, on: delta, base: first}, parameters: {weight: 0.5}}
    """,
    "stage_as_base_of_consensus.yml": """
        name: mean
        merge_method: linear
        models: [{model: models/base}, {model: models/code}]
        parameters: {weight: 1}
        ---
        merge_method: consensus
        base_model: mean
        models:
          - {model: mean, mask: {file: masks/math.mask, on: delta, base: models/math}}
          - {model: models/instruct}
    """,
    "same_mask_on_two_bases.yml": """
        name: first
        merge_method: task_arithmetic
        base_model: models/base
        masks: {m: masks/math.mask}
        models:
          - {model: models/math, mask: {file: masks/math.mask, on: delta}, parameters: {weight: 1}}
          - {model: models/code, mask: m, parameters: {weight: 1}}
        ---
        name: last
        merge_method: task_arithmetic
        base_model: models/code
        masks: {m: masks/code.mask}
        models:
          - {model: models/math, mask: {file: masks/math.mask, on: delta}, parameters: {weight: 1}}
          - {model: models/code, mask: m, parameters: {weight: 1}}
          - {model: first, parameters: {weight: 1}}
    """,
    "pickled.yml": """
        merge_method: task_arithmetic
        base_model: models/pickled
        models:
          - {model: models/math, mask: {file: masks/math.mask, on: delta}, parameters: {weight: 1}}
          - {model: models/pickled, mask: masks/code.mask, parameters: {weight: 1}}
        mask: masks/instruct.mask
    """,
    "weights_though_made_over_a_delta.yml": """
        merge_method: linear
        models: [{model: models/math, mask: {file: masks/delta.mask, on: weights}}, {model: models/code}]
        parameters: {weight: 1}
    """,
    "base_of_another_type.yml": """
        merge_method: task_arithmetic
        base_model: models/base
        models: [{model: models/wide, parameters: {weight: 0.6}}]
        mask: {file: masks/math.mask, on: delta}
        out_dtype: float32
    """,
    "arithmetic_narrower_than_result.yml": """
        merge_method: task_arithmetic
        base_model: models/wide
        models: [{model: models/math, parameters: {weight: 0.6}}]
        mask: {file: masks/math.mask, on: delta}
        dtype: bfloat16
        out_dtype: float32
    """,
    "fused_consensus.yml": """
        merge_method: consensus
        base_model: models/experts-0
        models: [{model: models/experts-1}, {model: models/experts-2}]
    """,
    "fused_result.yml": """
        merge_method: passthrough
        models: [{model: models/experts-1}]
        mask: masks/fused.mask
    """,
    "named_as_a_method.yml": """
        name: linear
        merge_method: linear
        models: [{model: models/math}, {model: models/code}]
        parameters: {weight: 1}
        ---
        merge_method: linear
        models: [{model: linear, mask: masks/math.mask}]
        parameters: {weight: 1}
    """,
    "path_with_a_space.yml": """
        merge_method: linear
        models: [{model: models/with space, parameters: {weight: 1}}]
        mask: masks/math.mask
    """,
}


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_kitchen(tmp_path_factory.mktemp("kitchen"))
    add_adapter(folder)
    pickle_weights(folder / "models/code", folder / "models/pickled")
    mask = Mask.load(folder / "masks/math.mask")
    info = MaskInfo(**over_delta(folder / "models/base", mask.names))
    Mask.from_bools({n: mask.kept(n) for n in mask.names}, info).save(folder / "masks/delta.mask")
    tiny_checkpoint(folder / "models/wide", dtype="float32", seed=5)
    for i in range(3):
        tiny_checkpoint(folder / f"models/experts-{i}", "mixtral", dtype="bfloat16", seed=i, layers=1)
    fused = np.random.default_rng(0).random((4, 64, 160)) < 0.5
    Mask.from_bools({"model.layers.0.mlp.experts.down_proj": fused}).save(folder / "masks/fused.mask")
    shutil.copytree(folder / "models/math", folder / "models/with space")
    for name, text in MORE.items():
        lines = [line.removeprefix("        ") for line in text.strip("\n").splitlines()]
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def pickle_weights(model: Path, out: Path) -> None:
    """A copy of a model whose weights are pickled, as older ones are."""
    import torch
    from safetensors.torch import load_file

    shutil.copytree(model, out)
    torch.save(load_file(out / "model.safetensors"), out / "pytorch_model.bin")
    (out / "model.safetensors").unlink()


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
    assert (documents["adapter_of_base.yml"], checkpoints["adapter_of_base.yml"]) == (1, 1)
    assert (documents["adapter_of_stage.yml"], checkpoints["adapter_of_stage.yml"]) == (1, 1)  # and no unused stage
    assert (documents["stage_as_base.yml"], checkpoints["stage_as_base.yml"]) == (3, 3)
    assert (documents["fused_consensus.yml"], checkpoints["fused_consensus.yml"]) == (1, 1)
    assert "rename it" in exported["named_as_a_method.yml"][0].forms[0]
    assert "with a space, " in exported["path_with_a_space.yml"][0].forms[0]


def test_verify(kitchen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(kitchen)
    report = export(RECIPES / "vote_mask_on_merge.yml", tmp_path / "out", verify=True)
    assert report.verification is not None
    assert report.verification.tensors == 39
    config = report.config.read_text()
    assert str(tmp_path / "out/checkpoints") in config
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]
    json.dumps(yaml.safe_load_all(config), default=list)


def test_a_place_with_a_space_and_letters_beyond_ascii(
    kitchen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mergekit-multi cannot run paths with spaces: what would be two merges is one of the result."""
    monkeypatch.chdir(kitchen)
    report = export(RECIPES / "vote_mask_on_merge.yml", tmp_path / "Übung 1", verify=True)
    assert report.verification is not None
    assert report.command.startswith("mergekit-yaml ")
    assert "space" in report.forms[0]
    (document,) = yaml.safe_load_all(report.config.read_text(encoding="utf-8"))
    assert document["models"][0]["model"]["model"]["path"] == str(tmp_path / "Übung 1/checkpoints/result")


def test_overwrite_replaces_an_export_and_keeps_what_others_put_there(
    kitchen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(kitchen)
    out = tmp_path / "out"
    export(RECIPES / "mask_one_expert.yml", out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="overwrite=True"):
        export(RECIPES / "mask_one_expert.yml", out)
    export(kitchen / "fused_result.yml", out, overwrite=True)
    assert len(list(out.glob("checkpoints/*"))) == 1
    assert (out / "notes.txt").read_text() == "mine"


def test_an_error_of_the_work_names_the_recipe(kitchen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(kitchen)

    def full(*_: object, **__: object) -> None:
        raise MftmergeError("no room")

    monkeypatch.setattr("mftmerge.recipe.stocktranslation.apply_mask", full)
    with pytest.raises(MftmergeError, match=r"mask_one_expert\.yml: no room"):
        export(RECIPES / "mask_one_expert.yml", tmp_path / "out")


def test_signs_of_revisions_and_adapters_in_paths(
    kitchen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A configuration of one merge names such a model by its parts; several merges, which stock mergekit makes text of
    parts for, are exported as their result."""
    folder = tmp_path / "math@exp+1"
    shutil.copytree(kitchen / "models", folder / "models")
    shutil.copytree(kitchen / "models/code", tmp_path / "math")
    (folder / "r.yml").write_text("merge_method: passthrough\nmodels: [{model: models/math}]\n")
    report = export(folder / "r.yml", tmp_path / "out", verify=True)
    assert report.verification is not None
    (folder / "two.yml").write_text(
        "name: one\nmerge_method: passthrough\nmodels:\n- {model: models/math}\n---\n"
        "merge_method: passthrough\nmodels: [{model: one}]\n"
    )
    staged = export(folder / "two.yml", tmp_path / "two")
    assert staged.command.startswith("mergekit-yaml ")
    assert "math@exp+1" in staged.forms[0]
    monkeypatch.chdir(kitchen)
    assert export(RECIPES / "mask_one_expert.yml", tmp_path / "v@2+x", verify=True).verification is not None
    assert export(RECIPES / "vote_mask_on_merge.yml", tmp_path / "a+b").command.startswith("mergekit-yaml ")


def test_compare_sees_one_weight(kitchen: Path, tmp_path: Path) -> None:
    shutil.copytree(kitchen / "models/math", tmp_path / "a")
    shutil.copytree(kitchen / "models/math", tmp_path / "b")
    data = np.memmap(tmp_path / "b/model.safetensors", np.uint8, "r+")
    data[-1] ^= 1
    data.flush()
    with pytest.raises(MftmergeError, match="1 weights"):
        compare(tmp_path / "a", tmp_path / "b")

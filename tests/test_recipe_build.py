"""Builds: equal to the steps done one by one, and without masks to mergekit itself."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from recipe_kitchen import assert_equal, stock, tensors, written

from mftmerge import apply
from mftmerge.combine import combine
from mftmerge.errors import BadInput
from mftmerge.mask import Mask
from mftmerge.recipe.build import build

RECIPES = Path(__file__).parent.parent / "recipes"
pytestmark = pytest.mark.usefixtures("in_kitchen")


@pytest.mark.parametrize("recipe", sorted(p.name for p in RECIPES.glob("*.yml")))
def test_every_recipe_builds(recipe: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    report = build(RECIPES / recipe, tmp_path / "out")
    assert (tmp_path / "out/mftmerge_recipe.yml").read_text() == (RECIPES / recipe).read_text()
    assert report.tensors == len(tensors(tmp_path / "out"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not list(tmp_path.glob(".*"))


def test_masked_is_apply(tmp_path: Path) -> None:
    build(RECIPES / "mask_one_expert.yml", tmp_path / "built")
    apply.apply_mask("masks/math.mask", "models/math", tmp_path / "applied")
    assert_equal(tensors(tmp_path / "built"), tensors(tmp_path / "applied"))


def test_delta_mask_is_apply_with_base(tmp_path: Path) -> None:
    build(RECIPES / "delta_mask.yml", tmp_path / "built")
    apply.apply_mask("masks/math.mask", "models/math", tmp_path / "applied", base="models/base")
    assert_equal(tensors(tmp_path / "built"), tensors(tmp_path / "applied"))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "linear"])
def test_masked_inputs_are_the_two_steps(method: str, tmp_path: Path) -> None:
    build(RECIPES / f"masked_{method}.yml", tmp_path / "built")
    config = yaml.safe_load((RECIPES / f"masked_{method}.yml").read_text().replace("on:", "'on':"))
    base = None if method == "linear" else "models/base"
    for i, name in enumerate(("math", "code")):
        apply.apply_mask(f"masks/{name}.mask", f"models/{name}", tmp_path / name, base=base)
        config["models"][i]["model"] = str(tmp_path / name)
        del config["models"][i]["mask"]
    assert_equal(tensors(tmp_path / "built"), tensors(stock(config, tmp_path / "stock")))


def test_vote_on_merge_is_the_two_steps(tmp_path: Path) -> None:
    build(RECIPES / "vote_mask_on_merge.yml", tmp_path / "built")
    config = yaml.safe_load((RECIPES / "vote_mask_on_merge.yml").read_text())
    del config["mask"], config["masks"]
    vote = combine("vote", [Mask.load(f"masks/{n}.mask") for n in ("math", "code", "instruct")], threshold=2)
    apply.apply_mask(vote, stock(config, tmp_path / "merged"), tmp_path / "applied")
    assert_equal(tensors(tmp_path / "built"), tensors(tmp_path / "applied"))
    assert [p.name for p in (tmp_path / "built/masks").iterdir()] == ["vote-math-code-instruct.mask"]


def test_delta_on_merge_is_the_two_steps(tmp_path: Path) -> None:
    build(RECIPES / "delta_mask_on_merge.yml", tmp_path / "built")
    config = yaml.safe_load((RECIPES / "delta_mask_on_merge.yml").read_text().replace("on:", "'on':"))
    del config["mask"]
    math, code, instruct = (Mask.load(f"masks/{n}.mask") for n in ("math", "code", "instruct"))
    mask = combine("union", [math, combine("intersection", [code, instruct])])
    apply.apply_mask(mask, stock(config, tmp_path / "merged"), tmp_path / "applied", base="models/base")
    assert_equal(tensors(tmp_path / "built"), tensors(tmp_path / "applied"))


@pytest.mark.parametrize("masked", ["the result", "an input"])
def test_an_adapter_of_a_delta_base_is_merged_once(masked: str, kitchen: Path, tmp_path: Path) -> None:
    """Threads that ask for it at the same time would read what one of them is still writing."""
    use = {"file": "masks/code.mask", "on": "delta", "base": "models/base+models/adapter"}
    merge: dict[str, Any] = {"merge_method": "passthrough", "models": [{"model": "models/math"}]}
    (merge if masked == "the result" else merge["models"][0])["mask"] = use
    plain = {"merge_method": "passthrough", "models": [{"model": use["base"]}]}
    build(written(plain, tmp_path / "plain.yml"), tmp_path / "base")
    for name in ("one", "two"):  # in one process, which remembers what it has loaded
        build(written(merge, tmp_path / "r.yml"), tmp_path / name, num_threads=4)
        applied, code = tmp_path / f"{name} applied", Mask.load("masks/code.mask")
        apply.apply_mask(code, "models/math", applied, base=tmp_path / "base", check_base=False)
        assert_equal(tensors(tmp_path / name), tensors(applied))


def test_slices_keep_each_input_s_own_names(tmp_path: Path) -> None:
    build(RECIPES / "slices_with_masks.yml", tmp_path / "built")
    code, mask, built = tensors(Path("models/code")), Mask.load("masks/code.mask"), tensors(tmp_path / "built")
    name = "model.layers.{}.mlp.down_proj.weight"
    expected = np.where(mask.kept(name.format(2)), code[name.format(2)], 0)
    assert np.array_equal(built[name.format(3)], expected)
    assert (built[name.format(3)] != code[name.format(2)]).any()


CONFIGS: dict[str, dict[str, object]] = {
    "slerp": {
        "merge_method": "slerp",
        "base_model": "models/base",
        "models": [{"model": "models/base"}, {"model": "models/math"}],
        "parameters": {"t": [{"filter": "self_attn", "value": [0, 1]}, {"value": 0.3}]},
    },
    "dare_ties": {
        "merge_method": "dare_ties",
        "base_model": "models/base",
        "models": [{"model": f"models/{n}", "parameters": {"weight": 0.5, "density": 0.4}} for n in ("math", "code")],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    },
    "lora": {
        "merge_method": "task_arithmetic",
        "base_model": "models/base",
        "models": [{"model": m, "parameters": {"weight": 1}} for m in ("models/base+models/adapter", "models/code")],
    },
    "stack": {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": "models/math", "layer_range": r}]} for r in ([0, 3], [1, 4])],
    },
    "union": {
        "merge_method": "linear",
        "models": [{"model": f"models/{m}", "parameters": {"weight": 1}} for m in ("math", "code")],
        "tokenizer": {"source": "union", "pad_to_multiple_of": 16},
    },
}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_without_masks_as_mergekit(name: str, kitchen: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(yaml.safe_dump(CONFIGS[name]).replace("models/", f"{kitchen}/models/"))
    build(written(config, tmp_path / "r.yml"), tmp_path / "built", seed=5)
    stock(config, tmp_path / "stock")
    assert_equal(tensors(tmp_path / "built"), tensors(tmp_path / "stock"))
    names = {p.name for p in (tmp_path / "stock").iterdir()}
    assert names <= {p.name for p in (tmp_path / "built").iterdir()}
    for file in ("config.json", "tokenizer.json"):
        assert (tmp_path / "built" / file).read_text() == (tmp_path / "stock" / file).read_text()


def test_one_model_twice_with_two_masks(tmp_path: Path) -> None:
    """The same checkpoint under two masks is two inputs."""
    text = """
        merge_method: linear
        models:
          - {model: models/math, mask: masks/math.mask, parameters: {weight: 1}}
          - {model: models/math, mask: masks/code.mask, parameters: {weight: 1}}
        parameters: {normalize: false}
        dtype: float32
    """
    build(written(text, tmp_path / "r.yml"), tmp_path / "built")
    built, model = tensors(tmp_path / "built"), tensors(Path("models/math"))
    name = "model.layers.0.mlp.up_proj.weight"
    votes = sum(Mask.load(f"masks/{m}.mask").kept(name).astype(np.float32) for m in ("math", "code"))
    original = (model[name].astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(built[name].view(np.float32), original * votes)


@pytest.mark.parametrize("folder", ["math@exp", "math+code", "a@b@c+d"])
def test_signs_of_revisions_and_adapters_in_paths(folder: str, kitchen: Path, tmp_path: Path) -> None:
    """mergekit would cut such paths, of models and of our own views, and could find another model at what is left."""
    text = "merge_method: linear\nmodels:\n- {model: code, mask: math.mask}\n- {model: instruct}\n"
    text += "parameters: {weight: 1}\nmask: {file: code.mask, on: delta, base: math}\n"
    for name in ("plain", folder):
        (tmp_path / name).mkdir()
        for model in ("math", "code", "instruct"):
            shutil.copytree(kitchen / "models" / model, tmp_path / name / model)
        for mask in ("math", "code"):
            shutil.copy(kitchen / "masks" / f"{mask}.mask", tmp_path / name)
        written(text, tmp_path / name / "r.yml")
    shutil.copytree(kitchen / "models/math", tmp_path / "math")
    build(tmp_path / "plain/r.yml", tmp_path / "expected")
    build(tmp_path / folder / "r.yml", tmp_path / f"out-{folder}")
    assert_equal(tensors(tmp_path / f"out-{folder}"), tensors(tmp_path / "expected"))


def test_a_directory_that_looks_like_a_revision(kitchen: Path, tmp_path: Path) -> None:
    for name in ("ll", "ll@exp", "ll+exp"):
        model = "math" if name == "ll" else "code"
        shutil.copytree(kitchen / "models" / model, tmp_path / name)
    for name in ("ll@exp", "ll+exp"):
        text = f"merge_method: passthrough\nmodels: [{{model: {name}}}]\n"
        with pytest.raises(BadInput, match=rf"line 2: .*write \{{path: '{re.escape(name)}'\}}"):
            build(written(text, tmp_path / "r.yml"), tmp_path / "out")
        text = text.replace(name, f"{{path: {name}}}") + f"base_model: {{path: {name}}}\n"
        build(written(text, tmp_path / "r.yml"), tmp_path / "out", overwrite=True)
        assert_equal(tensors(tmp_path / "out"), tensors(kitchen / "models/code"))
    stage = "merge_method: passthrough\nmodels: [{model: ll}]\n"
    text = f"name: ll@2\n{stage}---\n{stage.replace('ll', 'll@2')}"
    with pytest.raises(BadInput, match="line 1: name: 'll@2' could not be named"):
        build(written(text, tmp_path / "r.yml"), tmp_path / "out2")


def test_existing_output_is_kept_on_failure(tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(RECIPES / "mask_one_expert.yml", out)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    with pytest.raises(BadInput, match="overwrite=True"):
        build(RECIPES / "masked_linear.yml", out)
    broken = written(
        "merge_method: karcher\nmodels: [{model: models/math}, {model: models/broken}]\n", tmp_path / "r.yml"
    )
    with pytest.raises(BadInput):
        build(broken, out, overwrite=True)
    assert before == {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    build(RECIPES / "masked_linear.yml", out, overwrite=True)
    assert not list(tmp_path.glob(".*"))


def test_an_input_is_never_overwritten(kitchen: Path) -> None:
    with pytest.raises(BadInput, match="itself an input"):
        build(RECIPES / "mask_one_expert.yml", kitchen / "models/math", overwrite=True)


def test_tensors_that_mergekit_drops_are_named(kitchen: Path, tmp_path: Path) -> None:
    """A tensor outside mergekit's definition of an architecture: it leaves it out silently, we refuse that."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(kitchen / "models/math", tmp_path / "odd")
    data = {**load_file(tmp_path / "odd/model.safetensors"), "model.layers.0.extra": torch.ones(4)}
    save_file(data, tmp_path / "odd/model.safetensors", metadata={"format": "pt"})
    path = written("merge_method: passthrough\nmodels: [{model: odd}]\n", tmp_path / "r.yml")
    with pytest.raises(BadInput, match=r"line 2: odd: model.layers.0.extra would not be in the res.*allow_lost=True"):
        build(path, tmp_path / "out")
    report = build(path, tmp_path / "out", allow_lost=True)
    assert any("model.layers.0.extra" in w for w in report.warnings)

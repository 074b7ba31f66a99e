"""Reading recipes: what is accepted, and that every problem is reported at once with its line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from recipe_kitchen import make_kitchen

from mftmerge.cli.main import main
from mftmerge.errors import BadInput
from mftmerge.mask import Mask
from mftmerge.recipe.catalogue import ABOUT, METHODS, Parameter, meaning
from mftmerge.recipe.importing import import_recipe
from mftmerge.recipe.load import load_recipe
from mftmerge.recipe.plan import plan
from mftmerge.recipe.schema import Reference, json_schema

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_kitchen(tmp_path_factory.mktemp("kitchen"))
    (folder / "models/adapter").mkdir()
    (folder / "models/adapter/adapter_config.json").write_text("{}")
    return folder


def problems(text: str, folder: Path, files: bool = True) -> list[str]:
    """Messages of a recipe's problems, without the file's name."""
    path = folder / "r.yml"
    path.write_text(text)
    with pytest.raises(BadInput) as e:
        load_recipe(path, files=files)
    message = str(e.value).removeprefix(f"{path}: ")
    assert "\n" not in message
    return re.split(r"; (?=line \d+: )", re.sub(r"^\d+ problems: ", "", message))


def test_all_problems_at_once_with_lines(kitchen: Path) -> None:
    text = """\
merge_method: task_arithmetic
base_model: models/bass
models:
  - model: models/math
    mask: masks/nath.mask
    parameters: {wieght: 1.0}
  - model: models/code
    parameters:
      weight: heavy
tokenizer_sauce: union
parameters:
  normalise: true
mask: {op: veto, of: [masks/math.mask]}
"""
    found = problems(text, kitchen)
    expected = [
        (2, "models/bass"),
        (4, "needs the parameter 'weight'"),
        (5, "nath.mask"),
        (6, "did you mean 'weight'"),
        (9, "'heavy' is not a float"),
        (10, "did you mean 'tokenizer_source'"),
        (12, "did you mean 'normalize'"),
        (13, "unknown operation 'veto'"),
    ]
    for line, part in expected:
        assert any(p.startswith(f"line {line}: ") and part in p for p in found), (line, part, found)


PASS = "merge_method: passthrough\n"
ONE = f"{PASS}models: [{{model: a}}]\n"
LINEAR = "merge_method: linear\nmodels:\n"


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("merge_method: linear\nmodels: []\n", 1, "exactly one of"),
        ("merge_method: linaer\nmodels: [{model: a}]\n", 1, "did you mean 'linear'"),
        ("merge_method: slerp\nmodels: [{model: a}, {model: b}]\nparameters: {t: 1}\n", 2, "needs base_model"),
        ("merge_method: slerp\nbase_model: a\nmodels: [{model: a}]\nparameters: {t: 1}\n", 3, "at least 2"),
        ("merge_method: passthrough\nmodels: [{model: a}, {model: b}]\n", 2, "at most 1"),
        ("merge_method: passthrough\nmodels: [{model: a}]\ndtype: bf16\n", 3, "'bfloat16'"),
        ("merge_method: passthrough\nmodels: [{model: a}]\nmodels: [{model: b}]\n", 3, "given twice"),
        ("merge_method: passthrough\nmodels: [{model: a, mask: {of: [x]}}]\n", 2, "either file: or op:"),
        ("merge_method: passthrough\nmodels: [{model: a, mask: {file: x, on: delta}}]\n", 2, "needs base_model"),
        ("merge_method: masked\nmodels: [{model: a}]\n", 1, "nothing to do"),
        ("merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [3, 1]}]\n", 3, "layer_range"),
        (f"name: x\n{PASS}models: [{{model: y}}]\n---\nname: y\n{PASS}models: [{{model: x}}]\n", 3, "later document"),
        (f"{LINEAR}- {{model: a, parameters: {{weight: [{{filter: q, value: 1}}]}}}}\n", 3, "match no filter"),
        (f"{LINEAR}- {{model: a, parameters: {{weight: 1, normalize: true}}}}\n", 3, "one value for the whole merge"),
        (f"{ONE}masks: {{m: {{op: vote, of: [m, m], sieve: 3}}}}\n", 3, "unknown key 'sieve'"),
        (f"{ONE}mask: {{op: union, of: [x, y], threshold: 2}}\n", 3, "no option 'threshold'"),
        ("a: [\n", 2, "not valid YAML"),
    ],
)  # fmt: skip
def test_problems_in_the_text(text: str, line: int, part: str, tmp_path: Path) -> None:
    found = problems(text, tmp_path, files=False)
    assert any(p.startswith(f"line {line}: ") and part in p for p in found), found


def test_masks_must_fit(kitchen: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    Mask.from_bools({name: np.ones((3, 3), np.bool_)}).save(kitchen / "masks/small.mask")
    Mask.from_bools({"model.layers.9.mlp.up_proj.weight": np.ones((3, 3), np.bool_)}).save(kitchen / "masks/deep.mask")
    text = "merge_method: linear\nmodels:\n- {model: models/math, mask: masks/small.mask, parameters: {weight: 1}}\n"
    found = problems(text + "mask: masks/deep.mask\n", kitchen)
    assert found[0].startswith("line 3: ")
    assert name in found[0]
    assert found[1].startswith("line 4: ")
    assert "layers.9" in found[1]


def test_masks_may_not_refer_to_themselves(kitchen: Path) -> None:
    text = "merge_method: masked\nmodels: [{model: models/math, mask: a}]\nmasks:\n  a: {op: union, of: [b]}\n  b: a\n"
    assert any("itself" in p for p in problems(text, kitchen))


def test_models_must_have_the_same_shapes(kitchen: Path, tiny) -> None:  # type: ignore[no-untyped-def]
    wide = tiny("llama", hidden=128)
    text = f"merge_method: linear\nmodels: [{{model: models/math}}, {{model: {wide}}}]\nparameters: {{weight: 1}}\n"
    assert any("128" in p for p in problems(text, kitchen))


def test_on_is_a_key_not_a_truth_value(kitchen: Path) -> None:
    """YAML 1.1 reads the word `on` as true."""
    (kitchen / "r.yml").write_text(
        "merge_method: masked\nbase_model: models/base\n"
        "models: [{model: models/math, mask: {file: masks/math.mask, on: delta}}]\n"
    )
    mask = load_recipe(kitchen / "r.yml").documents[0].inputs()[0][1].mask
    assert mask is not None
    assert mask.on == "delta"


def test_the_catalogue_says_what_mergekit_declares() -> None:
    """Spot checks of what is read from mergekit's specifications; and every method and parameter is described."""
    ties, slerp = METHODS["ties"], METHODS["slerp"]
    assert (ties.base, ties.inputs, ties.random, ties.ours) == ("required", (1, None), False, False)
    assert ties.parameters["weight"] == Parameter("float", "non_base")
    assert ties.parameters["density"] == Parameter("float", "non_base", 1.0)
    assert ties.parameters["normalize"] == Parameter("bool", "shared", True)
    assert METHODS["passthrough"].parameters["scale"] == Parameter("float", "input", None)
    assert (slerp.base, slerp.inputs, slerp.parameters["t"].default) == ("required", (2, 2), "required")
    assert METHODS["nuslerp"].non_base == (2, 2)
    assert {n for n, m in METHODS.items() if m.random} == {
        "arcee_fusion",
        "dare_ties",
        "dare_linear",
        "della",
        "della_linear",
    }
    assert {n for n, m in METHODS.items() if m.ours} == {"masked", "consensus", "localize_and_stitch", "select", "emr"}
    assert set(METHODS) == set(ABOUT)
    assert all(meaning(name, key) for name, method in METHODS.items() for key in method.parameters)


@pytest.mark.parametrize(
    ("text", "path", "revision", "lora"),
    [
        ("a/b", "a/b", None, None),
        ("a/b@v1", "a/b", "v1", None),
        ("a@1+c/d@2", "a", "1", "c/d"),
        ("/x y", "/x y", None, None),
    ],
)
def test_references(text: str, path: str, revision: str | None, lora: str | None) -> None:
    reference = Reference.model_validate(text)
    assert (reference.path, reference.revision, reference.lora) == (path, revision, lora)
    assert Reference.model_validate(reference.to_mergekit()) == reference


def test_json_schema_names_every_key() -> None:
    schema = json_schema()
    assert {"masks", "mask", "models", "tokenizer_source"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False
    for name, part in schema["$defs"].items():
        body = next((b for b in part.get("anyOf", []) if "properties" in b), part)
        assert body.get("additionalProperties") is False or name == "Reference", name
    assert json.loads((RECIPES / "recipe.schema.json").read_text()) == schema


def test_import_removes_what_mergekit_ignores(kitchen: Path, tmp_path: Path) -> None:
    config = kitchen / "mergekit.yml"
    config.write_text(
        "merge_method: linear # a comment\nfoo: 1\nmodels: [{model: models/math, parameters: {weight: 1, densty: 2}}]\n"
    )
    report = import_recipe(config, folder=tmp_path)
    assert len(report.notes) == 3  # foo, densty, and the path of models/math
    (tmp_path / "r.yml").write_text(report.text)
    assert load_recipe(tmp_path / "r.yml").documents[0].models is not None
    config.write_text("merge_method: linear # a comment\nmodels: [{model: models/math, parameters: {weight: 1}}]\n")
    assert "# a comment" in import_recipe(config).text


def test_dry_run(kitchen: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(kitchen)
    step = plan(RECIPES / "slices_with_masks.yml").steps[0]
    per_layer = 9
    assert step.tensors == 3 + 5 * per_layer
    with pytest.raises(SystemExit) as e:
        main(["build", str(RECIPES / "two_stage.yml"), "--dry-run", "--json"])
    assert e.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert [s["name"] for s in printed["steps"]] == ["experts", "result"]


def test_command_line_errors_are_one_line(kitchen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (kitchen / "r.yml").write_text("merge_method: linaer\nmodels: [{model: models/math}]\n")
    with pytest.raises(SystemExit) as e:
        main(["build", str(kitchen / "r.yml"), "-o", str(kitchen / "never")])
    assert e.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (kitchen / "never").exists()

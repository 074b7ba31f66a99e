"""What a recipe will give is known before a tensor is read: names, shapes, layers, what gets lost, what fails."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from recipe_kitchen import assert_equal, tensors, written
from safetensors.torch import load_file, save_file

from mftmerge.apply import apply_mask
from mftmerge.checkpoint import Checkpoint
from mftmerge.cli.main import main
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.mask import Mask
from mftmerge.recipe.build import build
from mftmerge.recipe.importing import import_recipe
from mftmerge.recipe.load import load_recipe
from mftmerge.recipe.plan import plan
from mftmerge.recipe.settings import BuildSettings

Tiny = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("in_kitchen")


def fault(text: str, folder: Path) -> str:
    with pytest.raises(BadInput) as e:
        load_recipe(written(text, folder / "r.yml"))
    return str(e.value)


def test_merge_keys(kitchen: Path, tmp_path: Path) -> None:
    merged = """
merge_method: linear
models:
  - model: models/math
    parameters: &p {weight: 0.5}
  - model: models/code
    parameters:
      <<: *p
"""
    build(written(merged, tmp_path / "r.yml"), tmp_path / "merged")
    build(written(merged.replace("<<: *p", "weight: 0.5"), tmp_path / "r.yml"), tmp_path / "plain")
    assert_equal(tensors(tmp_path / "merged"), tensors(tmp_path / "plain"))
    over = merged.replace("<<: *p", "weight: 2\n      <<: [*p]")
    documents = load_recipe(written(over, tmp_path / "r.yml")).documents
    assert [m.parameters for _, m in documents[0].inputs()] == [{"weight": 0.5}, {"weight": 2}]
    assert import_recipe(written(merged, tmp_path / "r.yml")).notes == ()


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma3", "llama", "gpt2"])
def test_stacks_have_a_configuration_of_their_depth(architecture: str, tiny: Tiny, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = tmp_path / "model"
    shutil.copytree(tiny(architecture), model)
    config = json.loads((model / "config.json").read_text())
    if "layer_types" in config:  # unlike ones, so that their order shows
        config["layer_types"] = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
        (model / "config.json").write_text(json.dumps(config))
    rows = "".join(f"- sources: [{{model: model, layer_range: {r}}}]\n" for r in ([0, 3], [1, 4]))
    path = written(f"merge_method: passthrough\nslices:\n{rows}", tmp_path / "r.yml")
    assert plan(path).steps[0].tensors == build(path, tmp_path / "out").tensors
    found = AutoConfig.from_pretrained(tmp_path / "out")
    assert found.num_hidden_layers == 6
    if "layer_types" in config:
        assert found.layer_types == [config["layer_types"][i] for i in (0, 1, 2, 1, 2, 3)]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def odd_model(kind: str, path: Path) -> Path:
    """A tiny model of an architecture that mergekit has no definition of."""
    import transformers as tf

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 64, "num_hidden_layers": 4}
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
    config = {
        "smollm3": lambda: tf.SmolLM3Config(**sizes, pad_token_id=0),
        "falcon_h1": lambda: tf.FalconH1Config(**sizes, **mamba, head_dim=8, mamba_n_groups=1),
        "bloom": lambda: tf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=4, n_head=4),
        "jetmoe-like": lambda: tf.Qwen2MoeConfig(
            **sizes, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, decoder_sparse_step=2,
            shared_expert_intermediate_size=16,
        ),
    }[kind]()  # fmt: skip
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["smollm3", "falcon_h1", "bloom"])
@pytest.mark.parametrize("ranges", [([0, 3], [1, 4]), ([0, 2],)])
def test_the_configuration_says_how_deep_a_model_of_no_known_architecture_is(
    kind: str, ranges: tuple[list[int], ...], tmp_path: Path
) -> None:
    """mergekit leaves the old number; transformers then drops the layers above it, or makes some up."""
    from transformers import AutoModelForCausalLM

    odd_model(kind, tmp_path / "model")
    rows = "".join(f"- sources: [{{model: model, layer_range: {r}}}]\n" for r in ranges)
    build(written(f"merge_method: passthrough\nslices:\n{rows}", tmp_path / "r.yml"), tmp_path / "out")
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert model.config.num_hidden_layers == sum(b - a for a, b in ranges)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]


def test_layers_whose_kind_is_a_rule_of_the_configuration_keep_their_places(tmp_path: Path) -> None:
    """Each second layer has experts: another order of layers is a model that no configuration describes."""
    odd_model("jetmoe-like", tmp_path / "model")
    rows = "".join(f"- sources: [{{model: model, layer_range: {r}}}]\n" for r in ([0, 3], [2, 4]))
    text = f"merge_method: passthrough\nslices:\n{rows}"
    assert "line 2: slices: layer 3 of the result is layer 2 of model" in (found := fault(text, tmp_path))
    assert "of another kind (mlp." in found
    in_place = text.replace("[2, 4]", "[3, 4]")
    build(written(in_place, tmp_path / "r.yml"), tmp_path / "out", allow_lost=True)  # mergekit reads no experts of it


def test_lost_tensors_are_refused(tmp_path: Path) -> None:
    """DeepSeek-V3 has no definition in mergekit that lists its experts."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    heads = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": 8, "kv_lora_rank": 8}
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    sizes = {"num_key_value_heads": 2, "intermediate_size": 64, "moe_intermediate_size": 16}
    DeepseekV3ForCausalLM(DeepseekV3Config(**small, **heads, **experts, **sizes)).save_pretrained(tmp_path / "ds")
    for inputs in ("models: [{model: ds}]", "slices: [{sources: [{model: ds, layer_range: [0, 2]}]}]"):
        text = f"merge_method: passthrough\n{inputs}\n"
        message = fault(text, tmp_path)
        assert "line 2: ds: model.layers.1.mlp.experts.0.down_proj.weight and 11 more tensors" in message
        report = build(written(text, tmp_path / "r.yml"), tmp_path / inputs[:6], allow_lost=True)
        assert any("experts" in w for w in report.warnings)
        assert report.tensors == plan(tmp_path / "r.yml", BuildSettings(allow_lost=True)).steps[0].tensors


def test_layers_that_a_recipe_leaves_out_are_not_lost(tmp_path: Path, kitchen: Path) -> None:
    text = (
        f"merge_method: passthrough\nslices: [{{sources: [{{model: {kitchen}/models/math, layer_range: [0, 2]}}]}}]\n"
    )
    assert build(written(text, tmp_path / "r.yml"), tmp_path / "out").warnings == ()


def test_fused_experts_of_a_result_take_masks(tiny: Tiny, tmp_path: Path) -> None:
    a, b = tiny("mixtral", seed=1), tiny("mixtral", seed=2)
    text = f"merge_method: linear\nmodels: [{{model: {a}}}, {{model: {b}}}]\nparameters: {{weight: 1}}\n"
    build(written(text, tmp_path / "r.yml"), tmp_path / "plain")
    checkpoint = Checkpoint.open(tmp_path / "plain")
    name = next(n for n in checkpoint.names if "experts" in n)
    kept = np.random.default_rng(0).random(checkpoint.entry(name).shape) < 0.5
    Mask.from_bools({name: kept}).save(tmp_path / "e.mask")
    build(written(f"{text}mask: e.mask\n", tmp_path / "r.yml"), tmp_path / "built")
    apply_mask(tmp_path / "e.mask", tmp_path / "plain", tmp_path / "applied")
    assert_equal(tensors(tmp_path / "built"), tensors(tmp_path / "applied"))
    own = next(n for n in Checkpoint.open(a).names if "experts" in n)
    Mask.from_bools({own: np.ones(Checkpoint.open(a).entry(own).shape, bool)}).save(tmp_path / "own.mask")
    assert f"line 4: mask own.mask: the result will have no tensor {own!r}" in fault(
        f"{text}mask: own.mask\n", tmp_path
    )


def test_masks_on_results_of_other_shapes(kitchen: Path, tmp_path: Path) -> None:
    """With a tokenizer of its own and with slices, the result's shapes and names are not those of the first input."""
    name = "model.embed_tokens.weight"
    shape = Checkpoint.open(kitchen / "models/math").entry(name).shape
    Mask.from_bools({name: np.ones(shape, bool)}).save(tmp_path / "old.mask")
    Mask.from_bools({name: np.ones((272, shape[1]), bool)}).save(tmp_path / "new.mask")
    Mask.from_bools({"model.layers.5.mlp.up_proj.weight": np.zeros((160, 64), bool)}).save(tmp_path / "deep.mask")
    models = ", ".join(f"{{model: {kitchen}/models/{m}}}" for m in ("math", "code"))
    union = f"merge_method: linear\nmodels: [{models}]\nparameters: {{weight: 1}}\n"
    union += "tokenizer: {source: union, pad_to_multiple_of: 16}\n"
    assert f"line 5: mask old.mask: {name} is {shape}, (272, 64) in the result" in fault(
        f"{union}mask: old.mask\n", tmp_path
    )
    build(written(f"{union}mask: new.mask\n", tmp_path / "r.yml"), tmp_path / "union")
    rows = "".join(f"- sources: [{{model: {kitchen}/models/math, layer_range: {r}}}]\n" for r in ([0, 3], [1, 4]))
    stack = f"merge_method: passthrough\nslices:\n{rows}mask: deep.mask\n"
    build(written(stack, tmp_path / "r.yml"), tmp_path / "stack")
    assert not tensors(tmp_path / "stack")["model.layers.5.mlp.up_proj.weight"].any()


def test_dropped_weights_of_a_result_return_to_values_of_their_shape(kitchen: Path, tmp_path: Path) -> None:
    """A base whose tensor has as many weights in another shape, more rows, or too few layers has no values for them."""
    up, deep = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 5))
    head = "lm_head.weight"
    Mask.from_bools({up: np.eye(160, 64) > 0}).save(tmp_path / "up.mask")
    Mask.from_bools({deep: np.eye(160, 64) > 0}).save(tmp_path / "deep.mask")
    rows = Checkpoint.open(kitchen / "models/math").entry(head).shape[0]
    Mask.from_bools({head: np.eye(rows, 64) > 0}).save(tmp_path / "head.mask")
    turned, longer = tmp_path / "turned", tmp_path / "longer"
    for folder, name, shape in ((turned, up, (64, 160)), (longer, head, (rows + 8, 64))):
        shutil.copytree(kitchen / "models/math", folder)
        changed = load_file(folder / "model.safetensors") | {name: torch.zeros(shape, dtype=torch.bfloat16)}
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
    math = f"{kitchen}/models/math"
    one = f"merge_method: passthrough\nmodels: [{{model: {math}}}]\n"
    parts = ", ".join(f"{{sources: [{{model: {math}, layer_range: {r}}}]}}" for r in ([0, 3], [1, 4]))
    for text, mask, base, said in (
        (one, "up", turned, f"{up} is (160, 64) in the result, (64, 160) in base {turned}"),
        (one, "head", longer, f"{head} is ({rows}, 64) in the result, ({rows + 8}, 64) in base {longer}"),
        (f"merge_method: passthrough\nslices: [{parts}]\n", "deep", math, f"{deep} is (160, 64) in the result, not in"),
    ):
        found = fault(f"{text}mask:\n  file: {mask}.mask\n  on: delta\n  base: {base}\n", tmp_path)
        assert f"r.yml: line 6: mask {mask}.mask: {said}" in found
    Mask.from_bools({head: np.ones((272, 64), bool)}).save(tmp_path / "padded.mask")
    padded = f"merge_method: linear\nbase_model: {math}\nmodels: [{{model: {math}}}]\nparameters: {{weight: 1}}\n"
    padded += "tokenizer: {source: base, pad_to_multiple_of: 16}\nmask: {file: padded.mask, on: delta}\n"
    said = f"line 6: mask padded.mask: {head} is (272, 64) in the result, ({rows}, 64) in base {math}"
    assert said in fault(padded, tmp_path)


def test_dropped_weights_of_a_result_return_to_a_tied_head(kitchen: Path, tmp_path: Path) -> None:
    shutil.copytree(kitchen / "models/base", tmp_path / "tied")
    stored = load_file(tmp_path / "tied/model.safetensors")
    stored.pop("lm_head.weight")
    save_file(stored, tmp_path / "tied/model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "tied/config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "tied/config.json").write_text(json.dumps(config))
    kept = np.random.default_rng(0).random(tuple(stored["model.embed_tokens.weight"].shape)) < 0.5
    Mask.from_bools({"lm_head.weight": kept}).save(tmp_path / "head.mask")
    text = f"merge_method: passthrough\nmodels: [{{model: {kitchen}/models/math}}]\n"
    build(written(f"{text}mask: {{file: head.mask, on: delta, base: tied}}\n", tmp_path / "r.yml"), tmp_path / "out")
    own, tied = tensors(kitchen / "models/math")["lm_head.weight"], tensors(tmp_path / "tied")
    expected = np.where(kept, own, tied["model.embed_tokens.weight"])
    assert np.array_equal(tensors(tmp_path / "out")["lm_head.weight"], expected)


def test_dropped_weights_of_a_result_return_to_fused_experts(tiny: Tiny, tmp_path: Path) -> None:
    a, b = tiny("mixtral", seed=1), tiny("mixtral", seed=2)
    for model in (a, b):
        build(
            written(f"merge_method: passthrough\nmodels: [{{model: {model}}}]\n", tmp_path / "r.yml"),
            tmp_path / model.parent.name,
        )
    fused = Checkpoint.open(tmp_path / b.parent.name)
    name = next(n for n in fused.names if "experts.gate_up" in n)
    assert name not in Checkpoint.open(b)
    kept = np.random.default_rng(0).random(fused.entry(name).shape) < 0.5
    Mask.from_bools({name: kept}).save(tmp_path / "e.mask")
    text = f"merge_method: passthrough\nmodels: [{{model: {a}}}]\nmask: {{file: e.mask, on: delta, base: {b}}}\n"
    build(written(text, tmp_path / "r.yml"), tmp_path / "out")
    expected = np.where(kept, tensors(tmp_path / a.parent.name)[name], tensors(fused.path)[name])
    assert np.array_equal(tensors(tmp_path / "out")[name], expected)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ("mask: absent.mask", "mask absent.mask: no mask file 'absent.mask'"),
        ("mask: {op: vote, of: [M, absent.mask]}", "no mask file 'absent.mask'"),
        ("mask: {op: vote, of: [M, M], threshold: 5}", "threshold 5 is above the number of masks, 2"),
        ("mask: {file: absent.mask, on: delta, base: MATH}", "no mask file 'absent.mask'"),
        ("mask: x\nmasks: {x: {op: union, of: [x]}}", "mask x: masks: x -> x refers to itself"),
    ],
)
def test_a_faulty_mask_on_the_result_hides_no_other_problem(
    mask: str, said: str, kitchen: Path, tmp_path: Path
) -> None:
    mask = mask.replace("MATH", f"{kitchen}/models/math").replace("M,", f"{kitchen}/masks/math.mask,")
    mask = mask.replace("M]", f"{kitchen}/masks/math.mask]")
    text = f"merge_method: linear\nmodels:\n- {{model: {kitchen}/models/math, mask: missing.mask}}\n"
    found = fault(f"{text}parameters: {{weight: 1}}\n{mask}\n", tmp_path)
    assert "line 3: mask missing.mask: no mask file 'missing.mask'" in found
    assert said in found.partition("line 5: ")[2]


@pytest.mark.parametrize("method", ["select", "localize_and_stitch"])
def test_a_faulty_mask_that_a_method_takes_hides_no_other_problem(method: str, kitchen: Path, tmp_path: Path) -> None:
    models = "".join(f"- {{model: {kitchen}/models/{m}, mask: {m}-absent.mask}}\n" for m in ("math", "code"))
    found = fault(f"merge_method: {method}\nbase_model: {kitchen}/models/base\nmodels:\n{models}", tmp_path)
    assert "line 4: mask math-absent.mask: no mask file" in found
    assert "line 5: mask code-absent.mask: no mask file" in found


def test_an_unknown_method_hides_no_fault_of_a_mask(kitchen: Path, tmp_path: Path) -> None:
    one = f"{{model: {kitchen}/models/math, mask: {kitchen}/masks/math.mask}}"
    found = fault(f"merge_method: linaer\nmodels:\n- {one}\nmask: absent.mask\n", tmp_path)
    assert "line 1: unknown merge method 'linaer'; did you mean 'linear'?" in found
    assert "line 4: mask absent.mask: no mask file" in found


def test_masks_that_parameters_name(kitchen: Path, tmp_path: Path) -> None:
    """They are looked up beside the recipe, and checked before anything is built, as those under `mask:`."""
    name = "model.layers.0.mlp.up_proj.weight"
    Mask.from_bools({name: np.eye(160, 64) > 0}).save(tmp_path / "own.mask")
    Mask.from_bools({name: np.eye(64, 160) > 0}).save(tmp_path / "turned.mask")
    (tmp_path / "broken.mask").write_bytes(b"no mask")
    math, base = f"{kitchen}/models/math", f"{kitchen}/models/base"
    masked = f"merge_method: masked\nmodels: [{{model: {math}}}]\nparameters:\n  mask: FILE\n"
    selected = f"merge_method: select\nbase_model: {base}\nmodels:\n- model: {math}\n  parameters:\n"
    selected += "    mask: [{filter: up_proj, value: FILE}, {value: own.mask}]\n"
    for text, line, method in ((masked, 4, "masked"), (selected, 6, "select")):
        for file, said in (
            ("absent.mask", "mask absent.mask: no mask file"),
            ("broken.mask", "mask broken.mask: "),
            ("turned.mask", f"mask turned.mask: {name} is (64, 160), (160, 64) in the result"),
        ):
            assert f"line {line}: {said}" in fault(text.replace("FILE", file), tmp_path)
        build(written(text.replace("FILE", "own.mask"), tmp_path / "r.yml"), tmp_path / f"parameter-{method}")
    plain = f"merge_method: masked\nmodels: [{{model: {math}, mask: own.mask}}]\n"
    build(written(plain, tmp_path / "r.yml"), tmp_path / "plain-masked")
    plain = f"merge_method: select\nbase_model: {base}\nmodels: [{{model: {math}, mask: own.mask}}]\n"
    build(written(plain, tmp_path / "r.yml"), tmp_path / "plain-select")
    for method in ("masked", "select"):
        assert_equal(tensors(tmp_path / f"parameter-{method}"), tensors(tmp_path / f"plain-{method}"))


def test_masks_on_stages_are_checked_before_anything_is_built(kitchen: Path, tmp_path: Path) -> None:
    Mask.from_bools({"model.layers.7.mlp.up_proj.weight": np.zeros((160, 64), bool)}).save(tmp_path / "m.mask")
    text = (
        f"name: a\nmerge_method: passthrough\nmodels: [{{model: {kitchen}/models/math}}]\n---\n"
        "merge_method: passthrough\nmodels: [{model: a, mask: m.mask}]\n"
    )
    assert "line 6: mask m.mask: a:" in fault(text, tmp_path)


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("slices: [{sources: [{model: MATH, layer_range: [0, 9]}]}]", 2, "ends at 9"),
        ("slices:\n- sources: [{model: MATH, layer_range: [0, 2]}]\n- sources: [{model: NARROW, layer_range: [2, 4]}]",
         4, "hidden size 32"),
        ("models: [{model: QUANTISED}]", 2, "quantised (bitsandbytes)"),
        ("models: [{model: ADAPTER}]", 2, "is an adapter"),
        ("models: [{model: absent/one, mask: no.mask, parameters: 3}]", 2, "absent/one"),
        ("models: [{model: MATH, mask: no.mask, parameters: 3}]", 2, "no mask file 'no.mask'"),
        ("models: [{model: MATH}]\nselect_topk: 0.1", 3, "belongs under parameters"),
        ("models: [{model: MATH, mask: 'hf://a/b/c.mask'}]", 2, "cannot be had from the Hub"),
        ("models: [{model: gpt2}]", 2, "hub"),
        ("models: [{model: MATH}]\nchat_template: chatlm", 3, "did you mean 'chatml'"),
        ("modules: {vision: {models: [{model: MATH}]}}", 2, "have no module 'vision'"),
        ("models: [{model: MATH}]\ntokenizer: {source: union, tokens: {x: {source: no/x}}}", 3, "no model 'no/x'"),
        ("slices: [{sources: [{model: MATH, layer_range: [3]}]}]", 2, "two whole numbers"),
    ],
)  # fmt: skip
def test_faults_in_files(text: str, line: int, part: str, kitchen: Path, tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(kitchen / "models/math", tmp_path / "quantised")
    config = json.loads((tmp_path / "quantised/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (tmp_path / "quantised/config.json").write_text(json.dumps(config))
    for name, path in {
        "MATH": kitchen / "models/math",
        "ADAPTER": kitchen / "models/adapter",
        "QUANTISED": tmp_path / "quantised",
        "NARROW": tiny("llama", hidden=32),
    }.items():
        text = text.replace(name, str(path))
    message = fault(f"merge_method: passthrough\n{text}\n", tmp_path)
    assert f"line {line}: " in message
    assert part in message
    assert "Tuple should" not in message


def test_models_of_other_depth_and_architecture(kitchen: Path, tiny: Tiny, tmp_path: Path) -> None:
    def two(other: Path) -> str:
        models = f"models:\n- model: {kitchen}/models/math\n- model: {other}\n"
        return f"merge_method: linear\n{models}parameters: {{weight: 1}}\n"

    assert "line 4: " in (deep := fault(two(tiny("llama", layers=6)), tmp_path))
    assert "has 6 layers" in deep
    assert "allow_crimes=True" in fault(two(tiny("qwen2", hidden=64)), tmp_path)


@pytest.mark.parametrize(
    ("own", "shared", "said"),
    [
        ("density: 0.9", "", "epsilon 0.15 is too large for density 0.9"),
        ("density: [0.5, 0.9]", "", "density 0.9"),
        ("density: [{filter: mlp, value: 0.5}, {value: 0.1}]", "", "density 0.1"),
        ("density: 0.5", "epsilon: 0.6", "epsilon 0.6"),
    ],
)
def test_della_s_probabilities_lie_between_0_and_1(own: str, shared: str, said: str, tmp_path: Path) -> None:
    text = "merge_method: della\nbase_model: models/base\n"
    text += f"models: [{{model: models/math, parameters: {{weight: 1, {own}}}}}]\nparameters: {{{shared}}}\n"
    found = fault(text, tmp_path)
    assert "line 3: " in found
    assert said in found


@pytest.mark.parametrize(
    ("name", "value"), [("density", 53), ("density", -0.1), ("lambda", ".inf"), ("weight", ".nan")]
)
def test_numbers_out_of_range_are_said(name: str, value: float | str, tmp_path: Path) -> None:
    text = "merge_method: ties\nbase_model: models/base\nmodels:\n- model: models/math\n"
    text += f"  parameters: {{weight: 1}}\nparameters: {{{name}: {value}}}\n"
    warnings = load_recipe(written(text, tmp_path / "r.yml")).warnings
    said = "is not a finite number" if isinstance(value, str) else "is out of range"
    assert any(w.startswith(f"line 6: {name} {str(value).removeprefix('.')} {said}") for w in warnings), warnings


def test_what_is_not_finite_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "merge_method: linear\nmodels:\n" + "".join(
        f"- {{model: models/{m}, parameters: {{weight: {w}}}}}\n" for m, w in (("math", 1), ("code", -1))
    )
    path = written(text, tmp_path / "r.yml")
    with pytest.raises(SystemExit) as e:
        main(["build", str(path), "-o", str(tmp_path / "out")])
    assert e.value.code == 0
    said = capsys.readouterr()
    assert "line 2: the weights sum to 0" in said.err
    assert "weights are not finite" in said.out
    with pytest.raises(MftmergeError, match="not finite"):
        build(path, tmp_path / "refused", require_finite=True)
    assert not (tmp_path / "refused").exists()


def test_generation_config_comes_along_with_a_new_tokenizer(
    kitchen: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(kitchen / "models/math", tmp_path / "a")
    (tmp_path / "a/generation_config.json").write_text('{"temperature": 0.3, "do_sample": true}\n')
    text = f"merge_method: linear\nmodels: [{{model: a}}, {{model: {kitchen}/models/code}}]\n"
    build(
        written(f"{text}parameters: {{weight: 1}}\ntokenizer: {{source: union}}\n", tmp_path / "r.yml"),
        tmp_path / "out",
    )
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["temperature"] == 0.3
    assert "permutations" not in capfd.readouterr().err, "mergekit's bars are not ours"


def test_masks_over_pickled_weights_and_over_adapters_in_slices(kitchen: Path, tmp_path: Path) -> None:
    import torch
    from mergekit.common import ModelReference
    from safetensors.torch import load_file

    shutil.copytree(kitchen / "models/math", tmp_path / "bin")
    torch.save(load_file(tmp_path / "bin/model.safetensors"), tmp_path / "bin/pytorch_model.bin")
    (tmp_path / "bin/model.safetensors").unlink()
    mask = kitchen / "masks/math.mask"
    text = f"merge_method: passthrough\nmodels: [{{model: bin, mask: {mask}}}]\n"
    build(written(text, tmp_path / "r.yml"), tmp_path / "built")
    apply_mask(mask, kitchen / "models/math", tmp_path / "applied")
    assert_equal(tensors(tmp_path / "built"), tensors(tmp_path / "applied"))
    assert "line 2: mask small.mask" in fault(text.replace(str(mask), str(small(tmp_path))), tmp_path)

    base, adapter = kitchen / "models/base", kitchen / "models/adapter"
    source = f"{{model: {base}+{adapter}, layer_range: [1, 3], mask: {mask}}}"
    text = f"merge_method: passthrough\nslices: [{{sources: [{source}]}}]\n"
    build(written(text, tmp_path / "r.yml"), tmp_path / "slice")
    merged = ModelReference.model_validate(f"{base}+{adapter}").merged(cache_dir=str(tmp_path / "lora"))
    apply_mask(mask, merged.model.path, tmp_path / "whole")
    name, found, expected = (
        "model.layers.{}.mlp.down_proj.weight",
        tensors(tmp_path / "slice"),
        tensors(tmp_path / "whole"),
    )
    for i in (0, 1):
        assert np.array_equal(found[name.format(i)], expected[name.format(i + 1)])


@pytest.mark.parametrize("lazy", [False, True])
def test_pickled_weights_are_opened_lazily_where_that_is_asked_for_and_by_one_thread_alone(
    kitchen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lazy: bool
) -> None:
    import torch
    from mergekit.io import loader
    from safetensors.torch import load_file

    for name in ("math", "code"):
        shutil.copytree(kitchen / "models" / name, tmp_path / name)
        torch.save(load_file(tmp_path / name / "model.safetensors"), tmp_path / name / "pytorch_model.bin")
        (tmp_path / name / "model.safetensors").unlink()
    inside, most = [], []
    original, register = loader.torch_lazy_load, torch.nn.Module.register_parameter

    @contextmanager
    def watched() -> Iterator[None]:
        inside.append(1)
        most.append(len(inside))
        with original():
            time.sleep(0.01)  # the other threads come meanwhile, if there are any
            yield
        inside.pop()

    monkeypatch.setattr(loader, "torch_lazy_load", watched)
    mask = kitchen / "masks/math.mask"
    head, tail = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: math, mask: ", "}, {model: code}]\n"
    build(written(f"{head}{mask}{tail}", tmp_path / "r.yml"), tmp_path / "out", lazy_unpickle=lazy, num_threads=4)
    assert set(most) == ({1} if lazy else set())
    assert torch.nn.Module.register_parameter is register
    for name in ("math", "code"):
        shutil.rmtree(tmp_path / name)
        shutil.copytree(kitchen / "models" / name, tmp_path / name)
    build(tmp_path / "r.yml", tmp_path / "plain")
    assert_equal(tensors(tmp_path / "out"), tensors(tmp_path / "plain"))


def small(folder: Path) -> Path:
    path = folder / "small.mask"
    Mask.from_bools({"model.layers.0.mlp.up_proj.weight": np.ones((3, 3), bool)}).save(path)
    return path


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path: Path) -> None:
    text = "merge_method: linear\nmodels:\n  - {model: models/math, parameters: {weight: 1}}\n"
    found = import_recipe(written("\ufeff" + text, tmp_path / "r.yml"))
    assert "\ufeff" not in found.text
    assert load_recipe(written(found.text, tmp_path / "r.yml")).documents[0].merge_method == "linear"


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", '{"model_type": "llama", "hidden_size": "x"}', "line 3: .*config.json: .*hidden_size"),
        (
            "tokenizer.json",
            "version https://git-lfs.github.com/spec/v1\n",
            "line 3: .*tokenizer.json: a Git LFS pointer",
        ),
        ("pytorch_model.bin", "cos\nsystem\n(S'touch run'\ntR.", "line 3: .*pickled weights cannot be read"),
    ],
)
def test_a_model_s_own_files_are_read_before_anything_is_merged(
    file: str, content: str, said: str, kitchen: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(kitchen / "models/math", model)
    (model / file).write_text(content)
    if file.endswith(".bin"):
        (model / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=said):
        load_recipe(written("merge_method: passthrough\nmodels:\n  - model: model\n", tmp_path / "r.yml"))


def test_import_keeps_comments(tmp_path: Path) -> None:
    text = """\
# what it is for
merge_method: linear
models:
  - model: models/math  # the first
    colour: red
  - {model: models/code, colour: blue}
parameters:
  weight: 1
  wait: 2
tokenizer_source: model:models/math
"""
    report = import_recipe(written(text, tmp_path / "r.yml"))
    assert "# what it is for" in report.text
    assert "# the first" in report.text
    assert "colour" not in report.text
    assert yaml.safe_load(report.text) == {
        "merge_method": "linear",
        "models": [{"model": "models/math"}, {"model": "models/code"}],
        "parameters": {"weight": 1},
        "tokenizer_source": "models/math",
    }
    assert [n.split(":")[0] for n in report.notes] == ["line 5", "line 6", "line 9", "line 10"]


def test_import_removes_what_mergekit_ignores_in_a_rule(tmp_path: Path) -> None:
    text = """
merge_method: linear
models:
  - model: models/math
    parameters:
      weight:
        - filter: mlp  # the first
          value: 1
          note: strong
        - {value: 2, note: weak}
parameters:
  normalize: {value: true, note: all}
"""
    report = import_recipe(written(text, tmp_path / "r.yml"))
    assert "# the first" in report.text
    found = yaml.safe_load(report.text)
    assert found["models"][0]["parameters"]["weight"] == [{"filter": "mlp", "value": 1}, {"value": 2}]
    assert found["parameters"] == {"normalize": {"value": True}}
    assert sorted(n.split(":")[0] for n in report.notes) == ["line 10", "line 12", "line 9"]


@pytest.mark.parametrize("value", ["{value: 1}", "[{value: 1}]", "[1, [2]]", "[]", "[null]"])
def test_what_a_rule_gives_is_a_number_or_numbers(tmp_path: Path, value: str) -> None:
    text = f"merge_method: linear\nmodels:\n- model: a\n  parameters:\n    weight:\n    - value: {value}\n"
    assert "value: is a number or a list of numbers" in fault(text, tmp_path)


@pytest.mark.parametrize(("key", "tool"), [("experts", "mergekit-moe"), ("genome", "mergekit-evolve")])
def test_files_of_other_tools_are_named(key: str, tool: str, tmp_path: Path) -> None:
    text = f"base_model: a\n{key}: []\n"
    assert f"line 2: {key}: this is a file for {tool}" in fault(text, tmp_path)
    with pytest.raises(BadInput, match=f"line 2: {key}: this is a file for {tool}"):
        import_recipe(written(text, tmp_path / "r.yml"))
    assert "a recipe is a mapping" in fault("- merge_method: linear\n", tmp_path)


def test_mergekit_s_options_have_its_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["build", "--help"])
    shown = capsys.readouterr().out
    for option in ("allow-crimes", "trust-remote-code", "out-shard-size", "lora-merge-dtype", "lazy-unpickle", "cuda"):
        assert f"--{option}" in shown
    for option in ("num-threads", "random-seed", "copy-tokenizer", "lora-merge-cache"):
        assert f"--{option}" in shown

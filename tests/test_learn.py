"""Merges that are learnt: the method against autograd, the built model against the validated one, what is refused."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.experts import domain_rows, make_experts, open_recipe
from helpers.tiny_models import tiny_checkpoint
from recipe_kitchen import assert_equal, stock, values
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mftmerge.checkpoint import Checkpoint
from mftmerge.cli.main import main
from mftmerge.errors import BadInput
from mftmerge.learn.domains import ANSWERS, DIVERGENCE, answer, disagreement
from mftmerge.learn.merging import ranks
from mftmerge.learn.run import LearnResult, _checked, _Run, learn_merge
from mftmerge.learn.settings import LearnSettings
from mftmerge.loading import load_model
from mftmerge.mask import Mask
from mftmerge.recipe.build import build
from mftmerge.recipe.export import export
from mftmerge.recipe.parents import parents


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`kitchen(architecture, ...)` gives a folder of experts, made once. Read only."""
    made: dict[tuple[object, ...], Path] = {}

    def make(architecture: str = "llama", **options: Any) -> Path:
        key = (architecture, *sorted(options.items()))
        if key not in made:
            made[key] = make_experts(tmp_path_factory.mktemp("experts") / "kitchen", architecture, **options)
        return made[key]

    return make


def learnt(recipe: Path, work: Path, **settings: Any) -> tuple[LearnResult, dict[str, np.ndarray]]:
    """The result of a run and the values of the model that it validated last, by checkpoint name."""
    work.mkdir()
    chosen = LearnSettings.make({"steps": 4} | settings)
    run = _Run(_checked(recipe, work, chosen), work, chosen, {}, lambda _: None, None)
    result = run.learn(None, None)
    found = {}
    for name, p in run.holders.parameters.items():
        found |= run.holders.split(name, p.detach())
    return result, {n: t.float().numpy() for n, t in found.items()}


def written(result: LearnResult, folder: Path) -> Path:
    folder.mkdir()
    for name, mask in result.masks.items():
        mask.save(folder / f"{name}.mask")
    (folder / "recipe.yml").write_text(result.recipe)
    return folder / "recipe.yml"


CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    # method, architecture, how the experts are made, what else the recipe says
    ("task_arithmetic", "llama", {}, {}),
    ("task_arithmetic", "llama", {"dtype": "bfloat16", "layers": ()}, {}),
    ("task_arithmetic", "llama", {"dtype": "bfloat16", "layers": ()}, {"dtype": "float32", "out_dtype": "bfloat16"}),
    ("task_arithmetic", "qwen2", {"layers": ()}, {"parameters": {"lambda": 0.7, "normalize": True}}),
    ("task_arithmetic", "mixtral", {"names": ("count", "letters")}, {}),
    ("task_arithmetic", "gpt2", {"names": ("count", "letters"), "layers": ()}, {}),
    ("select", "llama", {"dtype": "bfloat16", "layers": ()}, {}),
    ("select", "mixtral", {"names": ("count", "letters")}, {}),
]


@pytest.mark.parametrize(("method", "architecture", "made", "also"), CASES)
def test_the_built_model_is_the_validated_one(
    method: str,
    architecture: str,
    made: dict[str, Any],
    also: dict[str, Any],
    kitchen: Callable[..., Path],
    tmp_path: Path,
) -> None:
    recipe = open_recipe(kitchen(architecture, **made), method=method, **also)
    result, validated = learnt(recipe, tmp_path / "work", eval_share=0)  # the last state is what is written
    assert not result.domains
    plain = written(result, tmp_path / "out")
    build(plain, tmp_path / "built")
    assert_equal(values(tmp_path / "built"), {n: validated[n] for n in Checkpoint.open(tmp_path / "built").names})
    report = export(plain, tmp_path / "exported")
    run = yaml.safe_load(report.config.read_text())
    assert_equal(values(stock(run, tmp_path / "stock")), values(tmp_path / "built"))


def test_a_wider_live_model_is_rounded_as_the_file_is(kitchen: Callable[..., Path], tmp_path: Path) -> None:
    """As where the processor has no bfloat16 arithmetic: what is validated is what is built."""
    also = {"dtype": "float32", "out_dtype": "bfloat16"}
    recipe = open_recipe(kitchen("llama", dtype="bfloat16", layers=()), **also)
    result, validated = learnt(recipe, tmp_path / "work", eval_share=0, dtype="float32")
    build(written(result, tmp_path / "out"), tmp_path / "built")
    assert_equal(values(tmp_path / "built"), {n: validated[n] for n in Checkpoint.open(tmp_path / "built").names})


def test_tied_tensors_that_are_stored_twice_have_one_mask(kitchen: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "kitchen"
    shutil.copytree(kitchen("qwen2", layers=()), folder)
    for name in ("base", "count", "letters", "say"):
        path = folder / name / "model.safetensors"
        tensors = load_file(path)
        save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    result, validated = learnt(open_recipe(folder), tmp_path / "work", eval_share=0)
    mask = result.masks["count"]
    np.testing.assert_array_equal(mask.kept("lm_head.weight"), mask.kept("model.embed_tokens.weight"))
    build(written(result, tmp_path / "out"), tmp_path / "built")
    found = values(tmp_path / "built")
    np.testing.assert_array_equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], validated["model.embed_tokens.weight"])


def test_each_selected_weight_is_one_parents_bits(kitchen: Callable[..., Path], tmp_path: Path) -> None:
    folder = kitchen(dtype="bfloat16", layers=())
    result, _ = learnt(open_recipe(folder, method="select"), tmp_path / "work")
    build(written(result, tmp_path / "out"), tmp_path / "built")
    built, base = Checkpoint.open(tmp_path / "built"), Checkpoint.open(folder / "base")
    experts = {name: Checkpoint.open(folder / name) for name in result.masks}
    for name in built.names:
        expected, owners = base.read(name).copy(), np.zeros(base.read(name).shape, int)
        for expert, mask in result.masks.items():
            kept = mask.kept(name) if name in mask else np.zeros(owners.shape, bool)
            owners += kept
            expected[kept] = experts[expert].read(name)[kept]
        assert owners.max() <= 1
        np.testing.assert_array_equal(built.read(name), expected)


@pytest.mark.parametrize(("teacher", "base_kl"), [("expert", 0), ("answers", 0), ("both", 0), ("answers", 0.7)])
def test_scores_follow_the_gradient_of_the_merge_by_autograd(
    kitchen: Callable[..., Path], tmp_path: Path, teacher: str, base_kl: float
) -> None:
    """One step: each score moves by the rate against the sign of dL/dM, with M a factor in the merge."""
    folder = kitchen()
    recipe = open_recipe(folder)
    work = tmp_path / "work"
    work.mkdir()
    chosen = LearnSettings.make(
        {"steps": 1, "scores": True, "eval_share": 0, "batch_size": 20, "lr": 0.01, "teacher_top": 1000}
        | {"teacher": teacher, "base_kl": base_kl}
    )
    run = _Run(_checked(recipe, work, chosen), work, chosen, {}, lambda _: None, None)
    result = run.learn(None, None)
    name = "model.layers.3.mlp.up_proj.weight"
    base, part = run.parts[name].base, run.parts[name]
    factors = torch.stack([torch.from_numpy(m.initial_scores(name) > 0).float() for m in result.masks.values()])
    factors.requires_grad_(True)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    merged = {
        n: p.base
        + sum(torch.from_numpy(m.initial_scores(n) > 0) * p.change(k) for k, m in enumerate(result.masks.values()))
        for n, p in run.parts.items()
    }
    merged[name] = base + sum(factors[k] * part.change(k) for k in range(3))
    total = torch.zeros(())
    assert [len(d.scales) for d in run.domains] == [2 if teacher == "both" else 1] * 3
    for domain in run.domains:
        losses: dict[int, list[torch.Tensor]] = {column: [] for column in domain.scales}
        apart: list[torch.Tensor] = []
        for row, told in zip_longest(domain.train, domain.told):
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            wanted = labels[0, 1:] != -100
            everywhere = torch.func.functional_call(model, merged, (ids,)).logits[0, :-1].log_softmax(-1)
            with torch.no_grad():
                own = model(ids).logits[0, :-1].log_softmax(-1)
            apart.append((own.exp() * (own - everywhere)).sum(-1)[~wanted])
            logits = everywhere[wanted]
            if ANSWERS in losses:
                losses[ANSWERS].append(-logits.gather(1, labels[0, 1:][wanted][:, None])[:, 0])
            if DIVERGENCE in losses:
                full = torch.full_like(logits, -torch.inf).scatter(1, told.likely.long(), told.logs)
                share = full.exp()
                losses[DIVERGENCE].append(torch.where(share > 0, share * (full - logits), 0).sum(-1))
        total = total + sum(torch.cat(found).mean() / domain.scales[column] / 3 for column, found in losses.items())
        total = total + base_kl * torch.cat(apart).mean() / 3
    (gradient,) = torch.autograd.grad(total, factors)
    for k, mask in enumerate(result.masks.values()):
        moved = torch.from_numpy(mask.scores(name) - mask.initial_scores(name))
        clear = gradient[k].abs() > 1e-3 * gradient[k].abs().max()
        assert clear.float().mean() > 0.5
        torch.testing.assert_close(moved[clear], -0.01 * gradient[k][clear].sign(), atol=2e-5, rtol=0)


def test_divergence_is_the_whole_one_over_the_whole_vocabulary_and_a_bound_below() -> None:
    generator = torch.Generator().manual_seed(0)
    expert = torch.randn(300, 40, generator=generator).mul(3).log_softmax(-1)
    logits = torch.randn(300, 40, generator=generator)
    whole = (expert.exp() * (expert - logits.log_softmax(-1))).sum(-1)
    best = expert.topk(40)
    torch.testing.assert_close(disagreement(logits, best.indices.int(), best.values), whole, atol=1e-5, rtol=1e-5)
    before = torch.zeros(300)
    for top in (1, 5, 20, 39):
        some = expert.topk(top)
        found = disagreement(logits, some.indices.int(), some.values)
        assert (found >= before - 1e-5).all()
        assert (found <= whole + 1e-5).all()
        before = found
    exact = expert.topk(39)
    same = disagreement(expert, exact.indices.int(), exact.values)
    torch.testing.assert_close(same, torch.zeros(300), atol=1e-5, rtol=0)


def test_ranks_are_those_among_the_changes() -> None:
    found = ranks(torch.tensor([[0.0, -3.0, 1.0], [0.0, 1.0, 2.0]]))
    assert found.tolist() == [[-torch.inf, 1.0, 0.25], [-torch.inf, 0.5, 0.75]]


def test_masks_and_recipe_are_written_and_say_where_they_are_from(kitchen: Callable[..., Path], tmp_path: Path) -> None:
    folder = kitchen()
    out = tmp_path / "out"
    result = learn_merge(open_recipe(folder), out, steps=3, scores=True)
    assert sorted(p.name for p in out.iterdir()) == ["count.mask", "letters.mask", "recipe.yml", "say.mask"]
    base = Checkpoint.open(folder / "base")
    for name in ("count", "letters", "say"):
        mask, expert = Mask.load(out / f"{name}.mask"), Checkpoint.open(folder / name)
        assert mask.digest == result.masks[name].digest
        assert mask.info.on == "delta"
        assert mask.info.delta_base == str(folder / "base")
        assert mask.info.training["together"] == ["count", "letters", "say"]
        for n in mask.names:
            assert mask.info.fingerprints[n] == expert.fingerprint(n)
            assert mask.info.delta_fingerprints[n] == base.fingerprint(n)
            np.testing.assert_array_equal(mask.kept(n), mask.scores(n) > 0)
    assert result.domains.keys() == {"count", "letters", "say"}


def test_questions_that_pass_the_models_positions_are_said(kitchen: Callable[..., Path]) -> None:
    model, tokenizer = load_model(kitchen() / "base")
    with pytest.raises(BadInput, match="lower answer_tokens"):
        answer(model, tokenizer, [{"input_ids": [5, 6], "labels": []}], LearnSettings.make({"answer_tokens": 100_000}))


def test_rows_decide_how_long_and_from_whom_it_is_learnt() -> None:
    def settled(rows: int, answered: bool, **given: Any) -> tuple[int | None, str]:
        found = LearnSettings.make(given).settled(rows, answered)
        return found.steps, found.teacher

    assert settled(10, True) == (20, "expert"), "few answers would be learnt by heart"
    assert settled(30, True) == (20, "both"), "from which the expert keeps them"
    assert settled(30, False) == (20, "expert")
    assert settled(60, True) == (36, "answers")
    assert settled(1000, False) == (60, "expert"), "a row without an answer has only its expert to learn from"
    assert settled(1000, True, teacher="expert", steps=5) == (5, "expert")
    assert settled(10, True, teacher="answers")[1] == "answers"


def test_the_loss_stands_beside_the_base_s(kitchen: Callable[..., Path]) -> None:
    """Of answers it is the loss over an expert's gain, of which the base's is not 1."""
    said: list[str] = []
    result = learn_merge(open_recipe(kitchen()), steps=2, teacher="answers", note=said.append)
    found = re.fullmatch(r".*validation loss over gain (.*); at step 0 (.*), the base's (.*)\)", said[-1])
    assert found is not None, said[-1]
    best, first, base = map(float, found.groups())
    losses = [d["loss"] for d in result.domains.values()]
    assert base == pytest.approx(np.mean([x["base"] / (x["base"] - x["expert"]) for x in losses]), rel=0.5)
    assert best <= first < base


def test_rows_without_a_prompt_stand_beside_others(kitchen: Callable[..., Path]) -> None:
    """Where there is no prompt, nothing holds the merge to the base."""
    folder = kitchen()
    names = ("count", "say")
    models = [
        {"model": str(folder / n), "parameters": {"weight": 1.0}, "mask": {"learn": {"data": "-"}}} for n in names
    ]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(folder / "base"), "models": models}
    text = [{"text": f"{r['prompt']}{r['completion']}"} for r in domain_rows("say")[:12]]
    for say in (text, [*text[:6], *domain_rows("say")[6:12]]):
        rows = {str(folder / "count"): domain_rows("count")[:12], str(folder / "say"): say}
        held = learn_merge(recipe, data=rows, steps=4, seed=1)
        free = learn_merge(recipe, data=rows, steps=4, seed=1, base_kl=0)
        assert any(held.masks["count"].digest != m.digest for m in free.masks.values())


def test_a_density_is_exact(kitchen: Callable[..., Path]) -> None:
    result = learn_merge(open_recipe(kitchen()), steps=2, density=0.3)
    for mask in result.masks.values():
        assert all(mask.count(n) == mask.size(n) - int(0.7 * mask.size(n)) for n in mask.names)


def test_rows_in_memory_and_a_recipe_as_a_mapping(kitchen: Callable[..., Path]) -> None:
    folder = kitchen()
    models = [
        {"model": str(folder / n), "parameters": {"weight": 1.0}, "mask": {"learn": {"data": "-"}}}
        for n in ("count", "say")
    ]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(folder / "base"), "models": models}
    rows = {str(folder / n): domain_rows(n)[:12] for n in ("count", "say")}
    result = learn_merge(recipe, data=rows, steps=2)
    assert list(result.masks) == ["count", "say"]
    assert result.settings.steps == 2


# -- what is refused, in one line -------------------------------------------------------------------------------------


def changed_recipe(folder: Path, here: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The recipe of `folder` with absolute paths, changed, in another directory."""
    data = yaml.safe_load(open_recipe(folder).read_text())
    data["base_model"] = str(folder / "base")
    for entry in data["models"]:
        entry["model"] = str(folder / entry["model"])
        entry["mask"]["learn"]["data"] = str(folder / entry["mask"]["learn"]["data"])
    change(data)
    path = here / "recipe.yml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["models"][0].update(model=d["base_model"]), "over the base itself"),
        (lambda d: d["models"][0]["mask"]["learn"].update(rows=1000), "rows: 1000 are asked for, its data has 40"),
        (lambda d: d["models"][0]["mask"]["learn"].update(rows=1), "one row is too few"),
        (lambda d: d["models"][0]["mask"]["learn"].update(data="absent.jsonl"), "absent.jsonl"),
        (lambda d: d["models"][0]["mask"]["learn"].pop("data"), "models.0.mask.learn.data: is missing"),
        (lambda d: d["models"][0]["mask"].update(file="x.mask"), "file: has no place beside learn:"),
        (lambda d: d["models"][0]["mask"].update(on="weights"), "keeps changes: leave on: out"),
        (lambda d: d["models"][0]["mask"].update(base="b"), "base: has no place beside learn:"),
        (lambda d: d.update(merge_method="ties"), "ties cannot take a mask that is to be learnt"),
        (lambda d: d.update(mask="x.mask"), "whose result has none"),
        (lambda d: d.update(tokenizer_source="union"), "over one vocabulary"),
        (lambda d: [m.pop("mask") for m in d["models"]], "there is no mask to learn"),
    ],
)
def test_bad_recipes_are_refused_in_one_line(
    change: Callable[[dict[str, Any]], object], message: str, kitchen: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = changed_recipe(kitchen(), tmp_path, change)
    with pytest.raises(BadInput, match=re.escape(message)) as caught:
        learn_merge(recipe, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_experts_that_do_not_fit_the_base_are_refused(kitchen: Callable[..., Path], tmp_path: Path) -> None:
    folder = kitchen()
    tiny_checkpoint(tmp_path / "narrow", hidden=32)
    tiny_checkpoint(tmp_path / "other", seed=9)
    shutil.copytree(folder / "base", tmp_path / "same")
    shutil.copytree(folder / "count", tmp_path / "bare")
    for name in ("narrow", "other", "same"):

        def change(data: dict[str, Any], name: str = name) -> None:
            data["models"][0]["model"] = str(tmp_path / name)

        recipe = changed_recipe(folder, tmp_path, change)
        said = {"narrow": "is (259, 64)", "other": "is no fine-tune of this base", "same": "is equal to the base"}[name]
        with pytest.raises(BadInput, match=re.escape(said)):
            learn_merge(recipe, tmp_path / "out")


def test_an_open_mask_is_no_mask_to_build_with(kitchen: Callable[..., Path], tmp_path: Path) -> None:
    recipe = open_recipe(kitchen())
    for work in (build, export):
        with pytest.raises(BadInput, match="line 4: 3 masks are still to be learnt: run `mftmerge train --recipe`"):
            work(recipe, tmp_path / "out")


@pytest.mark.parametrize("place", ["the result", "the base", "a slice"])
def test_an_open_mask_anywhere_is_said(kitchen: Callable[..., Path], tmp_path: Path, place: str) -> None:
    """Files are looked at as well: there is no mask yet that could fit or not."""
    folder, learn = kitchen(), {"learn": {"data": "rows.jsonl"}}

    def change(data: dict[str, Any]) -> None:
        for item in data["models"]:
            item.pop("mask")
        if place == "the result":
            data["mask"] = learn
        elif place == "the base":
            data["base_model"] = {"model": data["base_model"], "mask": learn}
        else:
            source = {"model": data["base_model"], "layer_range": [0, 2], "mask": learn}
            data.clear()
            data |= {"merge_method": "passthrough", "slices": [{"sources": [source]}]}

    with pytest.raises(BadInput, match="a mask is still to be learnt"):
        build(changed_recipe(folder, tmp_path, change), tmp_path / "out")


def test_a_missing_chat_template_is_said(kitchen: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "kitchen"
    shutil.copytree(kitchen(), folder)
    (folder / "base/chat_template.jinja").unlink()
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4
    with pytest.raises(BadInput, match="chat template"):
        learn_merge(open_recipe(folder), data={"count": rows}, steps=1)


def test_memory_is_checked_before_a_model_is_loaded(
    kitchen: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mftmerge.train.memory.available", lambda on_gpu: 1 << 20)
    monkeypatch.setattr("mftmerge.learn.run.load", None)
    with pytest.raises(BadInput, match=r"training needs about .* MiB .* and 1 MiB is free; use .*adam_bits=8"):
        learn_merge(open_recipe(kitchen()), steps=1)


# -- interruptions ----------------------------------------------------------------------------------------------------

PROGRAM = """
import os, sys
from mftmerge.learn.run import learn_merge
from mftmerge.progress import Step
recipe, out, number = sys.argv[1:]
def stop(step: Step) -> None:
    if step.what == "learn" and step.done == 3:
        os.kill(os.getpid(), int(number))
learn_merge(recipe, out, steps=6, save_every=1, scores=True, teacher="answers", progress=stop)
"""
STOPPED: dict[str, Any] = {"steps": 6, "save_every": 1, "scores": True, "teacher": "answers"}


@pytest.fixture(scope="module")
def uninterrupted(kitchen: Callable[..., Path]) -> LearnResult:
    return learn_merge(open_recipe(kitchen()), **STOPPED)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_bit_for_bit(
    number: int, kitchen: Callable[..., Path], uninterrupted: LearnResult, tmp_path: Path
) -> None:
    recipe, out = open_recipe(kitchen()), tmp_path / "out"
    command = [sys.executable, "-c", PROGRAM, str(recipe), str(out), str(int(number))]
    assert subprocess.run(command, check=False, capture_output=True).returncode != 0
    assert not (out / "recipe.yml").exists()
    with pytest.raises(BadInput, match="resume=True continues it"):
        learn_merge(recipe, out, **STOPPED)
    with pytest.raises(BadInput, match="resume=True needs the same settings; changed: batch_size"):
        learn_merge(recipe, out, batch_size=2, resume=True, **STOPPED)
    learn_merge(recipe, out, resume=True, **STOPPED)
    assert sorted(p.name for p in out.iterdir()) == ["count.mask", "letters.mask", "recipe.yml", "say.mask"]
    for name, mask in uninterrupted.masks.items():
        again = Mask.load(out / f"{name}.mask")
        assert again.digest == mask.digest
        for n in mask.names:
            np.testing.assert_array_equal(again.scores(n), mask.scores(n))


def test_rows_longer_than_the_models_positions_are_cut(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base", "gpt2", layers=2, positions=48)
    name = "transformer.h.1.mlp.c_fc.weight"
    rows = [{"prompt": "what", "completion": f"it is {i} " + "y" * 60} for i in range(8)]
    models: list[dict[str, Any]] = []
    for number, expert in enumerate(("a", "b")):
        shutil.copytree(tmp_path / "base", tmp_path / expert)
        tensors = load_file(file := tmp_path / expert / "model.safetensors")
        noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(number))
        save_file(tensors | {name: tensors[name] + 0.01 * noise}, file, metadata={"format": "pt"})
        models.append({"model": str(tmp_path / expert), "mask": {"learn": {"data": "-"}}})
    recipe = {"merge_method": "select", "base_model": str(tmp_path / "base"), "models": models}
    notes: list[str] = []
    data = {str(m["model"]): rows for m in models}
    learn_merge(recipe, data=data, steps=1, teacher="expert", note=notes.append)
    assert notes[:4] == [f"{n} of {n} rows are cut: the model has 48 positions" for n in (6, 2, 6, 2)]


def test_a_run_is_not_continued_over_other_models(kitchen: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kitchen(), tmp_path / "kitchen"))
    name = "model.layers.2.mlp.up_proj.weight"
    shape = tuple(Checkpoint.open(folder / "base").entry(name).shape)
    (folder / "letters.jsonl").unlink()  # of letters, the mask is closed
    data = yaml.safe_load(open_recipe(folder).read_text())
    data["models"].append({"model": "letters", "mask": "closed.mask", "parameters": {"weight": 1.0}})
    recipe = folder / "recipe.yml"
    recipe.write_text(yaml.safe_dump(data))
    numbers = iter(range(9))

    def identity() -> dict[str, Any]:
        chosen = LearnSettings.make({"steps": 4})
        (work := tmp_path / f"work{next(numbers)}").mkdir()
        return _Run(_checked(recipe, work, chosen), work, chosen, {}, lambda _: None, None).identity()

    def close(row: int) -> None:
        kept = np.ones(shape, bool)
        kept[row] = False
        Mask.from_bools({name: kept}).save(folder / "closed.mask", overwrite=True)

    def scale(model: str) -> None:
        tensors = load_file(file := folder / model / "model.safetensors")
        save_file(tensors | {name: tensors[name] * 1.01}, file, metadata={"format": "pt"})

    close(0)
    before = identity()
    assert identity() == before
    for change, differs in (
        (lambda: scale("say"), {"expert say"}),
        (lambda: close(1), {"models without an open mask"}),
        (lambda: scale("letters"), {"models without an open mask"}),
        (lambda: scale("base"), {"base"}),
    ):
        change()
        now = identity()
        assert {key for key in now if now[key] != before[key]} == differs
        before = now


def test_experts_answer_prompts_that_have_no_answer(kitchen: Callable[..., Path], tmp_path: Path) -> None:
    folder = kitchen()
    rows = {"count": [{"prompt": f"count {i}"} for i in range(8)]}
    rows["say"] = [{"messages": [{"role": "user", "content": f"say {i}"}]} for i in range(8)]
    result = learn_merge(open_recipe(folder, rows=8), data=rows, steps=2, answer_tokens=6)
    assert result.domains["count"]["apart"]["base"] > 0
    with pytest.raises(BadInput, match="has no answer to learn from"):
        learn_merge(open_recipe(folder, rows=8), data=rows, steps=2, teacher="answers")


def test_inspect_says_whose_each_weight_is(
    kitchen: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = kitchen(), tmp_path / "out"
    result = learn_merge(open_recipe(folder, method="select"), out, steps=2)
    found = parents(out / "recipe.yml")
    name = "model.layers.3.mlp.up_proj.weight"
    owners = found.of(name)
    for number, mask in enumerate(result.masks.values(), 1):
        np.testing.assert_array_equal(owners == number, mask.kept(name))
    shares = found.shares()[name]
    assert sum(shares) == pytest.approx(1)
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(out / "recipe.yml")])
    assert stopped.value.code == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if name in line)
    assert line.split()[1:] == [f"{s:.3f}" for s in shares]
    with pytest.raises(BadInput, match="only of a recipe with merge_method: select"):
        parents(open_recipe(folder))

"""A mask fitted to another model: what may be dropped, what is chosen, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.experts import domain_rows, make_experts
from transformers import AutoModelForCausalLM, AutoTokenizer

from mftmerge.checkpoint import Checkpoint
from mftmerge.cli import main
from mftmerge.data import IGNORE, tokenize
from mftmerge.errors import BadInput
from mftmerge.evaluate.pairing import paired
from mftmerge.learn import rebase
from mftmerge.learn.rebase import AS_IT_IS, KEEP_ALL, rebase_mask
from mftmerge.learn.rebasesettings import RebaseSettings
from mftmerge.loss import row_losses, token_losses
from mftmerge.mask import Mask, MaskInfo
from mftmerge.recipe.load import load_recipe
from mftmerge.train.inputs import held_out

NAME = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert; `damaged`: the same with a matrix in which a part of the weights is off; `broken`: far off."""
    folder = make_experts(tmp_path_factory.mktemp("rebase") / "kitchen", names=("count",), layers=(3,), steps=30)
    for name, far in (("damaged", 0.4), ("broken", 4.0)):
        model = AutoModelForCausalLM.from_pretrained(folder / "count", dtype=torch.float32)
        weight = dict(model.named_parameters())[NAME]
        torch.manual_seed(2)
        with torch.no_grad():
            weight += torch.from_numpy(damaged(tuple(weight.shape))) * torch.randn(weight.shape).sign() * far
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(folder / "count").save_pretrained(folder / name)
    return folder


def damaged(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).random(shape) < 0.1


def gradient(folder: Path, name: str, domain: str, *, learnt: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A matrix of a model and its gradient over a domain's rows. learnt: those alone that a fit learns from."""
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
    rows = tokenize(domain_rows(domain), AutoTokenizer.from_pretrained(folder / "base"), 256)
    if learnt:
        rows = held_out(rows, len(rows) // 2, RebaseSettings().seed, len(rows))[0]
    for row in rows:
        ids, labels = (torch.tensor([row[k]]) for k in ("input_ids", "labels"))
        token_losses(model, ids, labels)[0].sum().backward()
    weight = dict(model.named_parameters())[NAME]
    assert weight.grad is not None
    return weight.detach().numpy(), weight.grad.numpy()


def test_a_mask_that_helps_is_kept_where_it_helps(kitchen: Path, tmp_path: Path) -> None:
    shape = tuple(Checkpoint.open(kitchen / "base").entry(NAME).shape)
    bad, random = damaged(shape), np.random.default_rng(0).random(shape) < 0.1
    Mask.from_bools({NAME: ~(bad | random)}, MaskInfo(base="another")).save(tmp_path / "old.mask")
    result = rebase_mask(tmp_path / "old.mask", kitchen / "damaged", domain_rows("count"), tmp_path / "new.mask")
    assert result.gained
    assert result.candidates[result.chosen].mean < 0
    assert {KEEP_ALL, AS_IT_IS} < result.candidates.keys()
    mask = Mask.load(tmp_path / "new.mask")
    assert mask.info.base == str(kitchen / "damaged")
    assert mask.info.fingerprints[NAME] == Checkpoint.open(kitchen / "damaged").fingerprint(NAME)
    assert mask.info.operation == "rebase"
    assert mask.info.parents[0].digest == Mask.load(tmp_path / "old.mask").digest
    dropped = ~mask.kept(NAME)
    assert bad[dropped].mean() > bad.mean()


def test_where_nothing_is_to_be_gained_everything_is_kept_and_said(kitchen: Path, tmp_path: Path) -> None:
    weight, grad = gradient(kitchen, "count", "count")
    harms = grad * weight < np.quantile(grad * weight, 0.1)
    Mask.from_bools({NAME: ~harms}).save(tmp_path / "old.mask")
    notes: list[str] = []
    result = rebase_mask(
        tmp_path / "old.mask",
        kitchen / "count",
        domain_rows("count"),
        tmp_path / "new.mask",
        steps=0,
        note=notes.append,
    )
    assert not result.gained
    assert result.chosen == KEEP_ALL
    assert Mask.load(tmp_path / "new.mask").density() == 1
    assert "nothing to gain" in notes[-1]
    assert result.candidates[AS_IT_IS].mean > 0


def harmed_by(mask: np.ndarray, folder: Path, prompts: list[str]) -> list[dict[str, list[int]]]:
    """Tokenised rows whose answers are the tokens that a mask makes least likely, of what the model had said."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer, weight = AutoTokenizer.from_pretrained(folder), dict(model.named_parameters())[NAME]
    ids = [list(tokenizer(p)["input_ids"]) for p in prompts]
    with torch.no_grad():
        before = [model(torch.tensor([i])).logits[0, -1].log_softmax(0) for i in ids]
        weight *= torch.from_numpy(mask)
        after = [model(torch.tensor([i])).logits[0, -1].log_softmax(0) for i in ids]
    answers = [int((old - new).argmax()) for old, new in zip(before, after, strict=True)]
    return [
        {"input_ids": [*i, answer], "labels": [IGNORE] * len(i) + [answer]}
        for i, answer in zip(ids, answers, strict=True)
    ]


def test_guards_do_not_pay_for_it(kitchen: Path, tmp_path: Path) -> None:
    """Dropping the damage helps its domain, and harms rows that want what it takes away."""
    shape = tuple(Checkpoint.open(kitchen / "base").entry(NAME).shape)
    Mask.from_bools({NAME: ~damaged(shape)}).save(tmp_path / "old.mask")
    given = (tmp_path / "old.mask", kitchen / "broken", domain_rows("count"))
    alone = rebase_mask(*given)
    assert alone.gained
    assert alone.guards == {}
    wants = harmed_by(~damaged(shape), kitchen / "broken", [f"say {i}" for i in range(24)])
    notes: list[str] = []
    only = {"guards": {"said": wants}, "shares": [], "steps": 0, "note": notes.append}
    result = rebase_mask(*given, tmp_path / "new.mask", **only)  # type: ignore[arg-type]
    assert result.candidates[AS_IT_IS] == alone.candidates[AS_IT_IS]
    assert result.candidates[AS_IT_IS].mean < 0
    assert any(note.startswith(AS_IT_IS) and "nats on said: not taken" in note for note in notes)
    assert (result.chosen, result.gained, result.guards) == (KEEP_ALL, False, {})
    assert "nothing to gain on this model but at a guard's cost" in notes[-1]
    assert Mask.load(tmp_path / "new.mask").density() == 1
    tried = rebase_mask(*given, guards={"said": wants})
    assert all(d.mean <= 0 for d in tried.guards.values())


def test_what_is_said_of_guards_is_what_the_masked_model_does(kitchen: Path, tmp_path: Path) -> None:
    """After the steps, too: against the losses of the model, and of the model with the written mask, read anew."""
    shape = tuple(Checkpoint.open(kitchen / "base").entry(NAME).shape)
    Mask.from_bools({NAME: ~damaged(shape)}).save(tmp_path / "old.mask")
    rows = tokenize(domain_rows("say"), AutoTokenizer.from_pretrained(kitchen / "base"), 256)
    given = (tmp_path / "old.mask", kitchen / "broken", domain_rows("count"), tmp_path / "new.mask")
    result = rebase_mask(*given, guards={"say": rows}, shares=[1.0], steps=4)
    assert result.gained
    held = held_out(rows, len(rows) // 2, RebaseSettings().seed, len(rows))[1]
    model = AutoModelForCausalLM.from_pretrained(kitchen / "broken", dtype=torch.float32)
    before = row_losses(model, held)
    weight = dict(model.named_parameters())[NAME]
    with torch.no_grad():
        weight *= torch.from_numpy(Mask.load(tmp_path / "new.mask").kept(NAME))
    found = paired(row_losses(model, held), before)
    assert found.mean < -0.01
    assert result.guards["say"].mean == pytest.approx(found.mean, rel=1e-3)
    assert result.guards["say"].standard_error == pytest.approx(found.standard_error, rel=1e-3)


def test_what_a_guards_gradient_speaks_against_is_kept(
    kitchen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = "1 of what may be dropped, before training"
    monkeypatch.setattr(rebase._Fit, "_choice", lambda self, candidates, guards: (whole, {}))
    shape = Checkpoint.open(kitchen / "base").entry(NAME).shape
    Mask.from_bools({NAME: np.zeros(shape, bool)}).save(tmp_path / "old.mask")
    given = (tmp_path / "old.mask", kitchen / "broken", domain_rows("count"))
    alone = rebase_mask(*given, steps=0)
    guarded = rebase_mask(*given, steps=0, guards={"other": domain_rows("say")})
    first, second = (~result.mask.kept(NAME) for result in (alone, guarded))
    weight, grad = gradient(kitchen, "broken", "say", learnt=True)
    confirmed = weight * grad >= 0
    assert (first & ~confirmed).sum() > 100
    assert (second != (first & confirmed)).mean() < 1e-3, "gradients that are next to nothing may have either sign"


@pytest.mark.parametrize("guards", [None, {"other": domain_rows("say")}])
def test_steps_drop_nothing_that_was_not_confirmed(
    guards: dict[str, object] | None, kitchen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Checkpoint.open(kitchen / "base").entry(NAME).shape
    given = (tmp_path / "old.mask", kitchen / "broken", domain_rows("count"))
    Mask.from_bools({NAME: np.random.default_rng(0).random(shape) < 0.5}).save(given[0])
    kept = {}
    for when, steps in (("before", 0), ("after", 12)):
        whole = f"1 of what may be dropped, {when} training"
        monkeypatch.setattr(rebase._Fit, "_choice", lambda self, candidates, of_guards, name=whole: (name, {}))
        kept[when] = rebase_mask(*given, guards=guards, steps=steps, lr=0.5, shares=[1.0]).mask.kept(NAME)
    assert not (kept["before"] & ~kept["after"]).any()
    assert not (Mask.load(given[0]).kept(NAME) & ~kept["after"]).any()
    assert 0 < (~kept["after"]).sum() < (~kept["before"]).sum(), "steps take back what does not help"


def test_a_mask_over_a_delta_returns_to_its_base(kitchen: Path, tmp_path: Path) -> None:
    shape = Checkpoint.open(kitchen / "base").entry(NAME).shape
    Mask.from_bools({NAME: np.zeros(shape, bool)}, MaskInfo(on="delta")).save(tmp_path / "old.mask")
    with pytest.raises(BadInput, match="to which its dropped weights return"):
        rebase_mask(tmp_path / "old.mask", kitchen / "count", domain_rows("count"))
    result = rebase_mask(tmp_path / "old.mask", kitchen / "count", domain_rows("count"), base=kitchen / "base", steps=1)
    assert result.mask.info.on == "delta"
    base = Checkpoint.open(kitchen / "base")
    assert result.mask.info.delta_fingerprints[NAME] == base.fingerprint(NAME)
    weight, tuned = base.read_float32(NAME), Checkpoint.open(kitchen / "count").read_float32(NAME)
    assert not np.array_equal(weight, tuned)
    assert result.candidates[AS_IT_IS].mean != 0


def test_the_command_takes_guards(kitchen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = tuple(Checkpoint.open(kitchen / "base").entry(NAME).shape)
    Mask.from_bools({NAME: ~damaged(shape)}).save(tmp_path / "old.mask")
    for name in ("say", "letters"):
        lines = [json.dumps(row) + "\n" for row in domain_rows(name)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    guards = [str(tmp_path / "say.jsonl"), str(tmp_path / "letters.jsonl")]
    given = ["rebase", tmp_path / "old.mask", "-m", kitchen / "broken", "-d", kitchen / "count.jsonl"]
    out = tmp_path / "new.mask"
    with pytest.raises(SystemExit) as ended:
        main([*map(str, given), "--guard", guards[0], "--guard", guards[1], "--steps", "1", "--json", "-o", str(out)])
    assert not ended.value.code
    found = json.loads(capsys.readouterr().out)
    assert set(found["guards"]) in ({*guards}, set())
    assert bool(found["guards"]) == found["gained"]
    assert Mask.load(out).info.training.get("guards", {}).keys() == found["guards"].keys()


def test_rows_longer_than_the_models_positions_are_cut(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny("gpt2", layers=2, positions=48)
    name = "transformer.h.1.mlp.c_fc.weight"
    shape = Checkpoint.open(model).entry(name).shape
    Mask.from_bools({name: np.random.default_rng(0).random(shape) < 0.9}).save(tmp_path / "old.mask")
    rows = [{"prompt": "what", "completion": f"it is {i} " + "y" * 60} for i in range(8)]
    notes: list[str] = []
    given = (tmp_path / "old.mask", model, rows)
    rebase_mask(*given, guards={"other": rows}, steps=1, shares=[1.0], note=notes.append)
    assert notes[:4] == ["4 of 4 rows are cut: the model has 48 positions"] * 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda k: {"data": domain_rows("count")[:3]}, "rows: 4 are needed, the data has 3"),
        (lambda k: {"guards": {"math": domain_rows("say")[:3]}}, "guard math: 4 are needed, the data has 3"),
        (lambda k: {"model": k / "absent"}, "absent"),
        (lambda k: {"data": "absent.jsonl"}, "absent.jsonl"),
        (lambda k: {"out": k / "no" / "x.mask"}, "there is no directory"),
    ],
)
def test_bad_input_is_said_in_one_line(
    make: Callable[[Path], dict[str, object]], message: str, kitchen: Path, tmp_path: Path
) -> None:
    shape = Checkpoint.open(kitchen / "base").entry(NAME).shape
    Mask.from_bools({NAME: np.ones(shape, bool)}).save(tmp_path / "old.mask")
    given = {"model": kitchen / "count", "data": domain_rows("count"), "out": None, "guards": None} | make(kitchen)
    with pytest.raises(BadInput, match=message):
        rebase_mask(tmp_path / "old.mask", given["model"], given["data"], given["out"], guards=given["guards"])  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [2, 0, -1])
def test_shares_are_shares(share: float, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(
            ["rebase", "x.mask", "-m", "m", "-d", "r.jsonl", "-o", "y.mask", "--shares", "0.5", "--shares", str(share)]
        )
    assert ended.value.code == 2
    assert f"shares: a share is above 0 and at most 1, not {share}" in capsys.readouterr().err


def test_build_points_to_it_when_the_model_is_not_the_masks(kitchen: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(kitchen / "base")
    prints = {NAME: checkpoint.fingerprint(NAME)}
    Mask.from_bools({NAME: np.ones(checkpoint.entry(NAME).shape, bool)}, MaskInfo(fingerprints=prints)).save(
        tmp_path / "old.mask"
    )
    for name, moved in (("base", False), ("count", True)):
        recipe = tmp_path / f"{name}.yml"
        recipe.write_text(f"merge_method: masked\nmodels: [{{model: {kitchen / name}, mask: old.mask}}]\n")
        said = [w for w in load_recipe(recipe).warnings if "`mftmerge rebase` fits the mask to it" in w]
        assert bool(said) == moved
        assert not said or f"{NAME} differs" in said[0]

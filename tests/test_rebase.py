"""A mask fitted to another model: what may be dropped, what is chosen, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.experts import domain_rows, make_experts
from transformers import AutoModelForCausalLM, AutoTokenizer

from mftmerge.checkpoint import Checkpoint
from mftmerge.data import tokenize
from mftmerge.errors import BadInput
from mftmerge.learn.rebase import AS_IT_IS, KEEP_ALL, rebase_mask
from mftmerge.loss import token_losses
from mftmerge.mask import Mask, MaskInfo
from mftmerge.recipe.load import load_recipe

NAME = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert, and `damaged`: the same with a matrix in which a part of the weights is far off."""
    folder = make_experts(tmp_path_factory.mktemp("rebase") / "kitchen", names=("count",), layers=(3,), steps=30)
    model = AutoModelForCausalLM.from_pretrained(folder / "count", dtype=torch.float32)
    weight = dict(model.named_parameters())[NAME]
    with torch.no_grad():
        weight += torch.from_numpy(damaged(tuple(weight.shape))) * torch.randn(weight.shape).sign() * 0.4
    model.save_pretrained(folder / "damaged")
    AutoTokenizer.from_pretrained(folder / "count").save_pretrained(folder / "damaged")
    return folder


def damaged(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).random(shape) < 0.1


def gradient(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """A matrix of the tuned model and its gradient over the domain's rows."""
    model = AutoModelForCausalLM.from_pretrained(folder / "count", dtype=torch.float32)
    rows = tokenize(domain_rows("count"), AutoTokenizer.from_pretrained(folder / "base"), 256)
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
    weight, grad = gradient(kitchen)
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda k: {"data": domain_rows("count")[:3]}, "rows: 4 are needed, the data has 3"),
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
    given = {"model": kitchen / "count", "data": domain_rows("count"), "out": None} | make(kitchen)
    with pytest.raises(BadInput, match=message):
        rebase_mask(tmp_path / "old.mask", given["model"], given["data"], given["out"])  # type: ignore[arg-type]


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

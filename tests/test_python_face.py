"""What a user of Python meets: masks as values, paths or objects everywhere, results that show themselves, errors."""

from __future__ import annotations

import copy
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import mftmerge
from mftmerge.applysettings import ApplySettings
from mftmerge.errors import FLAGS, BadInput, terminal, worded
from mftmerge.mask import Mask
from mftmerge.train.settings import TrainSettings

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def masks(tmp_path: Path) -> tuple[Mask, Path]:
    """A mask in memory, and another one in a file."""
    random = np.random.default_rng(0)
    one, other = (Mask.from_bools({NAME: random.random((8, 8)) < 0.9}) for _ in range(2))
    other.save(tmp_path / "other.mask")
    return one, tmp_path / "other.mask"


def test_paths_or_masks_everywhere(masks: tuple[Mask, Path], tmp_path: Path) -> None:
    one, path = masks
    other = Mask.load(path)
    assert mftmerge.combine_masks("union", [one, path]) == one | other
    mftmerge.combine_files("union", [one, path], tmp_path / "union.mask")
    assert Mask.load(tmp_path / "union.mask") == one | other
    assert [p.total for p in mftmerge.compare([one, path]).pairs] == [
        p.total for p in mftmerge.compare([one, other]).pairs
    ]
    assert mftmerge.compare([one, path]).names == ["mask 1", "other.mask"]
    assert mftmerge.inspect(path).total == mftmerge.inspect(other).total == other.inspect().total
    assert pickle.loads(pickle.dumps(other)) == copy.deepcopy(other) == other


def test_a_table_for_pandas(masks: tuple[Mask, Path]) -> None:
    frame = masks[0].to_frame()
    assert list(frame.index) == [NAME]
    row = frame.loc[NAME]
    assert (row.layer, row.module, row["shape"], row.weights) == (0, "mlp.up_proj", (8, 8), 64)
    assert row.density == masks[0].density()


def test_a_mask_without_training(tiny: Callable[..., Path]) -> None:
    told: list[str] = []
    mask = mftmerge.diff_mask(tiny(seed=0), tiny(seed=1), keep=0.25, only="up_proj", note=told.append)
    assert mask.density() == 0.25
    with pytest.raises(BadInput, match="there are method, keep"):
        mftmerge.diff_mask(tiny(seed=0), tiny(seed=1), density=0.25)


def test_results_show_themselves(masks: tuple[Mask, Path]) -> None:
    one, path = masks
    comparison = mftmerge.compare([one, path])
    for shown in (one, one.inspect(), comparison):
        assert "<table>" in shown._repr_html_()
    assert one.plot() is not None
    assert comparison.plot() is not None
    hostile = Mask.from_bools({"layers.0.<script>.weight": np.ones(8, bool)})
    assert "<script>" not in hostile._repr_html_() + hostile.inspect()._repr_html_()


def test_errors_speak_of_arguments_in_python_and_of_options_on_the_command_line(masks: tuple[Mask, Path]) -> None:
    one, path = masks
    with pytest.raises(BadInput, match=r"give another path or overwrite=True$") as caught:
        mftmerge.combine_files("union", [one, one], path)
    with terminal():
        assert str(caught.value).endswith("give another path or --overwrite")


@pytest.mark.parametrize(
    ("text", "python"),
    [
        ("use --uncovered abstain", "use uncovered='abstain'"),
        ("the same --layers and --modules", "the same layers and modules"),
        ("(or --no-check-memory to try)", "(or check_memory=False to try)"),
        ("use --adam-bits 8, fewer --layers", "use adam_bits=8, fewer layers"),
        ("--keep is needed for --method magnitude, and", "keep is needed for method='magnitude', and"),
        ("or add --i-trust-this-code", "or add trusted=True"),
        ("results of `mftmerge eval --out`", "results of `mftmerge eval --out`"),
        ("launch with --use_fsdp --fsdp_version 2", "launch with --use_fsdp --fsdp_version 2"),
        ("--layers 4-x: give numbers", "layers 4-x: give numbers"),
    ],
)
def test_words_for_options(text: str, python: str) -> None:
    assert worded(text) == python
    with terminal():
        assert worded(text) == text


def test_every_switch_is_known_as_one() -> None:
    from mftmerge.recipe.settings import BuildSettings

    for settings in (TrainSettings, ApplySettings, BuildSettings):
        switches = {n.replace("_", "-") for n, f in settings.model_fields.items() if f.annotation is bool}
        assert switches <= FLAGS


def test_an_own_loop_ends_with_a_mask(tiny: Callable[..., Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    path = tiny("llama")
    model = AutoModelForCausalLM.from_pretrained(path)
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = mftmerge.mask_optimizer(model, keep=0.8, steps=3, layers="2-3")
    tokens = torch.arange(5, 25).reshape(2, 10)
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    mask = mftmerge.learnt_mask(model, optimizer, path)
    assert {mask.info.keep, mask.info.training["steps"]} == {0.8, 3}
    assert set(mask.info.fingerprints) == set(mask)
    assert all("layers.2." in name or "layers.3." in name for name in mask)
    for name in mask:  # the model holds W * M
        assert torch.equal(model.get_parameter(name), before[name] * torch.from_numpy(mask[name]))
    optimizer.restore()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(BadInput, match="taylor looks at rows"):
        mftmerge.mask_optimizer(model, init="taylor")


def test_masks_of_an_own_loop_can_be_added_by_their_scores(tiny: Callable[..., Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    made = []
    for answer in (5, 9):
        model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
        optimizer = mftmerge.mask_optimizer(model, steps=2, lr=0.05, scores=True)
        for _ in range(2):
            ids = torch.tensor([[1, 2, answer]])
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        made.append(mftmerge.learnt_mask(model, optimizer, tiny("llama")))
    both = mftmerge.combine_masks("score", made, density=0.9)
    name = both.names[0]
    start = made[0].initial_scores(name)
    added = start + sum(m.scores(name) - m.initial_scores(name) for m in made)
    assert np.array_equal(made[1].initial_scores(name), start)
    assert added[both.kept(name)].min() >= added[~both.kept(name)].max()


def test_training_choosing_and_evaluating_show_themselves(tiny: Callable[..., Path], tmp_path: Path) -> None:
    rows = {}
    for domain in ("code", "math"):
        rows[domain] = tmp_path / f"{domain}.jsonl"
        lines = [json.dumps({"prompt": f"{domain} {i}", "completion": f" is {i}"}) for i in range(12)]
        rows[domain].write_text("\n".join(lines))
    found = {d: mftmerge.train_mask(tiny("llama"), r, steps=2, eval_data=r, lr=0.05) for d, r in rows.items()}
    assert re.fullmatch(r"TrainResult\((gained|nothing gained).*, mask loss \d.*, mask=Mask\(.*\)", repr(found["code"]))
    shown = found["code"]._repr_html_()
    assert "best mask" in shown or "nothing was gained" in shown
    assert "<svg" in shown
    result = mftmerge.evaluate_files({"base": tiny("llama")}, {d: r.mask for d, r in found.items()}, rows)
    assert repr(result) == "GridResult(3 models on 2 domains, against 'base')"
    assert "<table>" in result._repr_html_()
    assert "<svg" in result._repr_html_()


def test_importing_a_mask_brings_nothing_that_it_does_not_need() -> None:
    absent = ("pydantic", "torch", "yaml", "rich")
    script = f"import sys; from mftmerge import Mask; print([m for m in {absent} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_public_docstring_is_missing() -> None:
    for name in mftmerge.__all__:
        if name != "__version__":
            assert re.match(r"\S", getattr(mftmerge, name).__doc__ or ""), name

"""What a run must not change, must notice when it goes on, and must say."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from mftmerge import prefix
from mftmerge.errors import BadInput
from mftmerge.progress import Step
from mftmerge.train.run import train_mask
from mftmerge.train.settings import TrainSettings

ROWS = [{"prompt": f"count from {i}", "completion": " ".join(str(j) for j in range(i, i + 6))} for i in range(24)]
SHORT: dict[str, Any] = {"layers": "3", "steps": 4, "batch_size": 4}


@pytest.fixture(scope="module")
def base(tiny: Callable[..., Path]) -> Path:
    return tiny("llama")


def stopped(model: Path, out: Path, at: int = 2, **settings: Any) -> None:
    """A run that Ctrl-C ended after some steps."""

    def stop(step: Step) -> None:
        if step.done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_mask(model, ROWS, out, progress=stop, save_every=1, **{**SHORT, **settings})


def changed(model: Path, to: Path, name: str) -> Path:
    """A copy of a checkpoint in which one tensor is another."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, to)
    tensors = load_file(to / "model.safetensors")
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_a_run_goes_on_over_the_same_model_only(base: Path, tmp_path: Path) -> None:
    """Also where the difference is below the masked layers, in the delta's base, or in the mask that it starts from."""
    other = changed(base, tmp_path / "other", "model.embed_tokens.weight")
    delta = changed(base, tmp_path / "delta", "model.layers.3.mlp.up_proj.weight")
    delta2 = changed(delta, tmp_path / "delta2", "model.layers.3.mlp.up_proj.weight")
    for seed in (0, 1):
        train_mask(base, ROWS, tmp_path / f"{seed}.mask", layers="3", steps=0, init="normal", seed=seed, scores=True)
    start: dict[str, Any] = {"init": "normal", "start": str(tmp_path / "start.mask")}

    stopped(base, tmp_path / "a.mask")
    with pytest.raises(BadInput, match="changed: model"):
        train_mask(other, ROWS, tmp_path / "a.mask", resume=True, **SHORT)
    stopped(base, tmp_path / "b.mask", base=str(delta))
    shutil.rmtree(delta)
    delta2.rename(delta)
    with pytest.raises(BadInput, match="changed: base"):
        train_mask(base, ROWS, tmp_path / "b.mask", resume=True, base=str(delta), **SHORT)
    shutil.copy(tmp_path / "0.mask", tmp_path / "start.mask")
    stopped(base, tmp_path / "c.mask", **start)
    shutil.copy(tmp_path / "1.mask", tmp_path / "start.mask")
    with pytest.raises(BadInput, match="changed: start"):
        train_mask(base, ROWS, tmp_path / "c.mask", resume=True, **SHORT, **start)


def test_what_does_not_decide_the_mask_may_change(base: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    stopped(base, tmp_path / "a.mask")
    settings = {**SHORT, "save_every": 2, "check_memory": False, "control": True}
    result = train_mask(moved, ROWS, tmp_path / "a.mask", resume=True, **settings)
    assert result.mask.digest == train_mask(base, ROWS, **SHORT).mask.digest


def test_a_run_that_had_enough_does_not_go_on(base: Path, tmp_path: Path) -> None:
    """Stopped by patience, then killed before the mask was written."""
    settings = {**SHORT, "steps": 8, "eval_every": 1, "patience": 2, "lr": 1e-12}
    straight = train_mask(base, ROWS, **settings)
    assert straight.stopped_early
    last = len(straight.history) - 1
    stopped(base, tmp_path / "a.mask", at=last, **{k: v for k, v in settings.items() if k not in SHORT or k == "steps"})
    resumed = train_mask(base, ROWS, tmp_path / "a.mask", resume=True, **settings)
    assert resumed.stopped_early
    assert resumed.history == straight.history


def test_the_disk_that_a_checkpoint_takes_is_said(base: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    size: list[int] = []

    def look(step: Step) -> None:
        found = list((tmp_path / "a.mask.run").glob("checkpoint-*"))
        size.append(sum(p.stat().st_size for d in found for p in d.iterdir()))

    settings: dict[str, Any] = {"layers": "2-3", "steps": 3, "batch_size": 4, "save_every": 1}
    result = train_mask(base, ROWS, tmp_path / "a.mask", progress=look, note=notes.append, **settings)
    weights = sum(result.mask.size(n) for n in result.mask.names)
    expected = weights * TrainSettings.make(settings).checkpoint_bytes
    assert expected == weights * 12.125
    assert size[-1] == pytest.approx(expected, rel=0.1)  # one checkpoint at a time, and what else it holds
    assert f"a checkpoint takes {expected / 2**20:.0f} MiB of disk" in " ".join(notes)


def test_the_program_around_is_left_as_it_was(base: Path) -> None:
    """Random numbers of three libraries, and accelerate's one state for everybody."""
    theirs = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=3, cpu=True)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    torch.manual_seed(5)
    expected = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    train_mask(model, ROWS, tokenizer=tokenizer, control=True, **SHORT)
    assert random.getstate() == expected[0]
    np.testing.assert_array_equal(np.random.get_state()[1], expected[1][1])
    assert torch.equal(torch.get_rng_state(), expected[2])
    assert (theirs.mixed_precision, theirs.gradient_accumulation_steps) == ("bf16", 3)
    Accelerator(mixed_precision="bf16", cpu=True)


def test_loggers_get_what_a_run_measures(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[int, dict[str, Any]] = {}
    monkeypatch.setattr(Accelerator, "log", lambda _, values, step: logged.setdefault(step, {}).update(values))
    result = train_mask(base, ROWS, eval_every=2, **SHORT)
    assert sorted(logged) == [0, 1, 2, 3, 4]
    assert set(logged[1]) == {"loss", "lr", "grad_norm", "flipped", "density"}
    assert set(logged[2]) == {*logged[1], "validation"}
    for entry in result.history:
        assert logged[entry["step"]] == {k: v for k, v in entry.items() if k != "step"}


def test_the_presets_batch_is_that_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TrainSettings.make({"preset": "paper"}).dtype == "bfloat16"
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert TrainSettings.make({"preset": "paper"}).accumulate == 32
    assert TrainSettings.make({"preset": "paper", "accumulate": 5}).accumulate == 5


def test_states_serve_packed_runs_in_validation_only(base: Path) -> None:
    notes: list[str] = []
    train_mask(base, ROWS, packing=True, max_length=128, note=notes.append, **SHORT)
    assert any("layers below 3 run once a validation row" in n for n in notes)


def test_layers_that_are_left_out_now_and_then_are_noticed(base: Path) -> None:
    """A draw that seldom changes anything: two passes are mostly equal."""
    model = AutoModelForCausalLM.from_pretrained(base)
    real = model.model.layers[1].forward

    def sometimes(hidden: Any, *args: Any, **more: Any) -> Any:
        if model.training and torch.rand(()) < 1e-9:
            return hidden
        return real(hidden, *args, **more)

    model.model.layers[1].forward = sometimes
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}
    cache = prefix.PrefixCache(model, 3)
    cache.add([row])
    state = torch.get_rng_state()
    assert cache._draws(row["input_ids"])
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_that_hand_on_no_gradient_are_named(base: Path) -> None:
    """Reversible layers, or reentrant checkpointing of a caller's."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    model.model.norm.register_forward_hook(lambda _, __, out: out.detach())
    with pytest.raises(BadInput, match="LlamaForCausalLM: its layers hand no gradient on"):
        train_mask(model, ROWS, tokenizer=tokenizer, **SHORT)

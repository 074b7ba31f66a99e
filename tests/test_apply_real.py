"""Applying masks to a real 135M model: nothing but the dropped weights changes, on disk and in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import random_mask
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from mftmerge.apply import apply_mask
from mftmerge.live import attach
from mftmerge.mask import Mask

pytestmark = pytest.mark.real_model


def test_keeping_everything_gives_the_same_files(smollm2: Path, tmp_path: Path) -> None:
    kept = random_mask(smollm2, density=2.0)
    assert len(kept.names) == 210
    assert kept.density() == 1
    apply_mask(kept, smollm2, tmp_path / "out")
    for file in smollm2.iterdir():
        if file.suffix in (".safetensors", ".json", ".jinja", ".txt"):
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_command_line_live_model_and_generation_agree(smollm2: Path, tmp_path: Path) -> None:
    mask = random_mask(smollm2, 3, 0.97, where="mlp")
    mask.save(tmp_path / "a.mask")
    arguments = ["apply", str(tmp_path / "a.mask"), "--model", str(smollm2), "-o", str(tmp_path / "out")]
    code = f"from mftmerge.cli.main import main; main({arguments!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with (
        safe_open(smollm2 / "model.safetensors", "pt") as before,
        safe_open(tmp_path / "out/model.safetensors", "pt") as f,
    ):
        for name in f.keys():  # noqa: SIM118
            expected = before.get_tensor(name)
            if name in mask:
                expected = torch.where(torch.from_numpy(mask.kept(name)), expected, torch.zeros_like(expected))
            assert torch.equal(f.get_tensor(name), expected), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "Name a colour."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    def answer(model: torch.nn.Module) -> list[int]:
        generated = model.generate(**ids, max_new_tokens=6, do_sample=False)  # type: ignore[operator]
        return list(map(int, generated[0]))

    applied = answer(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto"))
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype="auto")
    plain = answer(model)
    everything = Mask.from_bools({n: np.zeros(mask.shape(n), bool) for n in mask.names})
    switcher = attach(model, {"a": tmp_path / "a.mask", "none": everything})
    with switcher.use("a"):
        assert answer(model) == applied
    with switcher.use("none"):
        assert answer(model) != plain
    assert answer(model) == plain

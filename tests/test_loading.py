"""Loading a checkpoint into transformers: no code of strangers runs unasked, failures are one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.decoder_classes import build
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mftmerge import loading
from mftmerge.errors import BadInput
from mftmerge.loading import load_causal_lm, load_tokenizer


def with_code(path: Path, target: Path) -> Path:
    """A copy of a checkpoint whose configuration asks for code that comes with it."""
    shutil.copytree(path, target)
    config = json.loads((target / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (target / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((target / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (target / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (target / "own.py").write_text(
        f"open({str(target / 'ran')!r}, 'w').close()\nfrom transformers import LlamaConfig as Own"
    )
    return target


def test_code_of_a_checkpoint_never_runs_unasked(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = with_code(tiny("llama"), tmp_path / "m")
    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *a: asked.append(a) or "y")
    for load in (load_causal_lm, load_tokenizer):
        with pytest.raises(BadInput, match="MFTMERGE_TRUST_REMOTE_CODE=1") as caught:
            load(path)
        assert "\n" not in str(caught.value)
    assert not asked
    assert not (path / "ran").exists()
    code = f"from pathlib import Path; from mftmerge.loading import *; load_causal_lm(Path({str(path)!r}))"
    environment = {**os.environ, "MFTMERGE_TRUST_REMOTE_CODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "cannot be loaded" in done.stderr  # its code has run, and has no such model
    assert (path / "ran").exists()


def test_what_transformers_cannot_load_is_one_line(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "m"
    shutil.copytree(tiny("llama"), path)
    (path / "config.json").write_text('{"model_type": "nothing-known"}')
    with pytest.raises(BadInput, match="cannot be loaded") as caught:
        load_causal_lm(path)
    assert "\n" not in str(caught.value)
    (path / "config.json").write_text("[]")
    with pytest.raises(BadInput, match="not a JSON object"):
        load_causal_lm(path)


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "electra", "megatron-bert", "big_bird", "xlm", "xlnet"])
def test_a_model_that_sees_what_it_is_to_predict_is_refused(kind: str, tmp_path: Path) -> None:
    """transformers loads it as a causal model; some of these say what they are, the others are tried."""
    build(kind).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="no causal language model") as caught:
        load_causal_lm(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "mamba", "git", "blt"])
def test_models_that_do_not_say_that_they_are_causal_are_taken(kind: str, tmp_path: Path) -> None:
    build(kind).save_pretrained(tmp_path)
    assert load_causal_lm(tmp_path).config.model_type == kind


def test_the_configuration_decides_which_way_a_model_looks(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """An encoder's class with a causal mask, and a decoder's without."""
    bert = build("bert").config
    bert.is_decoder = True
    AutoModelForCausalLM.from_config(bert).save_pretrained(tmp_path / "bert")
    load_causal_lm(tmp_path / "bert")
    shutil.copytree(tiny("llama"), tmp_path / "llama")
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config | {"is_causal": False}))
    with pytest.raises(BadInput, match="LlamaForCausalLM with this configuration sees"):
        load_causal_lm(tmp_path / "llama")


@pytest.mark.parametrize(
    ("stored", "asked", "lacks", "expected"),
    [
        ("bfloat16", "auto", True, "float32"),
        ("bfloat16", "auto", False, "auto"),
        ("bfloat16", "bfloat16", True, "bfloat16"),
        ("float16", "auto", True, "float32"),
        ("float32", "auto", True, "auto"),
    ],
)
def test_auto_takes_the_type_that_this_processor_is_fast_in(
    stored: str, asked: str, lacks: bool, expected: str, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "lacks_bfloat16", lambda: lacks)
    path = tiny(dtype=stored)
    assert loading.chosen_dtype(path, asked, device="cpu") == expected
    assert loading.chosen_dtype(path, asked, device="cuda:0") == asked, "a GPU computes in what is stored"


def test_auto_takes_float32_where_only_some_tensors_are_halves(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a base in bfloat16 with a few layers that were trained and kept in float32."""
    monkeypatch.setattr(loading, "lacks_bfloat16", lambda: True)
    path = tmp_path / "mixed"
    shutil.copytree(tiny(dtype="bfloat16"), path)
    tensors = load_file(path / "model.safetensors")
    name = next(n for n in tensors if "3.mlp" in n)
    save_file(tensors | {name: tensors[name].float()}, path / "model.safetensors", {"format": "pt"})
    assert loading.chosen_dtype(path, "auto", device="cpu") == "float32"


def test_auto_stays_as_stored_where_float32_would_fill_the_memory(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "lacks_bfloat16", lambda: True)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    assert loading.chosen_dtype(tiny(dtype="bfloat16"), "auto", device="cpu") == "auto"

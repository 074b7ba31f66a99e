"""Loading a checkpoint into transformers: no code of strangers runs unasked, failures are one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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

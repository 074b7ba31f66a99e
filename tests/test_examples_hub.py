"""The example that keeps masks on the Hub, against a stand-in for the Hub on localhost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from helpers.hub import Hub
from huggingface_hub import ModelCard

from mftmerge.checkpoint import Checkpoint
from mftmerge.mask import Mask

EXAMPLE = Path(__file__).parent.parent / "examples" / "mask_on_hub.py"
NAME = "model.layers.0.mlp.up_proj.weight"


PROGRAM = "from mftmerge.cli import main; main()"


def run(
    hub: Hub, home: Path, *arguments: object, program: tuple[str, ...] = (str(EXAMPLE),), offline: str = "0"
) -> subprocess.CompletedProcess[str]:
    """The example in a process of its own: huggingface_hub reads its environment when it is imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1"}
    environment["HF_HUB_OFFLINE"] = offline
    command = [sys.executable, *program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_a_mask_goes_to_the_hub_and_comes_back(hub: Hub, tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny("llama", layers=2)
    kept = np.random.default_rng(0).random(Checkpoint.open(model).entry(NAME).shape) < 0.9
    mask = Mask.from_bools({NAME: kept})
    mask.save(tmp_path / "code.mask")
    arguments = ("upload", tmp_path / "code.mask", "me/code-mask", "org/base", "code", "loss=1.9 (base 2.1)")
    done = run(hub, tmp_path / "home", *arguments)
    assert done.returncode == 0, done.stderr
    assert "/me/code-mask/commit/" in done.stdout
    files = hub.repositories["me/code-mask"]
    assert set(files) == {"README.md", "general.mask"}
    assert hub.large == {"general.mask"}, "the mask is binary; its card is text"
    assert files["general.mask"] == (tmp_path / "code.mask").read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.library_name) == ("org/base", "mftmerge")
    assert {"mftmerge", "code"} <= set(card.data.tags)
    assert f"{mask.density():.1%}" in card.text
    assert "| loss | 1.9 (base 2.1) |" in card.text

    done = run(hub, tmp_path / "home", "apply", "me/code-mask", model, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    written = Checkpoint.open(tmp_path / "out").read(NAME)
    assert np.array_equal(written, np.where(kept, Checkpoint.open(model).read(NAME), 0))
    assert any(method == "GET" and "/resolve/" in path for method, path in hub.calls), "it was downloaded"

    assert run(hub, tmp_path / "home", *arguments).returncode == 0, "a second upload is a second commit"


def test_a_mask_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path / "home", "apply", "me/absent", "model", tmp_path / "out")
    assert done.returncode != 0
    assert "me/absent" in done.stderr
    assert not (tmp_path / "out").exists()


def test_commands_take_masks_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    """hf:// asks the Hub; a path that is misspelt never does."""
    mask = Mask.from_bools({NAME: np.array([[True, False], [True, True]])})
    mask.save(tmp_path / "a.mask")
    hub.repositories["me/code-mask"] = {"general.mask": (tmp_path / "a.mask").read_bytes()}
    program = ("-c", PROGRAM)
    inspect = ("inspect", "hf://me/code-mask/general.mask", "--json")
    done = run(hub, tmp_path / "home", *inspect, program=program)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digest"] == mask.digest
    asked = len(hub.calls)
    assert run(hub, tmp_path / "home", *inspect, program=program, offline="1").returncode == 0, "it is in the cache"
    for wrong in ("me/code-mask/general.mask", "hf://me/general.mask"):
        done = run(hub, tmp_path / "home", "inspect", wrong, program=program)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert len(hub.calls) == asked
    done = run(hub, tmp_path / "home", "inspect", "hf://me/absent/general.mask", program=program)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "hf://me/absent/general.mask" in done.stderr.replace("hf:/me", "hf://me")

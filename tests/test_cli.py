"""The program as a whole: light to start, one line for an error, the same for every command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import mftmerge
from mftmerge.cli.main import COMMANDS
from mftmerge.models.checkpoint import Checkpoint

HEAVY = ("torch", "transformers", "mergekit", "matplotlib", "datasets", "trl", "numpy")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own; the last line of stdout names the heavy modules that it imported."""
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('imported', [m for m in {HEAVY} if m in sys.modules]))\n"
        "from mftmerge.cli import main\nmain()"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    done = run("--help")
    assert done.returncode == 0, done.stderr
    assert "imported []" in done.stdout
    for name, (_, line) in COMMANDS.items():
        assert name in done.stdout
        assert line.split(":")[0][:40] in " ".join(done.stdout.split())


# Its --help is mergekit's own.
OTHERS = {"mergekit-yaml"}


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - OTHERS))
def test_every_command_has_help_with_an_example(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "imported []" in done.stdout, "the help page must not import the libraries that do the work"
    assert f"mftmerge {name}" in done.stdout.split("Usage:", 1)[1].split("\n", 1)[1], "an example call"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["trian"], "trian"),
        (["combine"], "masks"),
        (["combine", "--op", "vote"], "masks"),
        (["inspect", "absent.mask"], "absent.mask"),
        (["eval", "--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], word: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("mftmerge: error: ")
    assert word in done.stderr


def test_debug_shows_the_traceback() -> None:
    assert "Traceback" in run("--debug", "inspect", "absent.mask").stderr


def test_public_names_resolve() -> None:
    for name in mftmerge.__all__:
        assert getattr(mftmerge, name) is not None
    with pytest.raises(AttributeError):
        mftmerge.no_such_name  # noqa: B018


def test_apply_reports_as_json(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    model = tiny("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    shape = Checkpoint.open(model).entry(name).shape
    kept = np.ones(shape, np.bool_)
    kept[0] = False
    mftmerge.Mask.from_bools({name: kept}).save(tmp_path / "row.mask")
    done = run("apply", str(tmp_path / "row.mask"), "--model", str(model), "-o", str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.rsplit("imported", 1)[0])
    assert (report["tensors"], report["covered"], report["dropped"]) == (1, kept.size, shape[1])
    assert not Checkpoint.open(tmp_path / "out").read(name)[0].any()

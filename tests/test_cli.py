"""The program as a whole: light to start, one line for an error, the same for every command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mftmerge
from mftmerge.checkpoint import Checkpoint
from mftmerge.cli.main import COMMANDS

HEAVY = ("torch", "transformers", "mergekit", "matplotlib", "datasets", "trl", "numpy")


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own; the last line of stdout names the heavy modules that it imported."""
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('imported', [m for m in {HEAVY} if m in sys.modules]))\n"
        "from mftmerge.cli import main\nmain()"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


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
        (["combine"], "MASKS"),
        (["combine", "--op", "vote"], "MASKS"),
        (["inspect", "absent.mask"], "absent.mask"),
        (["eval", "--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], word: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("mftmerge: error: ")
    assert word.lower() in done.stderr.lower()


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


def complete(line: str, directory: Path, shell: str = "bash") -> list[str]:
    """What Tab offers at the end of a line; the last entry names the heavy modules that were imported for it."""
    words = line.split(" ")
    environment = {
        "_MFTMERGE_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = run(env=os.environ | environment, cwd=directory)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_of_an_operation(tmp_path: Path, shell: str) -> None:
    offered = complete("mftmerge combine --op v", tmp_path, shell)
    assert "vote" in offered[0]
    assert "union" not in offered[0]
    assert "torch" not in offered[-1]


def test_completion_of_commands_and_options(tmp_path: Path) -> None:
    assert complete("mftmerge co", tmp_path) == ["combine", "compare", "imported []"]
    assert "--threshold" in complete("mftmerge combine --th", tmp_path)
    assert complete("mftmerge combine --uncovered k", tmp_path) == ["keep", "imported []"]


def test_completion_of_files_by_their_ending(tmp_path: Path) -> None:
    for name in ("math.mask", "math.jsonl", "math.yml", ".hidden.mask"):
        (tmp_path / name).touch()
    assert complete("mftmerge inspect m", tmp_path) == ["math.mask", "imported []"]
    assert complete("mftmerge combine math.mask ", tmp_path) == ["math.mask", "imported []"]
    assert complete("mftmerge train --data m", tmp_path) == ["math.jsonl", "imported []"]
    (tmp_path / "masks").mkdir()  # where a directory fits too, the shell's own completion of files goes on
    assert complete("mftmerge inspect m", tmp_path)[0] == ""


@pytest.mark.parametrize(("shell", "word"), [("bash", "complete -o"), ("zsh", "#compdef"), ("fish", "complete --")])
def test_completion_is_shown_and_installed(tmp_path: Path, shell: str, word: str) -> None:
    environment = os.environ | {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    shown = run("--show-completion", shell, env=environment)
    assert shown.returncode == 0, shown.stderr
    assert word in shown.stdout
    assert "_MFTMERGE_COMPLETE=complete_" in shown.stdout
    installed = run("--install-completion", shell, env=environment)
    assert installed.returncode == 0, installed.stderr
    assert any("mftmerge" in p.read_text() for p in tmp_path.rglob("*") if p.is_file())

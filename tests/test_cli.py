"""The program as a whole: light to start, one line for an error, the same for every command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mftmerge
from mftmerge.checkpoint import Checkpoint
from mftmerge.cli.main import COMMANDS, main

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


def test_did_you_mean() -> None:
    assert "did you mean train?" in run("trian").stderr
    assert "did you mean --threshold?" in run("combine", "--thresold", "2").stderr
    assert "did you mean" not in run("combine", "--no-such-option").stderr


PLUGIN = """
import mftmerge

@mftmerge.operation()
def second_only(masks):
    "What the second mask keeps."
    return masks[1]
"""


def test_options_of_all_commands_stand_before_or_after_the_command(tmp_path: Path) -> None:
    for name in ("a", "b"):
        mftmerge.Mask.from_bools({"w": np.arange(8) % 2 == (name == "b")}).save(tmp_path / f"{name}.mask")
    loud = run("combine", "a.mask", "b.mask", "--op", "xor", "-o", "c.mask", cwd=tmp_path)
    assert "next: " in loud.stdout
    for number, words in enumerate((["-q", "combine"], ["combine", "--quiet"])):
        done = run(*words, "a.mask", "b.mask", "--op", "xor", "-o", f"{number}.mask", cwd=tmp_path)
        assert "wrote" in done.stdout, done.stderr
        assert "next: " not in done.stdout


def test_a_file_of_operations_needs_no_package(tmp_path: Path) -> None:
    (tmp_path / "my_masks.py").write_text(PLUGIN)
    for name in ("a", "b"):
        mftmerge.Mask.from_bools({"w": np.arange(8) % 2 == (name == "b")}).save(tmp_path / f"{name}.mask")
    arguments = ["combine", "a.mask", "b.mask", "--op", "second_only", "--plugin", "my_masks.py", "-o", "c.mask"]
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert mftmerge.Mask.load(tmp_path / "c.mask") == mftmerge.Mask.load(tmp_path / "b.mask")
    (tmp_path / "my_masks.py").write_text("raise ValueError('odd')")
    done = run(*arguments, "--overwrite", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--plugin my_masks.py fails: odd" in done.stderr
    assert "no such file" in run("inspect", "a.mask", "--plugin", "none.py", cwd=tmp_path).stderr


def test_short_help_and_the_module_as_a_program() -> None:
    assert run("train", "-h").stdout.startswith("Usage: mftmerge train")
    done = subprocess.run([sys.executable, "-m", "mftmerge", "-h"], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("Usage: mftmerge [OPTIONS]")


def test_no_line_of_help_is_wider_than_the_terminal_or_breaks_a_word() -> None:
    for name in set(COMMANDS) - OTHERS:
        text = run(name, "--help", env=os.environ | {"COLUMNS": "80"}).stdout
        options = text.split("Options:", 1)[1]
        assert all(len(line) <= 80 for line in options.splitlines()), name


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "not enough memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory.\nTried"), "--batch-size"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "no UTF-8"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (json.JSONDecodeError("Expecting value", "x", 0), "no JSON"),
        (zlib.error("Error -3"), "compressed file"),
        (KeyError("ours"), "report it"),
    ],
)
def test_what_libraries_raise_is_said_in_words(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(sys.modules["mftmerge.cli.main"], "app", fail)
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "a.mask"])
    shown = capsys.readouterr().err
    assert stop.value.code == 1
    assert shown.count("\n") == 1
    assert said in shown
    assert ("unexpected" in shown) == isinstance(error, KeyError)


def test_foreign_text_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    names = {"model.layers.0.[/x]a.weight": np.ones(8, bool), "model.layers.0.$x^{$.weight": np.arange(8) > 2}
    info = mftmerge.MaskInfo(base="\x1b]0;title\x07\x1b[2J\rdensity 1.0000, verified")
    for name in ("e.mask", "code[v2].mask"):
        mftmerge.Mask.from_bools(names, info).save(tmp_path / name)
    done = run("inspect", "code[v2].mask", "--plot", "p.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    assert "[/x]a" in done.stdout
    assert "code[v2].mask" in run("compare", "e.mask", "code[v2].mask", "--plot", "q.png", cwd=tmp_path).stdout

"""A full disk, Ctrl-C and SIGTERM in the middle of writing: the right exit code, one line, and nothing left behind."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import command_line

from mftmerge.cli import main

# Commands that write, and options that make them write a small file too.
WRITING = {
    "combine": "",
    "import": "",
    "diff-mask": "--archive",
    "apply": "",
    "build": "",
    "export": "",
    "report": "",
    "inspect": "--plot picture.png",
    "eval": "--out result.json",
    "import-recipe": "",
}
SMALLEST = 1500  # bytes: less than any of these files but an imported recipe


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ended(command: str, inputs: Path, place: Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([*command_line(command, inputs, place), *WRITING[command].split()])
    return int(stop.value.code or 0)


@pytest.mark.parametrize("command", [c for c in WRITING if c != "import-recipe"])
def test_a_full_disk(command: str, inputs: Path, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A limit on the size of files stands for the disk: the kernel refuses the write in the same place."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    capfd.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALLEST, hard))
    try:
        code = ended(command, inputs, place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capfd.readouterr().err
    assert code == 1, error
    assert error.count("\n") == 1, error
    assert error.startswith("mftmerge: error: "), error
    assert "unexpected" not in error
    assert not list(place.iterdir())


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler of Ctrl-C, also where the tests run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("command", WRITING)
@pytest.mark.parametrize("by", ["Ctrl-C", "SIGTERM"])
def test_stopped_before_the_output_has_its_name(
    command: str,
    by: str,
    inputs: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    written: list[Path] = []

    def stopped(*_: Any, **__: Any) -> None:
        written.extend(place.iterdir())
        os.kill(os.getpid(), signal.SIGINT if by == "Ctrl-C" else signal.SIGTERM)
        for _ in range(1000):  # the signal arrives between two of these
            pass

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, stopped)
    capfd.readouterr()
    handler = signal.getsignal(signal.SIGTERM)
    code = ended(command, inputs, place)
    error = capfd.readouterr().err
    monkeypatch.undo()
    assert written, "it was stopped while something was there"
    assert code == (130 if by == "Ctrl-C" else 143), error
    assert error.count("\n") == 1, error
    assert not list(place.iterdir())
    assert signal.getsignal(signal.SIGTERM) == handler

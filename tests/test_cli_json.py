"""`--json`: one JSON document on stdout and nothing else, from every command that reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import WORKING, command_line

from mftmerge.cli import main
from mftmerge.cli.main import COMMANDS, app

OTHERS = {"mergekit-yaml", "serve"}  # mergekit's own command, with its own options; a server reports over HTTP
ELSEWHERE = {"quickstart", "choose", "chat"}  # they need more than these inputs; their --json is tested where they run

# What a reader of the document will look for.
KEYS = {
    "train": {"out", "density", "gained", "history"},
    "combine": {"out", "operation", "density", "inputs"},
    "inspect": {"path", "digest", "tensors"},
    "compare": {"pairs"},
    "apply": {"tensors", "covered", "dropped"},
    "build": {"out", "tensors", "nbytes"},
    "export": {"out", "forms", "command"},
    "eval": {"cells", "models", "reference"},
    "import": {"out", "tensors", "density", "notes"},
    "diff-mask": {"out", "tensors", "density", "notes"},
    "import-recipe": {"out", "recipe", "notes"},
    "sweep": {"out", "runs", "chosen", "test"},
    "report": {"masks"},
    "init": {"out"},
    "run": {"cells", "models", "reference"},
    "push": {"repository", "files", "card"},
    "rebase": {"out", "digest", "candidates", "guards"},
    "patch": {"out", "bits a weight"},
    "patch-apply": {"out", "tensors"},
}


def constant(text: str) -> Any:
    raise AssertionError(f"{text} is not JSON")


@pytest.mark.parametrize("command", [c for c in WORKING if c not in OTHERS | ELSEWHERE])
def test_stdout_is_one_document(
    inputs: Path, command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*command_line(command, inputs, tmp_path), "--json"])
    out, error = capfd.readouterr()
    assert stop.value.code == 0, error
    found = json.loads(out, parse_constant=constant)
    assert set(found) >= KEYS[command], list(found)


def test_a_dry_run_is_a_document_too(inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for command in ("build", "sweep"):
        with pytest.raises(SystemExit):
            main([*command_line(command, inputs, tmp_path), "--dry-run", "--json"])
        assert json.loads(capfd.readouterr().out)
    assert not list(tmp_path.iterdir())


def test_every_command_has_the_option() -> None:
    import typer

    group: Any = typer.main.get_command(app)
    for name in set(COMMANDS) - OTHERS:
        options = {o for p in group.get_command(None, name).params for o in p.opts}
        assert "--json" in options, name

"""What all commands that write have in common: no input is lost, names are nobody else's, one run an output."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mftmerge import files, locks
from mftmerge.checkpoint import Checkpoint
from mftmerge.cli.main import main
from mftmerge.combine import combine_files
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.mask import Mask


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """run/ with a checkpoint and a model in it; models/a beside it. The working directory."""
    for name in ("run/checkpoint-500", "models/a"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_text("weights")
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "run" / "code.mask").write_text("mask")
    (tmp_path / "rows.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("out", "given"),
    [
        ("run", "run"),
        ("run", "run/checkpoint-500"),
        ("run", "run/code.mask"),
        ("run", "./models/../run/code.mask"),
        ("models/../run", "run/code.mask"),
        ("link", "run/code.mask"),
        ("run", "link/code.mask"),
        ("run", "mask.link"),
        ("run", "links"),
        ("run", "hard.mask"),
        ("run", "hard"),
        ("run/checkpoint-500/masked", "run"),
        ("models/a/v1.5", "models/a"),
        ("models/a", "models/a"),
        ("models", "models/a"),
    ],
)
def test_a_directory_that_holds_or_lies_in_an_input_is_refused(place: Path, out: str, given: str) -> None:
    os.symlink("run", "link")
    os.symlink("run/code.mask", "mask.link")
    os.mkdir("links")
    os.symlink(place / "run/checkpoint-500/model.safetensors", "links/model.safetensors")
    os.link("run/code.mask", "hard.mask")
    os.mkdir("hard")
    os.link("run/checkpoint-500/model.safetensors", "hard/weights")
    for spelt in (given, Path(given), place / given):
        with pytest.raises(BadInput, match=r"an input|itself an input") as caught:
            files.protect(out, ["owner/name", None, spelt])
        assert "\n" not in str(caught.value)


def test_what_is_beside_each_other_is_fine(place: Path) -> None:
    files.protect("run2", ["run", "rows.jsonl", "models/a"])
    files.protect("models/b", ["models/a", "owner/name", "\0", "x" * 5000, "~nobody/x"])
    files.refuse_existing("models/a/new.mask", False, ["models/a"])
    files.refuse_existing("run/code.mask", True, ["run"])


@pytest.mark.parametrize(
    ("out", "given"),
    [
        ("rows.jsonl", "rows.jsonl"),
        ("rows.jsonl", "./rows.jsonl"),
        ("rows.jsonl", "rows.link"),
        ("rows.link", "rows.jsonl"),
        ("rows.hard", "rows.jsonl"),
        ("models/a/config.json", "models/a"),
        ("models/a/model.safetensors", "models/a"),
    ],
)
def test_a_file_that_is_an_input_is_refused_also_with_overwrite(place: Path, out: str, given: str) -> None:
    os.symlink("rows.jsonl", "rows.link")
    os.link("rows.jsonl", "rows.hard")
    with pytest.raises(BadInput, match="input"):
        files.refuse_existing(out, True, [given])


def test_temporary_names_are_nobody_elses(tmp_path: Path) -> None:
    names = {files.temporary(tmp_path / "out.mask").name for _ in range(100)}
    assert len(names) == 100
    assert all(n.startswith(".out.") and n.endswith(".mask") for n in names)
    assert len(files.temporary(tmp_path / ("x" * 240 + ".mask")).name) < 255


def test_one_run_an_output(tmp_path: Path) -> None:
    out = tmp_path / "job"
    with locks.locked(out):
        with pytest.raises(MftmergeError, match="another run is writing it"), locks.locked(out):
            pass
        code = f"from mftmerge import locks\nwith locks.locked({str(out)!r}): pass"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "another run" in done.stderr
    with locks.locked(out):
        pass
    assert not list(out.iterdir())


@pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EBADF"])
def test_a_lock_where_there_is_no_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    def no(*_: object) -> None:
        raise OSError(getattr(errno, code), "no flock here")

    monkeypatch.setattr(fcntl, "flock", no)
    out, owner = tmp_path, tmp_path / ".owner"
    with locks.locked(out):
        assert owner.exists()
        with pytest.raises(MftmergeError, match="another run"), locks.locked(out):
            pass
    assert not list(out.iterdir())
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    owner.write_text(f"{platform.node()} {gone.pid}")  # a run that was killed
    with locks.locked(out):
        pass
    owner.write_text("another-machine 1")
    with pytest.raises(MftmergeError, match="another-machine") as caught, locks.locked(out):
        pass
    assert str(owner) in str(caught.value)


def test_a_lock_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another user's run leaves it that was killed: root may write everything, so the refusal is made here."""
    (tmp_path / ".lock").touch()
    opened = os.open

    def no(path: Path, flags: int, *more: int) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *more)

    monkeypatch.setattr(os, "open", no)
    with locks.locked(tmp_path), pytest.raises(MftmergeError, match="another run"), locks.locked(tmp_path):
        pass
    (tmp_path / ".lock").unlink(missing_ok=True)
    with pytest.raises(MftmergeError, match="Permission denied"), locks.locked(tmp_path):
        pass


def test_other_trouble_with_a_lock_is_said_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", no)
    with pytest.raises(MftmergeError, match="Input/output error"), locks.locked(tmp_path / "a"):
        pass


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line_that_names_the_file(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(MftmergeError, match=r"a\.pt: cannot be written"), files.writing(tmp_path / "a.pt"):
        raise error
    with pytest.raises(MftmergeError, match=r"a\.pt: cannot be written"), files.replacing(tmp_path / "a.pt"):
        raise error
    with pytest.raises(ZeroDivisionError), files.writing(tmp_path / "a.pt"):
        raise ZeroDivisionError  # any other fault stays what it is


def test_lfs_pointers_are_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="git lfs pull"):
        files.refuse_pointer(tmp_path / "x", b"version https://git-lfs.github.com/spec/v1\noid sha256:")
    files.refuse_pointer(tmp_path / "x", b"version")
    files.refuse_pointer(tmp_path / "x", b"{}")
    files.refuse_pointer(tmp_path / "x", b"")


def test_rows_and_settings_that_are_lfs_pointers(tmp_path: Path) -> None:
    from mftmerge.data import load_rows
    from mftmerge.yamltext import read_document

    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1\n"
    for name, read in {
        "r.jsonl": load_rows,
        "r.json": load_rows,
        "r.parquet": load_rows,
        "s.yml": read_document,
    }.items():
        (tmp_path / name).write_text(pointer)
        with pytest.raises(BadInput, match="git lfs pull"):
            read(tmp_path / name)  # type: ignore[operator]


def test_every_command_that_writes_refuses_to_write_over_its_inputs(
    tmp_path: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever a command reads stays, with --overwrite and exit code 2."""
    model = tmp_path / "model"
    shutil.copytree(tiny("llama", layers=2), model)  # sound, so that nothing else is wrong than where the output goes
    name = "model.layers.0.mlp.up_proj.weight"
    shape = Checkpoint.open(model).entry(name).shape
    fill = {name: np.ones(shape, np.float32)}
    mask, other = tmp_path / "a.mask", tmp_path / "b.mask"
    for path in (mask, other):
        Mask.from_bools({n: np.ones(shape, bool) for n in fill}).save(path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    save_file(fill, tmp_path / "foreign.safetensors")
    (tmp_path / "config.yml").write_text("merge_method: linear\nmodels: [{model: model}]\n")
    recipe = f"merge_method: linear\nmodels: [{{model: {model}, mask: {{file: a.mask}}, parameters: {{weight: 1}}}}]\n"
    (tmp_path / "recipe.yml").write_text(recipe)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    m, r = str(model), str(tmp_path / "rows.jsonl")
    for command in (
        ["combine", "union", str(mask), str(other), "-o", str(mask)],
        ["diff-mask", m, m, "-o", f"{m}/model.safetensors"],
        ["diff-mask", m, m, "--others", m, "-o", f"{m}/config.json"],
        ["import", str(tmp_path / "foreign.safetensors"), "-o", str(tmp_path / "foreign.safetensors")],
        ["import-recipe", str(tmp_path / "config.yml"), "-o", str(tmp_path / "config.yml")],
        ["train", "-m", m, "-d", r, "-o", r],
        ["train", "-m", m, "-d", f"{r}[0:1]", "-o", r],
        ["train", "-m", m, "-d", r, "--eval-data", str(tmp_path / "*.jsonl"), "-o", r],
        ["train", "-m", m, "-d", r, "--start", str(mask), "-o", str(mask)],
        ["eval", "--model", m, "--mask", str(mask), "--data", r, "-o", r],
        ["eval", "--model", m, "--mask", str(mask), "--data", f"x={r}", "--markdown", str(mask)],
        ["choose", str(mask), str(other), "-m", m, "-d", f"a={r}", "-d", f"b={r}", "-o", str(other)],
        ["report", str(tmp_path), "-o", r],
        ["report", str(tmp_path), "-o", str(mask)],
        ["apply", str(mask), "-m", m, "-o", m],
        ["build", str(tmp_path / "recipe.yml"), "-o", m],
        ["build", str(tmp_path / "recipe.yml"), "-o", str(tmp_path)],
        ["export", str(tmp_path / "recipe.yml"), "-o", f"{m}/out"],
    ):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--overwrite"])
        said = capsys.readouterr().err
        assert ended.value.code == 2, (command, said)
        assert "input" in said or "is no HTML page" in said
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before, command


def test_the_scores_beside_a_mask_are_an_input_too(tmp_path: Path) -> None:
    fill = {"w": np.ones(8, np.float32)}
    mask = Mask.from_bools({"w": np.arange(8) < 4}, scores=fill)
    mask.save(tmp_path / "a.mask", scores="sidecar")
    scores = tmp_path / "a.scores.safetensors"
    before = scores.read_bytes()
    for given in (tmp_path / "a.mask", Mask.load(tmp_path / "a.mask")):
        for out in (scores, tmp_path / "a.mask"):
            with pytest.raises(BadInput, match="input"):
                combine_files("union", [given], out, overwrite=True)
    assert scores.read_bytes() == before


def test_pictures_do_not_replace_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.png", "b.svg"):
        Mask.from_bools({"w": np.arange(8) < 4}).save(tmp_path / name)
    a, b = str(tmp_path / "a.png"), str(tmp_path / "b.svg")
    for command in (["inspect", a, "--plot", a, "--overwrite"], ["compare", a, b, "--plot", b, "--overwrite"]):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 2
        assert "input" in capsys.readouterr().err
    assert Mask.load(a) == Mask.load(b)


def test_what_cannot_be_written_is_one_line_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a read-only file system, where the temporary file can be neither made nor removed."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "x")

    monkeypatch.setattr(os, "unlink", refuse)
    with (
        pytest.raises(MftmergeError, match=r"page.html: cannot be written \(Read-only"),
        files.replacing(tmp_path / "page.html") as temporary,
    ):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(temporary))

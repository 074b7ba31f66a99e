"""Replacing a checkpoint directory: nothing of the user's is lost, and OUT is there at any moment."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mftmerge import outputdirectory
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.outputdirectory import OutputDirectory, check_target

OLD = {
    "config.json": "old",
    "model-00001-of-00002.safetensors": "old 1",
    "odd-name.safetensors": "old 2",
    "model.safetensors.index.json": '{"weight_map": {"a": "odd-name.safetensors"}}',
    "chat_template.jinja": "old template",
    "masks/code.mask": "old mask",
}
THEIRS = {
    "notes.txt": "mine",
    "results.json": "mine",
    ".git/HEAD": "ref",
    "checkpoint-500/model.safetensors": "other weights",
    "checkpoint-500/config.json": "other",
    "masks/own.mask": "mine",
    "adapter_model.safetensors": "an adapter",
    "modeling.py": "code",
}
NEW = {"config.json": "new", "model.safetensors": "new weights", "masks/code.mask": "new mask", "README.md": "card"}


def fill(path: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)


def content(path: Path) -> dict[str, str]:
    return {str(p.relative_to(path)): p.read_text() for p in path.rglob("*") if p.is_file() and not p.is_symlink()}


def replace(out: Path) -> None:
    with OutputDirectory(out, lambda: "job", overwrite=True) as output:
        fill(output.path, NEW)
        output.commit()


@pytest.mark.parametrize("swap", [True, False])
def test_only_a_checkpoints_own_files_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: bool) -> None:
    if not swap:
        monkeypatch.setattr(outputdirectory, "_swap", lambda a, b: False)
    out = tmp_path / "out"
    fill(out, OLD | THEIRS)
    (out / "elsewhere").symlink_to(tmp_path)
    replace(out)
    assert content(out) == THEIRS | NEW
    assert (out / "elsewhere").readlink() == tmp_path
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    replace(out)
    assert content(out) == THEIRS | NEW


def test_a_full_disk_names_the_output(tmp_path: Path) -> None:
    with (
        pytest.raises(MftmergeError, match=r"out: cannot be written \(No space left"),
        outputdirectory.OutputDirectory(tmp_path / "out", lambda: "job"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write into an open file puts it
    assert not list(tmp_path.iterdir())


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from mftmerge import outputdirectory
if not {swap}:
    outputdirectory._swap = lambda a, b: False
count = 0
def counting(real):
    def call(*arguments, **options):
        global count
        if count == {after}:
            os.kill(os.getpid(), 9)
        count += 1
        return real(*arguments, **options)
    return call
os.rename = counting(os.rename)
Path.unlink = counting(Path.unlink)
outputdirectory.exchange = counting(outputdirectory.exchange)
with outputdirectory.OutputDirectory(Path({out!r}), lambda: "job", overwrite=True) as output:
    for name, text in {new!r}.items():
        (output.path / name).parent.mkdir(parents=True, exist_ok=True)
        (output.path / name).write_text(text)
    output.commit()
print("finished", count)
"""


@pytest.mark.parametrize("swap", [True, False])
def test_a_kill_at_any_step_loses_nothing(tmp_path: Path, swap: bool) -> None:
    after = 0
    while True:
        out = tmp_path / str(after) / "out"
        fill(out, OLD | THEIRS)
        code = KILLED.format(tests=str(Path(__file__).parent), swap=swap, after=after, out=str(out), new=NEW)
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        finished = process.returncode == 0
        assert finished or process.returncode == -signal.SIGKILL, process.stderr
        if swap:  # OUT is there, and whole: the old checkpoint or the new one
            found = content(out)
            assert all(found[k] == v for k, v in OLD.items()) or all(found[k] == v for k, v in NEW.items())
        anywhere = list(content(out.parent).values())
        assert all(anywhere.count(text) >= list(THEIRS.values()).count(text) for text in THEIRS.values())
        replace(out)
        found = content(out)
        assert found == THEIRS | NEW, after
        assert [p.name for p in out.parent.iterdir()] == ["out"]
        if finished:
            break
        after += 1
    assert after > 8


def test_what_cannot_be_moved_stays_and_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.rename

    def failing(a: Path, b: Path) -> None:
        if Path(a).name == ".git":
            raise OSError(errno.EBUSY, "Device or resource busy")
        real(a, b)

    monkeypatch.setattr(os, "rename", failing)
    out = tmp_path / "out"
    fill(out, OLD | THEIRS)
    out.chmod(0o2770)
    with OutputDirectory(out, lambda: "job", overwrite=True) as output:
        fill(output.path, NEW)
        output.commit()
    assert output.left == tmp_path / ".out.replaced"
    assert content(output.left) == {".git/HEAD": "ref"}
    assert content(out) == {k: v for k, v in (THEIRS | NEW).items() if k != ".git/HEAD"}
    assert out.stat().st_mode & 0o7777 == 0o2770
    monkeypatch.undo()
    replace(out)
    assert content(out) == THEIRS | NEW
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_that_came_meanwhile_is_never_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, NEW | {"notes.txt": "newer"})
    fill(tmp_path / ".out.replaced", OLD | {"notes.txt": "older"})
    (tmp_path / ".out.written").write_text('["masks/code.mask"]')
    replace(out)
    assert content(out)["notes.txt"] == "newer"
    assert content(tmp_path / ".out.replaced") == {"notes.txt": "older"}


@pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_written_where_there_is_no_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    def no(*_: object) -> None:
        raise OSError(getattr(errno, code), "no flock here")

    monkeypatch.setattr(fcntl, "flock", no)
    out = tmp_path / "out"
    with OutputDirectory(out, lambda: "job") as output:
        with pytest.raises(MftmergeError, match="another run"), OutputDirectory(out, lambda: "job"):
            pass
        fill(output.path, NEW)
        output.commit()
    assert content(out) == NEW
    replace(out)
    assert content(out) == NEW
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("when", range(4))
def test_an_interrupt_around_the_exchange_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: bool, when: int
) -> None:
    """Ctrl-C before, between and after the steps of an exchange: OUT is the old checkpoint or the new one."""
    if not swap:
        monkeypatch.setattr(outputdirectory, "_swap", lambda a, b: False)
    real_exchange, real_rename, renames = outputdirectory.exchange, os.rename, [0]

    def exchange(new: Path, out: Path) -> None:
        if when == 0:
            raise KeyboardInterrupt
        renames[0] = 0
        monkeypatch.setattr(os, "rename", rename)
        try:
            real_exchange(new, out)
        finally:
            monkeypatch.setattr(os, "rename", real_rename)
        if when == 1:
            raise KeyboardInterrupt

    def rename(a: Path, b: Path) -> None:
        renames[0] += 1
        real_rename(a, b)
        if renames[0] == when - 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(outputdirectory, "exchange", exchange)
    out = tmp_path / "out"
    fill(out, OLD | THEIRS)
    if when < 2 or not swap:
        with pytest.raises(KeyboardInterrupt):
            replace(out)
    found = content(out)
    assert all(found.get(k) == v for k, v in THEIRS.items()), sorted(found)
    assert all(found.get(k) == v for k, v in OLD.items()) or all(found.get(k) == v for k, v in NEW.items())
    assert os.listdir(tmp_path) == ["out"]


def test_a_swap_that_fails_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(new: Path, out: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(outputdirectory, "exchange", broken)
    out = tmp_path / "out"
    fill(out, OLD | THEIRS)
    with pytest.raises(MftmergeError, match=f"{out}: cannot be written .Input/output error"):
        replace(out)
    assert content(out) == OLD | THEIRS
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("empty", [True, False])
def test_the_working_directory_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty: bool) -> None:
    """A shell that stands in it would be left in a directory that is gone."""
    out = tmp_path / "out"
    out.mkdir()
    if not empty:
        (out / "config.json").write_text("{}")
    monkeypatch.chdir(out)
    for spelt in (out, tmp_path / "out" / ".." / "out"):
        with pytest.raises(BadInput, match="current directory"):
            check_target(spelt, overwrite=True)
    monkeypatch.chdir(tmp_path)
    check_target(out, overwrite=True)


@pytest.mark.skipif(not shutil.which("unshare"), reason="mounts need namespaces")
@pytest.mark.parametrize("mount", ["mount --bind src 'a b'", "mount -t tmpfs none 'a b'"])
def test_a_mount_point_is_refused_before_the_work(tmp_path: Path, mount: str) -> None:
    for name in ("src", "a b"):
        (tmp_path / name).mkdir()
    code = "import sys; from pathlib import Path; from mftmerge.outputdirectory import check_target; "
    code += "check_target(Path('a b'), True)"
    script = f'{mount} && {sys.executable} -c "{code}"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "is a mount point" in done.stderr


EXPORTED = {
    "config.yml": "old",
    "mftmerge_recipe.yml": "old",
    "README.md": "old",
    "checkpoints/a/model.safetensors": "old weights",
    "checkpoints/a/config.json": "old",
    "checkpoints/both/config.json": "old",
}
PUT_THERE = {  # by the user; the names are those of a checkpoint, whose own files would go
    "config.json": "mine",
    "model.safetensors": "my merge",
    "merged/model.safetensors": "mine",
    "checkpoints/a/notes.txt": "mine",
    "checkpoints/mine/model.safetensors": "mine",
}


@pytest.mark.parametrize("swap", [True, False])
def test_an_export_is_replaced_and_only_what_it_lists_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: bool
) -> None:
    if not swap:
        monkeypatch.setattr(outputdirectory, "_swap", lambda a, b: False)
    out = tmp_path / "out"
    fill(out, EXPORTED)
    with pytest.raises(BadInput, match="no checkpoint directory or export"):
        check_target(out, overwrite=True)
    outputdirectory.list_export(out)
    fill(out, PUT_THERE)
    new = {"config.yml": "new", "checkpoints/both/config.json": "new"}
    with OutputDirectory(out, lambda: "export", overwrite=True) as output:
        fill(output.path, new)
        outputdirectory.list_export(output.path)
        output.commit()
    found = content(out)
    assert outputdirectory.listed(out) == {*new, outputdirectory.EXPORT}
    found.pop(outputdirectory.EXPORT)
    assert found == new | PUT_THERE
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_kill_while_an_export_is_replaced_loses_nothing(tmp_path: Path) -> None:
    after = 0
    while True:
        out = tmp_path / str(after) / "out"
        fill(out, EXPORTED)
        outputdirectory.list_export(out)
        fill(out, PUT_THERE)
        new = {"config.yml": "new", outputdirectory.EXPORT: '{"files": ["config.yml", "mftmerge_export.json"]}'}
        code = KILLED.format(tests=str(Path(__file__).parent), swap=True, after=after, out=str(out), new=new)
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        finished = process.returncode == 0
        assert finished or process.returncode == -signal.SIGKILL, process.stderr
        with OutputDirectory(out, lambda: "export", overwrite=True) as output:
            fill(output.path, new)
            output.commit()
        assert content(out) == new | PUT_THERE, after
        if finished:
            break
        after += 1

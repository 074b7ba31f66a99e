"""An output directory that appears whole or not at all, and takes the place of an old one without losing the rest.

The directory is filled beside its place under a temporary name, synced, and renamed. Finished files are listed with
their checksums, so that a run that was killed can be continued. Names beside OUT: `.OUT.partial` is being written,
`.OUT.replaced` is an old OUT whose own files are being removed, `.OUT.moving` an old OUT in the middle of a swap,
`.OUT.written` the names of the files that replace those of the old one.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Set
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType

from mftmerge.errors import BadInput, MftmergeError
from mftmerge.files import checksum, sync_directory
from mftmerge.locks import lock

# In an export: the names of its files, which are all that is deleted when it is replaced.
EXPORT = "mftmerge_export.json"
MANIFEST = ".mftmerge-progress.json"
OWNER = ".mftmerge-owner"
# What a checkpoint directory consists of. Anything else in it belongs to the user, and stays when it is replaced.
OWN = (
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("config.json", "generation_config.json", "*preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "*.tiktoken", "chat_template.jinja"),
    *("chat_template.json", "README.md", "mftmerge_recipe.yml", "mergekit_config.yml", MANIFEST, OWNER),
)


def list_export(folder: Path) -> None:
    """Write into an export, complete but for this, the list of its files, by which the next one may replace it."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir() and p.name != OWNER)
    (folder / EXPORT).write_text(json.dumps({"files": [*names, EXPORT]}, indent=1) + "\n", encoding="utf-8")


def listed(folder: Path) -> set[str]:
    """The files that an export in `folder` has by its own list; none where there is no export."""
    try:
        return {str(n) for n in json.loads((folder / EXPORT).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, LookupError, TypeError):
        return set()


class OutputDirectory:
    """A context manager around a directory being written. Without `commit()` nothing appears under `out`.

    job: gives a text that identifies the work (inputs and options); a leftover of another job is never continued.
    resume: continue the leftover of a killed run, and leave what was finished in place when this run fails.
    """

    def __init__(self, out: Path, job: Callable[[], str], *, overwrite: bool = False, resume: bool = False) -> None:
        self.out, self.job, self.overwrite, self.resume = out, job, overwrite, resume
        self.path = out.parent / f".{out.name}.partial"
        self._finished: dict[str, str] = {}
        self._lock = threading.Lock()
        self._fd = -1
        self._committed = False
        self.left: Path | None = None  # after commit: where files of the old directory are that could not be moved

    def __enter__(self) -> OutputDirectory:
        check_target(self.out, self.overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as e:
            raise MftmergeError(f"cannot write beside {self.out}: {e.strerror}") from None
        try:
            lock(self._fd, self.out, self.path / OWNER)
            # Only under the lock: a leftover may be the work of a run that goes on.
            _repair(self.out)
            check_target(self.out, self.overwrite)  # again: the repair may have brought it back
        except BaseException:
            os.close(self._fd)
            raise
        self._finished = self._read_manifest() if self.resume else {}
        for child in self.path.iterdir():
            if child.name not in self._finished and child.name != OWNER:
                _remove(child)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._committed and not (self.resume and self._finished):
            shutil.rmtree(self.path, ignore_errors=True)
        (self.path / OWNER).unlink(missing_ok=True)
        os.close(self._fd)
        if isinstance(error, OSError) and error.filename is None:  # a full disk does not say where
            raise MftmergeError(f"{self.out}: cannot be written ({error.strerror or error})") from error

    def is_finished(self, name: str) -> bool:
        """Whether a previous run finished this file: size and checksum are those that were recorded."""
        path = self.path / name
        recorded = self._finished.get(name)
        if recorded is None:
            return False
        if path.is_symlink() or not path.is_file() or checksum(path) != recorded:
            self._finished.pop(name)
            path.unlink(missing_ok=True)
            return False
        return True

    def record(self, name: str, checksum: str) -> None:
        """Note that a file is complete and synced. Safe to call from any thread."""
        with self._lock:
            self._finished[name] = checksum
            temporary = self.path / f"{MANIFEST}.tmp"
            temporary.write_text(json.dumps({"job": self.job(), "files": self._finished}))
            os.replace(temporary, self.path / MANIFEST)

    def commit(self) -> None:
        """Give the finished directory its name. Of an old checkpoint of that name only its own files are deleted."""
        with self._lock:
            for name in (MANIFEST, f"{MANIFEST}.tmp", OWNER):
                (self.path / name).unlink(missing_ok=True)
        os.fsync(self._fd)  # the names inside are durable before the one outside is
        if not (self.overwrite and self.out.is_dir() and any(self.out.iterdir())):
            os.rename(self.path, self.out)
            self._committed = True
            sync_directory(self.out.parent)
            return
        written = {str(p.relative_to(self.path)) for p in self.path.rglob("*") if not p.is_dir() or p.is_symlink()}
        written |= listed(self.out)
        record = self.out.parent / f".{self.out.name}.written"
        # Before the exchange: whoever finishes it after a kill has to know which of the old files are replaced.
        record.write_text(json.dumps(sorted(written)), encoding="utf-8")
        # Under this name the next run finds the old directory, should this one be killed after the exchange.
        old = _unused(self.out.parent / f".{self.out.name}.replaced")
        try:
            shutil.copymode(self.out, self.path)
            # First the new directory takes the name `.OUT.replaced`, then the two swap names: at every moment both are
            # whole, each under a name that the next run knows.
            os.rename(self.path, old)
            exchange(old, self.out)
        except BaseException:
            # Ctrl-C may come right after the exchange: never delete by name what may be the old directory by now.
            if old.exists() and os.path.samestat(old.stat(), os.fstat(self._fd)):
                shutil.rmtree(old, ignore_errors=True)
            else:
                self._committed = not self.path.exists()
            with suppress(OSError):
                _repair(self.out)
            raise
        self._committed = True
        sync_directory(self.out.parent)
        try:
            settle(old, self.out, written)
        except BaseException:  # Ctrl-C: the user's files are not left under a hidden name for it
            settle(old, self.out, written)
            raise
        self.left = old if old.exists() else None
        record.unlink(missing_ok=True)

    def _read_manifest(self) -> dict[str, str]:
        try:
            manifest = json.loads((self.path / MANIFEST).read_text())
            files = {str(k): str(v) for k, v in manifest["files"].items() if Path(k).name == k}
            return files if manifest["job"] == self.job() else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}


def exchange(new: Path, out: Path) -> None:
    """Swap two directories: at any moment `out` is one or the other where the system can do that, for an instant none
    where it cannot; a kill in that instant is repaired by the next run."""
    if _swap(new, out):
        return
    moving = out.parent / f".{out.name}.moving"
    os.rename(out, moving)
    try:
        os.rename(new, out)
    except BaseException:
        if not out.exists():
            os.rename(moving, out)
        raise
    os.rename(moving, new)


def _swap(a: Path, b: Path) -> bool:
    """Exchange two names in one step. False where the system or the file system has no such step."""
    libc = ctypes.CDLL(None, use_errno=True)
    here = -100  # AT_FDCWD: names are relative to the working directory
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(os.fsencode(a), os.fsencode(b), 2)  # RENAME_SWAP
    elif hasattr(libc, "renameat2"):
        failed = libc.renameat2(here, os.fsencode(a), here, os.fsencode(b), 2)  # RENAME_EXCHANGE
    else:
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def settle(old: Path, out: Path, written: Set[str], inside: str = "") -> None:
    """Empty a replaced directory: its checkpoint's own files are deleted, everything else moves to `out`.

    written: relative names whose old versions go, those that the new output has and those of an old export's list; any
    other file that would meet one of its name stays where it is. inside: the subdirectory that this call is about.
    """
    own = () if listed(old) else (*OWN, *_shards(old))
    # An export's list goes last: it tells whoever finishes this after a kill that nothing but what it names may go.
    for entry in sorted(os.scandir(old), key=lambda e: e.name == EXPORT):
        name = f"{inside}{entry.name}"
        source, target = Path(entry.path), out / entry.name
        with suppress(OSError):  # gone: another run repairs the same leftover; busy, forbidden: it stays
            if entry.is_dir(follow_symlinks=False):
                replaced = any(n.startswith(f"{name}/") for n in written)
                if replaced or (target.is_dir() and not target.is_symlink()):
                    settle(source, target, written, f"{name}/")
                elif not os.path.lexists(target):
                    _move(source, target)
            elif name in written or (not inside and any(fnmatch(name, p) for p in own)):
                source.unlink()
            elif not os.path.lexists(target):
                _move(source, target)
    with suppress(OSError):
        old.rmdir()


def _move(source: Path, target: Path) -> None:
    """Rename into a directory that need not be there yet, but never through a link."""
    if not target.parent.is_symlink():
        target.parent.mkdir(exist_ok=True)
        os.rename(source, target)


def _shards(directory: Path) -> list[str]:
    """The files that a checkpoint's index names: its own, whatever they are called."""
    try:
        names = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"].values()
        return [str(n) for n in set(names) if str(n).endswith(".safetensors") and "*" not in str(n)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []


def _repair(out: Path) -> None:
    """Finish what a run that was killed while it replaced `out` has left."""
    moving, record = out.parent / f".{out.name}.moving", out.parent / f".{out.name}.written"
    if moving.is_dir() and not moving.is_symlink():
        with suppress(FileNotFoundError):
            os.rename(moving, _unused(out.parent / f".{out.name}.replaced") if out.exists() else out)
    try:
        written = {str(n) for n in json.loads(record.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError):
        written = set()
    for path in list(out.parent.iterdir()):
        left = path.name.startswith(f".{out.name}.replaced") and path.is_dir() and not path.is_symlink()
        if left and out.is_dir():
            settle(path, out, written)
    record.unlink(missing_ok=True)


def _unused(path: Path) -> Path:
    names = (path if not i else path.with_name(f"{path.name}-{i}") for i in range(1000))
    return next(p for p in names if not os.path.lexists(p))


def check_target(out: Path, overwrite: bool) -> None:
    """Raise BadInput unless `out` may become a new directory: it is free, or a checkpoint or export to be replaced."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise BadInput(f"{out}: exists and is not a directory; choose another output")
    if out.exists() and _is_working_directory(out):  # the shell would be left in a directory that is gone
        raise BadInput(f"{out}: is the current directory, which a new one cannot replace; name a new one inside it")
    if _is_mounted(out):
        raise BadInput(f"{out}: is a mount point, which a new directory cannot replace; name a new one inside it")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise BadInput(f"{out}: already exists; give --overwrite to replace it")
    if not (out / "config.json").exists() and not any(out.glob("*.safetensors")) and not listed(out):
        raise BadInput(f"{out}: is no checkpoint directory or export, so it is not overwritten; choose another output")


def _is_working_directory(path: Path) -> bool:
    try:
        return path.samefile(os.curdir)
    except OSError:  # it has been removed
        return False


def _is_mounted(path: Path) -> bool:
    """Whether something is mounted there; `os.path.ismount` does not see a directory of the same file system."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
        return os.fsencode(path.resolve()) in (
            line.split()[4].decode("unicode_escape").encode("latin-1") for line in lines
        )
    except (OSError, IndexError, ValueError):
        return path.is_mount()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()

"""Outputs that appear whole or not at all: a file (`replacing`), a directory (`OutputDirectory`)."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import xxhash

from mftmerge.errors import BadInput, MftmergeError

# Files that belong to a model beside its weights: configuration, tokenizer, templates, licence. No pickles, no code.
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.md", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*")
COMPANION_FOLDERS = ("additional_chat_templates",)
MANIFEST = ".mftmerge-progress.json"


def unsupported(*_: int) -> int:
    raise OSError(errno.EOPNOTSUPP, "not on this system")


_reserve = getattr(os, "posix_fallocate", unsupported)  # elsewhere files are extended without reserving space


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a name beside `path`, with its ending, to write to; the file takes its name when the block ends well."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as e:
        if e.filename in (None, str(temporary)):  # a write that failed does not say where
            raise MftmergeError(f"{path}: cannot be written ({e.strerror or e})") from e
        raise
    finally:
        temporary.unlink(missing_ok=True)


def refuse_existing(path: str | Path, overwrite: bool) -> None:
    """Raise BadInput for an output that is there and may not be replaced, is a directory, or has none to be in.

    Called before the work as well, so that hours of it do not end in a misspelt path.
    """
    path = Path(path)
    if path.is_dir():
        raise BadInput(f"{path}: is a directory; give the name of a file")
    if path.exists() and not overwrite:
        raise BadInput(f"{path}: exists already; give another path or --overwrite")
    if not path.parent.is_dir():
        raise BadInput(f"{path}: there is no directory {path.parent}; make it first")


def sync_directory(path: Path) -> None:
    """Make a rename durable, where the system can."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError:
        pass
    finally:
        os.close(fd)


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

    def __enter__(self) -> OutputDirectory:
        check_target(self.out, self.overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as e:
            raise MftmergeError(f"cannot write beside {self.out}: {e.strerror}") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise MftmergeError(f"{self.out}: another run is writing it; wait for that one, or stop it") from None
        self._finished = self._read_manifest() if self.resume else {}
        for child in self.path.iterdir():
            if child.name not in self._finished:
                _remove(child)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._committed and not (self.resume and self._finished):
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._fd)

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
        """Give the finished directory its name. An old directory of that name is replaced and then deleted."""
        with self._lock:
            for name in (MANIFEST, f"{MANIFEST}.tmp"):
                (self.path / name).unlink(missing_ok=True)
        os.fsync(self._fd)
        old = self.out.parent / f".{self.out.name}.replaced"
        replaced = self.overwrite and self.out.is_dir()
        if replaced:
            shutil.rmtree(old, ignore_errors=True)
            os.rename(self.out, old)
        try:
            os.rename(self.path, self.out)
        except OSError:
            if replaced:
                os.rename(old, self.out)
            raise
        self._committed = True
        sync_directory(self.out.parent)
        if replaced:
            shutil.rmtree(old, ignore_errors=True)

    def _read_manifest(self) -> dict[str, str]:
        try:
            manifest = json.loads((self.path / MANIFEST).read_text())
            files = {str(k): str(v) for k, v in manifest["files"].items() if Path(k).name == k}
            return files if manifest["job"] == self.job() else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}


def check_target(out: Path, overwrite: bool) -> None:
    """Raise BadInput unless `out` may become a checkpoint directory."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise BadInput(f"{out}: exists and is not a directory; choose another output")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise BadInput(f"{out}: already exists; give --overwrite to replace it")
    if not (out / "config.json").exists() and not any(out.glob("*.safetensors")):
        raise BadInput(f"{out}: is no checkpoint directory, so it is not overwritten; choose another output")


def open_new(path: Path, size: int) -> int:
    """Create a file of `size` bytes with its blocks reserved, so that a full disk shows now. Returns its descriptor."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        if size:
            try:
                _reserve(fd, 0, size)
            except OSError as e:
                if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                os.ftruncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """`pwrite` of all of `data`."""
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def read_at(fd: int, into: memoryview, offset: int, what: Path) -> None:
    """`pread` that fills all of `into`. Raises MftmergeError when the file ends before that."""
    while into:
        got = os.preadv(fd, [into], offset)
        if not got:
            raise MftmergeError(f"{what}: the file ends early; it was truncated while being read")
        into, offset = into[got:], offset + got


def checksum(path: Path, stopped: Callable[[], bool] = lambda: False) -> str | None:
    """XXH3-128 of a file as text, or None when `stopped()` became true before the end.

    Many times faster than a cryptographic hash, which would take longer than the copying: it has to find a file that
    a crash or a bad disk left damaged, not a forged one.
    """
    digest = xxhash.xxh3_128()
    buffer = bytearray(1 << 20)
    with open(path, "rb", buffering=0) as f:
        while got := f.readinto(buffer):
            if stopped():
                return None
            digest.update(memoryview(buffer)[:got])
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()

"""Locks: one run an output at a time, also where the file system has no locks of its own."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mftmerge.errors import MftmergeError

# What flock says where a file system has none: Lustre without -o flock, NFS without lockd, some FUSE.
NO_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EBADF}


def lock(fd: int, out: Path, owner: Path) -> None:
    """Make this process the one that writes `out`, until the descriptor `fd` is closed and `owner` removed.

    owner: a file that says who it is where the file system has no flock. Raises MftmergeError when another run has it.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except BlockingIOError:
        raise MftmergeError(f"{out}: another run is writing it; wait for that one, or stop it") from None
    except OSError as e:
        if e.errno not in NO_FLOCK:
            raise MftmergeError(f"{out}: cannot be locked ({e.strerror})") from None
    me = f"{platform.node()} {os.getpid()}"
    for _ in range(2):
        try:
            with open(owner, "x", encoding="utf-8") as f:
                f.write(me)
            return
        except FileExistsError:
            host, _, process = owner.read_text(encoding="utf-8", errors="replace").rpartition(" ")
            if host != platform.node() or _alive(process):
                raise MftmergeError(
                    f"{out}: another run (process {process} on {host}) is writing it; wait for that one, or remove "
                    f"{owner} if it is gone"
                ) from None
            owner.unlink(missing_ok=True)
    raise MftmergeError(f"{out}: another run is writing it; wait for that one, or stop it")


@contextmanager
def locked(out: str | Path) -> Iterator[None]:
    """For the length of the block nobody else who asks writes into the directory `out`; made where there is none.

    For work of many files that is continued after a stop. Raises MftmergeError when another run has it.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    path, owner = out / ".lock", out / ".owner"
    while True:
        flags = os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
        except OSError as e:
            if not path.is_file():
                raise MftmergeError(f"{out}: cannot be written ({e.strerror})") from None
            try:  # what another user's run, which was killed, has left; a lock needs no right to write
                fd = os.open(path, os.O_RDONLY | flags)
            except OSError as e:
                raise MftmergeError(f"{out}: cannot be locked ({path}: {e.strerror})") from None
        try:
            lock(fd, out, owner)
            if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
                break  # else its last holder removed it just before it was ours
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    try:
        yield
    finally:
        for ours in (path, owner):
            with suppress(PermissionError):  # another user's, in a directory where everybody removes their own only
                ours.unlink(missing_ok=True)
        os.close(fd)


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True

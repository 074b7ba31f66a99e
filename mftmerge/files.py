"""What outputs have in common: they appear whole or not at all. (Masks and checkpoints have writers of their own.)"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mftmerge.errors import BadInput, MftmergeError


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

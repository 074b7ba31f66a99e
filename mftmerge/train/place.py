"""The mask's place, and the directory beside it that holds a run's checkpoints until the mask is there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mftmerge.errors import BadInput
from mftmerge.files import refuse_existing
from mftmerge.train.loop import last_checkpoint
from mftmerge.train.sharding import is_main

IDENTITY, LOCK = "settings.json", "lock"
NO_LOCKS = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)  # a file system that has none


class Place:
    """Where a run writes: `out` (a .mask, or None), and `<out>.run` while it lasts.

    A run that was killed leaves its checkpoints there. They are continued (`resume`), or replaced where that was asked
    for (`overwrite`); without either the next run refuses. Raises BadInput where `out` cannot be written.
    """

    def __init__(self, out: str | Path | None, overwrite: bool, resume: bool) -> None:
        self.out, self.overwrite, self.resume = None if out is None else Path(out), overwrite, resume
        if self.out is None:
            if resume:
                raise BadInput("resume needs the output file of the run that is to be continued")
            return
        refuse_existing(self.out, overwrite)
        self.directory = self.out.with_name(f"{self.out.name}.run")
        if last_checkpoint(self.directory) and not (overwrite or resume):
            raise BadInput(
                f"{self.directory}: holds the checkpoints of a run that was stopped; "
                "--resume continues it, --overwrite starts again"
            )

    @contextmanager
    def open(self) -> Iterator[Path]:
        """The directory for checkpoints. It goes when the block ends well, or left nothing that could be continued.

        Raises BadInput while another run has it. Ranks of one launch share it: rank 0 holds the lock.
        """
        if self.out is None:
            with tempfile.TemporaryDirectory() as d:
                yield Path(d)
            return
        path = self.directory
        path.mkdir(parents=True, exist_ok=True)
        with (path / LOCK).open("a") if is_main() else open(os.devnull) as lock:
            if is_main():
                self._lock(lock.fileno())
                if not self.resume:
                    for child in path.iterdir():
                        if child.name != LOCK:
                            shutil.rmtree(child) if child.is_dir() else child.unlink()
            try:
                yield path
            except BaseException:
                if is_main() and not last_checkpoint(path):
                    shutil.rmtree(path, ignore_errors=True)
                raise
            if is_main():
                shutil.rmtree(path, ignore_errors=True)

    def _lock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in NO_LOCKS:
                raise BadInput(f"{self.out}: another run is writing it; wait for that one, or stop it") from None

    def checkpoint(self, identity: Mapping[str, Any]) -> Path | None:
        """The checkpoint to continue from, None to start at step 0.

        identity: all that decides the mask (settings, digests of rows and weights), as plain values. Raises BadInput
        where it is not that of the interrupted run, and names what differs.
        """
        if self.out is None:
            return None
        said = self.directory / IDENTITY
        now = json.loads(json.dumps(identity))
        found = last_checkpoint(self.directory) if self.resume else None
        if found is not None and said.exists():
            before = json.loads(said.read_text(encoding="utf-8"))
            changed = sorted(k for k in now if before.get(k) != now[k])
            if changed:
                raise BadInput(f"{self.out}: --resume needs the same settings; changed: {', '.join(changed)}")
        if is_main():
            said.write_text(json.dumps(now), encoding="utf-8")
        return found

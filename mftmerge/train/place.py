"""The mask's place, and the directory beside it that holds a run's checkpoints until the mask is there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from mftmerge.errors import BadInput, MftmergeError
from mftmerge.files import protect, refuse_existing, writing
from mftmerge.locks import lock
from mftmerge.train.loop import last_checkpoint
from mftmerge.train.sharding import is_main
from mftmerge.train.stops import Interrupted

IDENTITY, LOCK, OWNER = "settings.json", "lock", "owner"


class Place:
    """Where a run writes: `out` (a .mask, or None), and `<out>.run` while it lasts.

    A run that was killed leaves its checkpoints there. They are continued (`resume`), or replaced where that was asked
    for (`overwrite`); without either the next run refuses. Raises BadInput where `out` cannot be written.
    """

    def __init__(self, out: str | Path | None, overwrite: bool, resume: bool, inputs: Iterable[object] = ()) -> None:
        self.out, self.overwrite, self.resume = None if out is None else Path(out), overwrite, resume
        if self.out is None:
            if resume:
                raise BadInput("resume needs the output file of the run that is to be continued")
            return
        inputs = list(inputs)
        refuse_existing(self.out, overwrite, inputs)
        self.directory = self.out.with_name(f"{self.out.name}.run")
        for beside in (self.directory, self.out.with_name(f"{self.out.name}.yaml")):
            protect(beside, inputs, directory=False)

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
                if last_checkpoint(path) and not (self.overwrite or self.resume):
                    raise BadInput(
                        f"{path}: holds the checkpoints of a run that was stopped; "
                        "--resume continues it, --overwrite starts again"
                    )
                if not self.resume:
                    _remove_own(path, but=LOCK)
            try:
                yield path
            except BaseException:
                if is_main() and not last_checkpoint(path):
                    _remove_own(path)
                raise
            if is_main():
                _remove_own(path)

    def _lock(self, fd: int) -> None:
        assert self.out is not None
        try:
            lock(fd, self.out, self.directory / OWNER)
        except MftmergeError as e:
            raise BadInput(str(e)) from None

    @contextmanager
    def stoppable(self, say: Callable[[str], None]) -> Iterator[None]:
        """Around the steps, of a control too: how to go on after a signal that ended them is said.

        Raises KeyboardInterrupt after SIGINT; after SIGTERM, what that did before.
        """
        try:
            yield
        except Interrupted as e:
            where = f"; continue with --resume (saved in {self.directory})" if self.out is not None else ""
            say(f"stopped after step {e.step}{where}")
            if e.number != signal.SIGINT:
                signal.raise_signal(e.number)  # whoever listened before us decides what it means
            raise KeyboardInterrupt from None

    def checkpoint(self, identity: Mapping[str, object], say: Callable[[str], None]) -> Path | None:
        """The checkpoint to continue from, None to start at step 0; `say` is told which, where a run is continued.

        identity: all that decides the mask (settings, digests of rows and weights), as plain values. Raises BadInput
        where it is not that of the interrupted run, and names what differs.
        """
        said = self.directory / IDENTITY
        now = json.loads(json.dumps(identity))
        found = last_checkpoint(self.directory) if self.resume else None
        # Rank 0 compares: the digest of the weights is that of its own rows, where ranks hold different ones (FSDP2).
        if found is not None and said.exists() and is_main():
            before = json.loads(said.read_text(encoding="utf-8"))
            changed = sorted(k for k in now if before.get(k) != now[k])
            if changed:
                raise BadInput(f"{self.out}: --resume needs the same settings; changed: {', '.join(changed)}")
        if is_main():
            with writing(said):
                said.write_text(json.dumps(now), encoding="utf-8")
        if self.resume:
            say(f"resuming at step {found.name.split('-')[1]}" if found else "nothing to resume: starting at step 0")
        return found


def _remove_own(directory: Path, but: str | None = None) -> None:
    """Remove what runs have put into their directory, and the directory when nothing else is in it."""
    for child in directory.iterdir():
        if child.name == but or not (child.name in (IDENTITY, LOCK, OWNER) or child.name.startswith("checkpoint-")):
            continue
        shutil.rmtree(child, ignore_errors=True) if child.is_dir() else child.unlink(missing_ok=True)
    if but is None:
        with suppress(OSError):
            directory.rmdir()

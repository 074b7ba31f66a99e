"""What files hold, as a short text: whether an input is still the one that something was made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from mftmerge.checkpoint import resolve
from mftmerge.files import COMPANION_FOLDERS, COMPANIONS, checksum

# What a model is loaded from. Its card and licence are companions too, and decide nothing.
READ = ("*.safetensors", "*.bin", "*.py", *(p for p in COMPANIONS if p.startswith("*.") and p != "*.md"))


class Contents:
    """Checksums of files. A file whose size, times and place are those it had when it was read is not read again.

    known: what `known` was after an earlier use, from which it goes on.
    """

    def __init__(self, known: Mapping[str, list[int | str]] | None = None) -> None:
        self.known: dict[str, list[int | str]] = dict(known or {})

    def of_file(self, path: str | Path) -> str:
        """The XXH3-128 of a file's bytes. Raises OSError where it cannot be read."""
        path = Path(path)
        found = path.stat()
        # The time of the last change of its entry too: copying tools set the other one back.
        state = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
        key = str(path.absolute())
        before = self.known.get(key)
        if before is None or before[:-1] != state:
            self.known[key] = before = [*state, checksum(path) or ""]
        return str(before[-1])

    def of_model(self, directories: Iterable[Path]) -> dict[str, str]:
        """Of all files that a model is loaded from, by name; directories: its own, and its adapter's if it has one."""
        found = {}
        for number, directory in enumerate(directories):
            for folder in (directory, *(directory / name for name in COMPANION_FOLDERS)):
                for path in sorted({p for pattern in READ for p in folder.glob(pattern) if p.is_file()}):
                    found[f"{number}/{path.relative_to(directory)}"] = self.of_file(path)
        return found

    def of_inputs(self, base: str | Path | None, start: str | Path | None = None) -> dict[str, object]:
        """Of what settings name: the model that weights are dropped to, and the mask whose scores are gone on from."""
        found: dict[str, object] = {}
        if base is not None:
            found["base"] = self.of_model([resolve(base)])
        if start is not None and Path(start).is_file():  # what is wrong with it, training says
            found["start"] = self.of_file(start)
        return found

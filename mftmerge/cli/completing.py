"""What the shell offers after Tab for values of options. Light: no command and no library is imported for it."""

from __future__ import annotations

import os
from collections.abc import Callable

Completion = Callable[[str], list[str]]

MASKS = (".mask",)
ROWS = (".jsonl", ".json", ".parquet")
YAML = (".yml", ".yaml")


def files(*endings: str) -> Completion:
    """Offers the files with these endings. Where a directory fits too, the shell's own completion is left to it."""

    def offered(incomplete: str) -> list[str]:
        folder, start = os.path.split(incomplete)
        try:
            found = [e for e in os.scandir(folder or ".") if e.name.startswith(start) and (start or e.name[0] != ".")]
        except OSError:
            return []
        if any(entry.is_dir() for entry in found):
            return []
        return sorted(os.path.join(folder, entry.name) for entry in found if entry.name.endswith(endings))

    return offered


def choices(*names: str) -> Completion:
    """Offers the names that begin as what was typed."""

    def offered(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return offered


def operations(incomplete: str) -> list[str]:
    """The operations on masks, from their registry."""
    from mftmerge.operations import OPERATIONS

    return [name for name in OPERATIONS if name.startswith(incomplete)]

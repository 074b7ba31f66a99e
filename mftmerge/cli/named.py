"""NAME=PATH arguments."""

from __future__ import annotations

from pathlib import Path

from mftmerge.errors import BadInput


def named(texts: list[str], option: str) -> dict[str, str]:
    """Name -> path: the name is given before "=", or is the file's or directory's own."""
    found: dict[str, str] = {}
    for text in texts:
        name, sign, path = text.partition("=")
        if not sign or "/" in name:
            file = Path(text)
            name, path = file.stem if file.suffix in (".mask", ".jsonl", ".json", ".parquet") else file.name, text
        if not name or not path:
            raise BadInput(f"{option} {text}: give NAME=PATH or a path")
        if name in found:
            raise BadInput(f"{option}: two are called {name!r}; name them apart with NAME=PATH")
        found[name] = path
    return found

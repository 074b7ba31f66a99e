"""What a job's or a sweep's file names: things beside it where they are there, else as it is written."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def beside(folder: Path, source: str) -> str:
    """What a file in this folder names, in it if it is there: a path, a range (`rows.jsonl[0:100]`), or a pattern."""
    near = str(folder / source)
    plain, bracket, _ = source.partition("[")
    there = os.path.exists(near) or (bracket and (folder / plain).is_file()) or glob.glob(near, recursive=True)
    return near if there else source


def model_beside(folder: Path, reference: str) -> str:
    """The model that a file in this folder names: a directory beside it where that is there, else as it is written.

    reference: directory or hub id; `model+adapter` only where no directory has the whole as its name.
    """

    def near(text: str) -> str:
        return str(folder / text) if text and (folder / text).exists() else text

    model, plus, adapter = reference.rpartition("+")
    if not plus or (folder / reference).exists() or Path(reference).expanduser().exists():
        return near(reference)
    return f"{near(model)}+{near(adapter)}"


def settings_beside(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of training that a file in this folder gives, in which `base` and `start` are there if they are."""
    found = dict(settings)
    for key, near in (("base", model_beside), ("start", beside)):
        if isinstance(found.get(key), str):
            found[key] = near(folder, found[key])
    return found

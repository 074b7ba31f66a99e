"""Jobs for the tests of the runner: found by name in another process."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from mftmerge.errors import BadInput


def work(place: Path, name: str, deaths: int) -> dict[str, Any]:
    """Killed as often as `deaths` says, then done."""
    calls = place / name
    count = int(calls.read_text()) if calls.exists() else 0
    calls.write_text(str(count + 1))
    if count < deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"name": name, "process": os.getpid()}


def fail(text: str) -> dict[str, Any]:
    raise BadInput(text)

"""Small questions about tensors and documents."""

from __future__ import annotations

import re
from pathlib import Path

from mftmerge.checkpoint import Checkpoint, TensorEntry
from mftmerge.recipe.schema import Document

LAYER = re.compile(r"\.(\d+)\.")


def entries_of(path: Path) -> list[TensorEntry]:
    """All tensors of a checkpoint."""
    return list(Checkpoint.open(path))


def given(document: Document, parameter: str) -> bool:
    """Whether a parameter is set anywhere to something that is not its neutral value (density 1, rescale false)."""
    settings = [document.parameters, *(i.parameters for _, i in document.inputs())]
    return any(s is not None and s.get(parameter) not in (None, 1, 1.0, False) for s in settings)

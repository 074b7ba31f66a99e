"""A `.mask` on disk: a safetensors container of packed bits with a JSON header in its metadata."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.numpy import load_file, safe_open, save_file

from mftmerge.errors import BadInput

if TYPE_CHECKING:
    from mftmerge.mask import Mask

FORMAT = 1
SCORE_SUFFIX = "::score"


def save(mask: Mask, path: str | Path, *, archive: bool = False) -> None:
    """Write `mask` to `path` atomically (temporary file beside it, fsync, rename)."""
    header: dict[str, Any] = {
        "format": FORMAT,
        "shapes": {n: mask.shape(n) for n in mask.names},
        "density": {n: mask.density(n) for n in mask.names},
        "info": dataclasses.asdict(mask.info),
    }
    entries = {n: mask.packed(n) for n in mask.names}
    if mask.has_scores:
        entries |= {n + SCORE_SUFFIX: mask.scores(n) for n in mask.names}
    temporary = Path(f"{path}.tmp{os.getpid()}")
    try:
        save_file(entries, temporary, metadata={"mftmerge": json.dumps(header)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | Path) -> Mask:
    from mftmerge.mask import Mask, MaskInfo, Parent

    def parent(d: dict[str, Any]) -> Parent:
        return Parent(**{**d, "parents": tuple(map(parent, d["parents"]))})

    try:
        with safe_open(path, framework="numpy") as f:
            header = json.loads((f.metadata() or {})["mftmerge"])
        entries = load_file(path)
    except Exception as e:
        raise BadInput(f"{path}: not a .mask file ({e})") from None
    info = MaskInfo(**{**header["info"], "parents": tuple(map(parent, header["info"]["parents"]))})
    scores = {n.removesuffix(SCORE_SUFFIX): a for n, a in entries.items() if n.endswith(SCORE_SUFFIX)}
    packed = {n: a for n, a in entries.items() if not n.endswith(SCORE_SUFFIX)}
    return Mask(packed, {n: tuple(s) for n, s in header["shapes"].items()}, info, scores)

"""Random masks over a tiny checkpoint, and a checkpoint's tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from mftmerge.checkpoint import Checkpoint
from mftmerge.mask import Mask, MaskInfo


def random_mask(path: Path, seed: int = 0, density: float = 0.9, where: str = "", info: MaskInfo | None = None) -> Mask:
    """A mask over the 2-D weights of a checkpoint's layers whose name contains `where`."""
    checkpoint = Checkpoint.open(path)
    rng = np.random.default_rng(seed)
    names = [e.name for e in checkpoint if len(e.shape) == 2 and ".h." in "." + e.name.replace("layers", "h")]
    kept = {n: rng.random(checkpoint.entry(n).shape) < density for n in names if where in n}
    return Mask.from_bools(kept, info)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {k: t for f in sorted(path.glob("*.safetensors")) for k, t in load_file(f).items()}

"""The mask that training started from, where it can be had again: from stored scores, the seed, or the base's weights.

A baseline for overlaps: masks that start from the same scores overlap before they have learnt anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mftmerge import bits, cut
from mftmerge.mask import Mask, Scores


def untrained(mask: Mask) -> Mask | None:
    """The mask before training, with the same number of weights dropped in each tensor; None where it is not known.

    Sources, in this order: the file's `::init` scores; init "normal", drawn again from the seed (imports torch) if
    the result has the recorded digest; init "magnitude", from the base where it is a local checkpoint and the tensors
    have the recorded fingerprints.
    """
    training = mask.info.training
    rule = training.get("selection", "abs" if training.get("init") == "normal" else "signed")
    read: Callable[[str], Scores] | None = None
    if mask.has_initial_scores:
        read = mask.initial_scores
    elif training.get("init") == "normal" and isinstance(training.get("seed"), int):
        read = _draw(mask, training)
    elif training.get("init") == "magnitude" and mask.info.base and Path(mask.info.base).is_dir():
        read, rule = _magnitudes(mask), "signed"
    if read is None:
        return None
    packed = {}
    for name in mask.names:
        scores = cut.refuse_nan(read(name))
        scores = np.abs(scores) if rule == "abs" else scores
        packed[name] = bits.pack(cut.keep_top(scores, mask.size(name) - mask.count(name)))
    return Mask(packed, {n: mask.shape(n) for n in mask.names})


def _draw(mask: Mask, training: dict[str, Any]) -> Callable[[str], Scores] | None:
    """Normal scores from the seed, None unless they have the digest that was recorded (fused tensors do not)."""
    from mftmerge.seeded import normal_scores

    def draw(name: str) -> Scores:
        drawn: Scores = normal_scores(name, mask.shape(name), training["seed"]).numpy()
        return drawn

    h = hashlib.blake2b(digest_size=16)
    for name in mask.names:
        h.update(f"{name}\0{mask.shape(name)}\0".encode())
        h.update(draw(name).tobytes())
    return draw if training.get("init_digest") == h.hexdigest() else None


def _magnitudes(mask: Mask) -> Callable[[str], Scores] | None:
    """|W| of the base's tensors, None where they are not those that the mask was trained on."""
    from mftmerge.checkpoint import Checkpoint

    base = Checkpoint.open(str(mask.info.base))
    for name in mask.names:  # a fingerprint covers the shape too
        if name not in base or mask.info.fingerprints.get(name) != base.fingerprint(name):
            return None
    return lambda name: np.abs(base.read_float32(name))

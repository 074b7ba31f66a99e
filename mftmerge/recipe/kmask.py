"""K-mask checkpoints: a mask as a base model of stock mergekit's task_arithmetic.

The checkpoint holds 0 where the mask keeps and K = 2^40 where it drops. Task arithmetic with it as base and one model
at weight 1 computes K + (w - K): for a kept weight 0 + (w - 0) = w, for a dropped one w - K rounds to -K, and the sum
is 0. Exact while |w| is below half a unit in the last place of K: 2^31 in bfloat16 arithmetic, 2^15 in float32; only a
kept -0 becomes +0. K has one set bit, so that bfloat16 stores it exactly, whatever the model's dtype.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mftmerge.apply import copy_companions
from mftmerge.checkpoint import TensorEntry
from mftmerge.checkpointwriter import CheckpointWriter
from mftmerge.mask import Mask
from mftmerge.names import layer_of

K_BITS = 0x5380  # 2^40 in bfloat16
LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers")


def write_kmask(mask: Mask, entries: Sequence[TensorEntry], donor: Path, out: Path, dtype: str | None) -> int:
    """Write the K-mask of a result with these tensors; gives its bytes.

    donor: a model directory whose configuration and tokenizer go along, since mergekit takes both from the base model;
    dtype: that of the result (None: the donor's), for the configuration.
    """
    with CheckpointWriter(out, [e.name for e in entries]) as writer:
        for entry in entries:
            if entry.name in mask:
                values = np.where(mask.kept(entry.name), np.uint16(0), np.uint16(K_BITS))
            else:
                values = np.zeros(entry.shape, np.uint16)
            writer.add(entry.name, "BF16", entry.shape, values.reshape(-1).view(np.uint8).data)
    copy_companions(donor, out)
    config = json.loads((out / "config.json").read_text())
    layers = {i for e in entries if (i := layer_of(e.name)) is not None}
    for key in LAYER_KEYS:
        if key in config and layers:
            config[key] = len(layers)
    for key in ("dtype", "torch_dtype"):
        if key in config and dtype:
            config[key] = dtype
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return writer.total


def complement_everywhere(mask: Mask, entries: Sequence[TensorEntry]) -> Mask:
    """Keeps what `mask` drops, and nothing of the tensors that it does not cover."""
    kept = {e.name: ~mask.kept(e.name) if e.name in mask else np.zeros(e.shape, np.bool_) for e in entries}
    return Mask.from_bools(kept)

"""How much memory learning a merge needs, known before a model is loaded: the files say which tensors differ."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

from mergekit.common import ModelReference

from mftmerge.checkpoint import Checkpoint, TensorEntry
from mftmerge.dtypes import named
from mftmerge.errors import BadInput
from mftmerge.learn.domains import Domain
from mftmerge.learn.merging import Merging
from mftmerge.learn.settings import LearnSettings
from mftmerge.names import layer_of
from mftmerge.train.memory import Need, need

TOLD = 8  # bytes of a token that an expert tells apart: its number and its log-probability


def differing(merging: Merging) -> list[TensorEntry]:
    """The tensors of the base in which any open expert differs, by the fingerprints of the files.

    Raises BadInput for an expert that is equal to the base: there is nothing to learn of it.
    """
    base = _opened(merging, merging.base)
    found: set[str] = set()
    for name, expert in zip(merging.names, merging.experts, strict=True):
        own = _opened(merging, expert)
        shared = [n for n in own.names if n in base]
        changed = {n for n in shared if own.fingerprint(n) != base.fingerprint(n)}
        if not changed and len(shared) == len(own.names):
            raise BadInput(f"{name}: is equal to the base, so there is nothing to learn of it; leave it out")
        found |= changed
    return [base.entry(n) for n in base.names if n in found]


def _opened(merging: Merging, model: ModelReference) -> Checkpoint:
    return Checkpoint.open(merging.directory(model))


def estimate(
    merging: Merging, changed: Sequence[TensorEntry], domains: Sequence[Domain], settings: LearnSettings
) -> Need:
    """What a run needs.

    For each weight that differs: its values in base and experts as they are stored, its gradient in the model's dtype,
    a float32 rank an expert, the way of the weight and two moments, and room for one tensor's scores and merge. In the
    computer's memory: two states of the masks, and what the experts and the base tell of every row.
    """
    base = _opened(merging, merging.base)
    path = merging.directory(merging.base)
    config = json.loads((path / "config.json").read_bytes())
    layers = [layer_of(e.name) for e in changed]
    count = 1 + max((n for n in map(layer_of, base.names) if n is not None), default=0)
    low = 0 if None in layers else min((n for n in layers if n is not None), default=0)
    training = settings.of_loop().model_copy(update={"layers": f"{low}-{count - 1}"})
    plain = need([(e.name, e.shape, e.dtype) for e in map(base.entry, base.names)], config, training)
    fixed = None if settings.dtype == "auto" else named(settings.dtype).nbytes
    experts, moments = len(merging.experts), 8 if settings.adam_bits == 32 else 2 + 8 / 256
    width = max((e.element.nbytes for e in changed), default=4)
    each = (experts + 1) * width + (fixed or width) + 4 * experts + 4 + moments
    weights = sum(e.size for e in changed)
    rows = [r for d in domains for r in (*d.train, *d.valid)]
    tokens = sum(sum(label >= 0 for label in r["labels"][1:]) if r["labels"] else settings.answer_tokens for r in rows)
    prompts = sum(sum(label < 0 for label in r["labels"]) or len(r["input_ids"]) for d in domains for r in d.train)
    heard = tokens * settings.asks_experts + prompts * bool(settings.base_kl)
    return replace(
        plain,
        training=math.ceil(weights * each),
        step=max((e.size for e in changed), default=0) * 4 * (experts + 4),
        host=weights * 2 + heard * settings.teacher_top * TOLD,
    )

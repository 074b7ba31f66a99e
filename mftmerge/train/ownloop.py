"""For training scripts of one's own: a `MaskOptimizer` over a model in one call, and a `Mask` at the end in another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from mftmerge import naming
from mftmerge.checkpoint import Checkpoint, resolve
from mftmerge.errors import BadInput
from mftmerge.mask import Mask, MaskInfo
from mftmerge.train import scores, targets
from mftmerge.train.optimizer import MaskOptimizer, Start
from mftmerge.train.settings import TrainSettings


def mask_optimizer(model: PreTrainedModel, *, steps: int = 60, **options: object) -> MaskOptimizer:
    """An optimiser that learns a mask over a loaded model, for any training loop or trainer that takes one.

    Gradients flow to the masked matrices alone (all other parameters are frozen), which from now on hold `W * M`.
    steps: that the loop will take, from which the learning rate follows where `lr` is not given. options: settings of
    `TrainSettings` that say what is masked and how it is learnt: keep, layers, modules, init (magnitude or normal),
    seed, lr, scope, clip, adam_bits; and scores, for a mask that score arithmetic can add to others. Raises BadInput.

        optimizer = mftmerge.mask_optimizer(model, keep=0.9, steps=60)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        mftmerge.learnt_mask(model, optimizer).save("code.mask")
    """
    chosen = TrainSettings.make({"steps": steps, **options})
    if chosen.init == "taylor":
        raise BadInput("init taylor looks at rows of data, which a loop of one's own has: give magnitude or normal")
    found = targets.find(model, chosen.layers, chosen.modules)
    targets.freeze_others(model, found)
    first = scores.initial(found, chosen.init, seed=chosen.seed)
    optimizer = MaskOptimizer(
        found,
        first,
        keep=str(chosen.keep),
        lr=chosen.learning_rate,
        signed=scores.is_signed(chosen.init),
        scope=chosen.scope,
        pattern=chosen.n_of_m,
        clip=chosen.clip,
        reference_rounding=chosen.reference_rounding,
        adam_bits=chosen.adam_bits,
    )
    if chosen.scores:
        optimizer.start = Start(chosen.init, chosen.seed, first)
    return optimizer


def learnt_mask(model: PreTrainedModel, optimizer: MaskOptimizer, base: str | Path | None = None) -> Mask:
    """The mask that an optimiser has learnt, under checkpoint names, ready to be saved.

    base: directory or hub id of the checkpoint that the model came from, by default what the model says of itself;
    where there is one, the mask records its fingerprints. With `mask_optimizer(..., scores=True)` it also holds the
    final and the initial scores. The model keeps `W * M`; `optimizer.restore()` puts the weights back, bit for bit.
    """
    reference = str(base or getattr(model.config, "_name_or_path", "") or "")
    checkpoint = _opened(reference)

    def convert(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return naming.to_arrays(model, tensors, names=checkpoint.names if checkpoint else None)

    kept, start = convert(optimizer.mask()), optimizer.start
    training = {"steps": optimizer.steps, "lr": float(optimizer.param_groups[0]["lr"]), "loop": "own"}
    if start is not None:
        training |= {"init": start.init, "seed": start.seed, "init_digest": scores.digest(start.scores)}
        training |= {"selection": "signed" if optimizer.signed else "abs"}
    info = MaskInfo(
        keep=None if optimizer.pattern else float(optimizer.keep),
        base=reference or None,
        fingerprints={name: checkpoint.fingerprint(name) for name in kept} if checkpoint else {},
        training=training,
    )
    return Mask.from_bools(kept, info, *((convert(optimizer.scores()), convert(start.scores)) if start else ()))


def _opened(reference: str) -> Checkpoint | None:
    try:
        return Checkpoint.open(resolve(reference)) if reference else None
    except BadInput:  # a model that never was in files
        return None

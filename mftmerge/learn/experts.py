"""The models of a merge that is learnt: one live model, and the tensors in which experts differ from the base."""

from __future__ import annotations

from collections import defaultdict

import torch
from transformers import PreTrainedModel

from mftmerge.errors import BadInput
from mftmerge.learn.merging import Merging, Part
from mftmerge.learn.parameters import Holders
from mftmerge.learn.settings import LearnSettings
from mftmerge.loading import chosen_dtype, load_causal_lm, placed
from mftmerge.naming import decoder_layers
from mftmerge.train import sharding
from mftmerge.train.sharding import Shard

FAR = 1.0  # norm of an expert's task vector over that of the base: fine-tunes stay far below, other models are at 1.4


def load(
    merging: Merging, settings: LearnSettings, *, shard: bool = False
) -> tuple[PreTrainedModel, dict[str, Part], Holders]:
    """The live model, which holds what the merge gives where no expert differs, and the parts where one does.

    shard: split the parameters over the ranks (FSDP2); the parts then have this rank's rows.
    Raises BadInput for an expert that is no fine-tune of the base.
    """
    dtypes = {e.element.name for e in merging.recipe.tensors(merging.document) if e.element.floating}
    widest = max((getattr(torch, d) for d in dtypes if d), key=lambda d: d.itemsize, default=torch.float32)
    path = merging.directory(merging.base)
    asked = chosen_dtype(path, settings.dtype)
    wanted = widest if asked == "auto" else getattr(torch, asked)
    if wanted.itemsize < widest.itemsize:
        raise BadInput(
            f"--dtype {settings.dtype}: the recipe's result is wider ({str(widest).removeprefix('torch.')}), so that "
            f"another model would be validated than is built; give the recipe out_dtype: {settings.dtype}"
        )
    model = load_causal_lm(path, dtype=wanted, trust_remote_code=settings.trust_remote_code or None)
    with merging.reading():
        holders = Holders(model, [save.tensor_name for save in merging.plan()])
        if shard:
            sharding.shard(model, decoder_layers(model)[1])
            holders.renew()
        else:
            placed(model)
        parts = _parts(merging, holders, model.device)
    return model, parts, holders


def _parts(merging: Merging, holders: Holders, device: torch.device) -> dict[str, Part]:
    learnt: dict[str, Part] = {}
    waiting: dict[str, dict[str, Part]] = defaultdict(dict)  # by parameter, until all that it holds is read
    distances = torch.zeros(len(merging.experts) + 1, dtype=torch.float64)  # squares: of task vectors, and the base
    copies: list[Part] = []
    for part in merging.parts():
        if part.name in holders.copies:
            copies.append(part)
            continue
        holder = holders.holder(part.name)
        if part.base.is_floating_point() and part.base.ndim > 1:  # norms are alike in all models
            distances[-1] += part.base.double().square().sum()
            for k in range(len(merging.experts)):
                distances[k] += part.change(k).double().square().sum()
        waiting[holder][part.name] = part
        if len(waiting[holder]) < len(holders.of[holder]):
            continue
        group, shard = waiting.pop(holder), Shard.of(holders.parameters[holder])
        if any(p.changed() for p in group.values()):
            if shard.group is not None and holders.plain(holder) is None:
                raise BadInput(
                    f"{holder}: the live model fuses several of the files' tensors in it, and such a parameter is not "
                    "learnt in shards; launch without FSDP (--multi_gpu), or one process"
                )
            learnt |= {name: p.keep_rows(shard).to(device) for name, p in group.items()}
        else:
            merged = holders.join(holder, {name: p.merged(None) for name, p in group.items()})
            Shard.local(holders.parameters[holder].data).copy_(shard.rows(merged))
    for copy in copies:
        if (first := learnt.get(holders.copies[copy.name])) is None:
            continue
        shard = Shard.of(holders.parameters[holders.holder(first.name)])
        if any(not torch.equal(shard.rows(copy.values[m]).to(device), t) for m, t in first.values.items()):
            raise BadInput(f"{copy.name}: the live model ties it to {first.name}, the files do not")
    for name, distance in zip(merging.names, distances[:-1].tolist(), strict=True):
        if distance > FAR**2 * float(distances[-1]):
            raise BadInput(f"{name}: is no fine-tune of this base (it is further from it than the base is from 0)")
    return learnt

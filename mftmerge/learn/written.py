"""What a run writes: one mask an expert, and the recipe with these in the place of the open ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import Tensor

from mftmerge import naming, yamltext
from mftmerge.checkpoint import Checkpoint
from mftmerge.learn.merging import Merging
from mftmerge.learn.parameters import Holders
from mftmerge.mask import Mask, MaskInfo
from mftmerge.recipe.card import slug
from mftmerge.recipe.load import Recipe
from mftmerge.recipe.locate import local
from mftmerge.recipe.schema import Reference

RECIPE = "recipe.yml"
NEVER = 1e30  # minus the score of a weight that no expert changed, in a file: far from all others, and finite


def mask_names(experts: Sequence[str]) -> list[str]:
    """A file's name for each expert's mask, without the ending: the last part of its reference, each once."""
    found: list[str] = []
    for expert in experts:
        wanted = slug(Path(expert.partition("@")[0].partition("+")[0]).name)
        names = (wanted, *(f"{wanted}-{i}" for i in range(2, len(experts) + 2)))
        found.append(next(n for n in names if n not in found))
    return found


@dataclass(frozen=True)
class Learnt:
    """What is known of the masks, by tensor of the result. codes: bit k for expert k, on the CPU.

    scores, initial: of each expert, where they are to be stored.
    """

    codes: Mapping[str, Tensor]
    scores: Mapping[str, Sequence[Tensor]] | None = None
    initial: Mapping[str, Sequence[Tensor]] | None = None

    def of(self, expert: int) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, dict[str, Tensor] | None]:
        """What one expert keeps, its scores, and its initial ones."""
        kept = {n: code & (1 << expert) != 0 for n, code in self.codes.items()}
        if self.scores is None or self.initial is None:
            return kept, None, None
        scores, initial = ({n: _finite(s[expert]) for n, s in part.items()} for part in (self.scores, self.initial))
        return kept, scores, initial


def masks(
    merging: Merging, holders: Holders, learnt: Learnt, facts: Mapping[str, object], *, keep: float | None = None
) -> list[Mask]:
    """The mask of each open expert. facts: what the headers say of the run.

    A mask that is applied to its expert has the names of the expert's files, where experts of a mixture may be apart
    that the result fuses; one that selects has the result's.
    """
    base = Checkpoint.open(merging.directory(merging.base))
    document, folder = merging.document, merging.recipe.folder
    assert document.base_model
    assert document.models
    found = []
    numbers = [n for n, _ in merging.recipe.to_learn]
    for k, (expert, number, name) in enumerate(zip(merging.experts, numbers, merging.names, strict=True)):
        checkpoint = Checkpoint.open(merging.directory(expert))
        names = None if document.merge_method == "select" else frozenset(checkpoint.names)
        # booleans, and float32 or None
        arrays: list[Any] = [p and _arrays(holders, p, names) for p in learnt.of(k)]
        kept, scores, initial = arrays
        info = MaskInfo(
            keep=keep,
            base=str(anywhere(document.models[number].model, folder)),
            fingerprints={n: checkpoint.fingerprint(n) for n in kept if n in checkpoint},
            training={**facts, "expert": name},
            on="delta",
            delta_base=str(anywhere(document.base_model.model, folder)),
            delta_fingerprints={n: base.fingerprint(n) for n in kept if n in base},
        )
        found.append(Mask.from_bools(kept, info, scores, initial))
    return found


def _arrays(holders: Holders, tensors: Mapping[str, Tensor], names: Set[str] | None) -> dict[str, np.ndarray[Any, Any]]:
    """Tensors of the result as those of a checkpoint with these names; None: as they are."""
    found = dict(tensors)
    if names is not None and not names >= found.keys():
        found = {}
        for parameter in dict.fromkeys(holders.holder(n) for n in tensors):
            whole = holders.join(parameter, {n: tensors[n] for n in holders.of[parameter]})
            found |= naming.to_checkpoint(holders.model, {parameter: whole}, names=names)
    found |= {copy: found[first] for copy, first in holders.copies.items() if first in found}
    return {n: t.contiguous().numpy() for n, t in found.items()}


def _finite(scores: Tensor) -> Tensor:
    return scores.cpu().clamp(min=-NEVER)


def plain_recipe(recipe: Recipe, files: Sequence[str]) -> str:
    """The recipe's text with a file in the place of each open mask, and its models where they are from anywhere."""
    (data,) = yamltext.documents(recipe.path, recipe.text)
    document = recipe.documents[0]
    for (number, _), file in zip(recipe.to_learn, files, strict=True):
        entry = data["models"][number]
        entry["mask"] = file if document.merge_method == "select" else {"file": file, "on": "delta"}
    for entry, item in zip(data["models"], document.models or (), strict=True):
        entry["model"] = anywhere(item.model, recipe.folder).to_mergekit()
        mask = entry.get("mask")
        if item.mask is not None and isinstance(mask, dict | str):
            entry["mask"] = _mask_anywhere(mask, recipe.folder)
    assert document.base_model is not None
    base = anywhere(document.base_model.model, recipe.folder).to_mergekit()
    if document.base_model.mask is None:
        data["base_model"] = base
    else:
        data["base_model"] |= {"model": base, "mask": _mask_anywhere(data["base_model"]["mask"], recipe.folder)}
    if "masks" in data:
        data["masks"] = {k: _mask_anywhere(v, recipe.folder) for k, v in data["masks"].items()}
    header = f"# {recipe.path.name} with the masks that mftmerge learnt.\n"
    return header + str(yaml.safe_dump(data, sort_keys=False))


def anywhere(reference: Reference, folder: Path) -> Reference:
    """The reference so that it means the same from another directory; a hub's id stays one."""
    parts = {"path": reference.path, "lora": reference.lora}
    return reference.model_copy(update={k: str(found) for k, v in parts.items() if v and (found := local(v, folder))})


def _mask_anywhere(mask: object, folder: Path) -> object:
    """A mask expression whose files are named so that they are found from another directory."""
    if isinstance(mask, str):
        path = folder / mask
        return str(path.resolve()) if path.is_file() else mask
    if isinstance(mask, list):
        return [_mask_anywhere(m, folder) for m in mask]
    if isinstance(mask, dict):
        return {k: _mask_anywhere(v, folder) if k in ("file", "of") else v for k, v in mask.items()}
    return mask

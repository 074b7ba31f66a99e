"""What a run writes: one mask an expert, and the recipe with these in the place of the open ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import Tensor

from mftmerge import yamltext
from mftmerge.checkpoint import Checkpoint
from mftmerge.learn.merging import Merging
from mftmerge.mask import Mask, MaskInfo
from mftmerge.recipe.card import slug
from mftmerge.recipe.load import Recipe
from mftmerge.recipe.locate import local
from mftmerge.recipe.schema import Reference

RECIPE = "recipe.yml"


def mask_names(experts: Sequence[str]) -> list[str]:
    """A file's name for each expert's mask, without the ending: the last part of its reference, each once."""
    found: list[str] = []
    for expert in experts:
        wanted = slug(Path(expert.partition("@")[0].partition("+")[0]).name)
        names = (wanted, *(f"{wanted}-{i}" for i in range(2, len(experts) + 2)))
        found.append(next(n for n in names if n not in found))
    return found


def masks(
    merging: Merging,
    codes: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    *,
    keep: float | None = None,
    scores: Mapping[str, Tensor] | None = None,
    initial: Mapping[str, Sequence[Tensor]] | None = None,
) -> list[Mask]:
    """The mask of each open expert. codes: by tensor, bit k for expert k. facts: what the headers say of the run.

    scores: (experts, ...) by tensor, and initial: by tensor and expert, where they are to be stored.
    """
    base = Checkpoint.open(merging.directory(merging.base))
    document, folder = merging.document, merging.recipe.folder
    assert document.base_model
    assert document.models
    prints = {n: base.fingerprint(n) for n in codes if n in base}
    found = []
    numbers = [n for n, _ in merging.recipe.to_learn]
    for k, (expert, number, name) in enumerate(zip(merging.experts, numbers, merging.names, strict=True)):
        checkpoint = Checkpoint.open(merging.directory(expert))
        info = MaskInfo(
            keep=keep,
            base=str(anywhere(document.models[number].model, folder)),
            fingerprints={n: checkpoint.fingerprint(n) for n in codes if n in checkpoint},
            training={**facts, "expert": name},
            on="delta",
            delta_base=str(anywhere(document.base_model.model, folder)),
            delta_fingerprints=prints,
        )
        kept = {n: (c.numpy() & (1 << k)) != 0 for n, c in codes.items()}
        own = None if scores is None else {n: np.nan_to_num(s[k].numpy(), neginf=-1e30) for n, s in scores.items()}
        first = None if initial is None or own is None else {n: _finite(s[k]) for n, s in initial.items()}
        found.append(Mask.from_bools(kept, info, own, first))
    return found


def _finite(scores: Tensor) -> np.ndarray[Any, Any]:
    return np.nan_to_num(scores.cpu().numpy(), neginf=-1e30)


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


def _mask_anywhere(mask: Any, folder: Path) -> Any:
    """A mask expression whose files are named so that they are found from another directory."""
    if isinstance(mask, str):
        path = folder / mask
        return str(path.resolve()) if path.is_file() else mask
    if isinstance(mask, list):
        return [_mask_anywhere(m, folder) for m in mask]
    if isinstance(mask, dict):
        return {k: _mask_anywhere(v, folder) if k in ("file", "of") else v for k, v in mask.items()}
    return mask

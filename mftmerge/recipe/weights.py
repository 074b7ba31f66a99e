"""The weights that a recipe's reference means, as a directory of safetensors files: made where there is none yet.

That is for an adapter (merged into its model), for pickled weights (converted) and for an earlier document (built).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from mftmerge.apply import copy_companions
from mftmerge.checkpointwriter import CheckpointWriter
from mftmerge.dtypes import of_torch
from mftmerge.recipe.build import build_into
from mftmerge.recipe.load import Recipe
from mftmerge.recipe.locate import WEIGHTS
from mftmerge.recipe.schema import Reference
from mftmerge.recipe.settings import BuildSettings


class Weights:
    """Finds them, and makes each once, in `work`. seed: of documents that draw random numbers.

    notify: told in words what takes time.
    """

    def __init__(self, recipe: Recipe, work: Path, seed: int, notify: Callable[[str], None]) -> None:
        self.recipe, self.work, self.seed, self.notify = recipe, work, seed, notify
        self.stages = {d.name: d for d in recipe.documents if d.name}
        self._made: dict[str, Path] = {}

    def of(self, reference: Reference) -> Path:
        """The directory for a reference whose paths are absolute, or the name of a document of the recipe."""
        if reference.path not in self.stages and not reference.lora and _has_safetensors(Path(reference.path)):
            return Path(reference.path)
        key = str(reference)
        if key not in self._made:
            self._made[key] = self._make(reference)
        return self._made[key]

    def _make(self, reference: Reference) -> Path:
        if reference.lora:
            from mergekit.common import ModelReference  # it takes seconds to import

            model = self.of(Reference(path=reference.path)) if reference.path in self.stages else Path(reference.path)
            named = reference.model_copy(update={"path": str(model)})
            cache = str(self.work / "adapters")
            return Path(ModelReference.model_validate(named.to_mergekit()).merged(cache_dir=cache).model.path)
        target = self.work / "weights" / str(len(self._made))
        target.mkdir(parents=True)
        if reference.path in self.stages:
            self.notify(f"building {reference.path}")
            document, settings = self.stages[reference.path], BuildSettings(seed=self.seed)
            build_into(self.recipe, target, name=reference.path, result=document, settings=settings)
        else:
            self.notify(f"converting {reference}")
            _convert(Path(reference.path), target)
        return target


def _has_safetensors(model: Path) -> bool:
    return any((model / name).is_file() for name in WEIGHTS[:2])


def _convert(model: Path, out: Path) -> None:
    """Write a model with pickled weights anew, bit for bit."""
    from mergekit.io.lazy_tensor_loader import ShardedTensorIndex

    shards = ShardedTensorIndex.from_disk(str(model)).shards
    with CheckpointWriter(out, [name for shard in shards for name in shard.contained_keys]) as writer:
        for shard in shards:
            tensors = torch.load(model / shard.filename, map_location="cpu", weights_only=True)
            for name, tensor in tensors.items():
                if isinstance(tensor, torch.Tensor):
                    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
                    writer.add(name, of_torch(tensor.dtype).code, tuple(tensor.shape), raw.data)
    copy_companions(model, out)

"""A document of a recipe as mergekit reads it: masked inputs as models of their own, and the mask of the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import LoaderCache, LoadTensor
from mergekit.options import MergeOptions
from pydantic import PrivateAttr

from mftmerge import bits
from mftmerge.errors import BadInput
from mftmerge.mask import Mask
from mftmerge.matching import match
from mftmerge.recipe.catalogue import METHODS
from mftmerge.recipe.check import mask_parameters
from mftmerge.recipe.headers import opened
from mftmerge.recipe.locate import MaskBook, absolute
from mftmerge.recipe.schema import BaseInput, Document, MaskUse, ModelInput, Reference
from mftmerge.recipe.translate import Translation
from mftmerge.select import select_torch


class MaskedLoader(LazyTensorLoader):
    """A checkpoint's loader that masks tensors as they are read.

    names: tensor of the checkpoint -> of the mask. base: the model whose values dropped weights take; None: they are 0.
    """

    def __init__(self, inner: LazyTensorLoader, mask: Mask, names: dict[str, str], base: ModelReference | None) -> None:
        super().__init__(inner.index, inner.lazy_unpickle)
        self.mask, self.names, self.base = mask, names, base

    def get_tensor(
        self, key: str, device: str = "cpu", aliases: list[str] | None = None, raise_on_missing: bool = True
    ) -> torch.Tensor | None:
        tensor = super().get_tensor(key, device, aliases, raise_on_missing)
        if tensor is None or key not in self.names:
            return tensor
        other = LoaderCache().get(self.base).get_tensor(key, device) if self.base else None
        return select_torch(torch.from_numpy(self.mask.kept(self.names[key])).to(device), tensor, other, key)


@dataclass(frozen=True)
class OutputMask:
    """The mask of a result, by output names. base: the model whose values dropped weights take; None: they are 0."""

    mask: Mask
    base: ModelReference | None

    def over(self, weight: WeightInfo) -> Callable[[int, torch.Tensor], torch.Tensor] | None:
        """What masks a tensor, if the mask covers it: a function of pieces, flat, each with its place (times 8).

        Raises BadInput where the base has no value for each of its weights.
        """
        name = weight.name
        if name not in self.mask:
            return None
        packed = self.mask.packed(name)
        other = self._in_base(weight).reshape(-1) if self.base else None

        def masked(at: int, piece: torch.Tensor) -> torch.Tensor:
            kept = torch.from_numpy(bits.unpack(packed[at // 8 :], piece.numel()))
            # The result may be narrower than the base: dropped weights take the base's value in the result's dtype.
            narrowed = None if other is None else other[at : at + piece.numel()].to(piece.dtype)
            return select_torch(kept, piece, narrowed, name)

        return masked

    def _in_base(self, weight: WeightInfo) -> torch.Tensor:
        """The base's tensor, of the mask's shape: flat pieces of another one would be other weights."""
        assert self.base is not None
        found, shape = named_as(weight, self.base).execute(), tuple(self.mask.shape(weight.name))
        if found is None or tuple(found.shape) != shape:
            there = "nothing" if found is None else str(tuple(found.shape))
            raise BadInput(f"{weight.name} is {shape} in the mask, {there} in the base of its delta")
        return found


def named_as(weight: WeightInfo, model: ModelReference, device: str | None = None) -> LoadTensor:
    """Reads what a model has as a tensor of the result, None where it has none.

    mergekit reads its inputs so: a tied head is the embeddings, and experts that are stored one by one are fused.
    """
    return LoadTensor(
        model=model,
        tensor=weight.name,
        device=device,
        optional=True,
        aliases=weight.aliases,
        tied_names=weight.tied_names,
    )


class OrderedConfiguration(MergeConfiguration):
    """mergekit's configuration, naming its models in the recipe's order.

    mergekit takes configuration and tokenizer from the first of them when there is no base, and keeps them in a set,
    whose order changes from run to run.
    """

    _order: list[ModelReference] = PrivateAttr(default_factory=list)

    def referenced_models(self) -> list[ModelReference]:
        found = super().referenced_models()
        return [m for m in dict.fromkeys(self._order) if m in found] + [m for m in found if m not in self._order]


class Inputs(Translation):
    """A document in mergekit's terms, in which names of earlier documents are the directories of their results.

    stages: these by name. work: a scratch directory.
    """

    def __init__(self, document: Document, book: MaskBook, stages: Mapping[str, Path], work: Path) -> None:
        super().__init__(document, book)
        self.stages, self.work = dict(stages), work
        self.delta_bases: list[ModelReference] = []  # what `delta_base` gave so far

    def configuration(self) -> OrderedConfiguration:
        """The document as mergekit's configuration."""
        configuration = OrderedConfiguration.model_validate(self.data())
        configuration._order = [ModelReference.model_validate(self.input(i)) for _, i in self.document.parts()]
        return configuration

    def absolute(self, reference: Reference) -> Reference:
        return absolute(reference, self.folder, self.stages)

    def mask_of(self, item: ModelInput | BaseInput) -> MaskUse | None:
        """The mask under which an input is read: its own, unless the merge method takes that as a parameter."""
        as_parameter = METHODS[self.document.merge_method].mask_as_parameter and isinstance(item, ModelInput)
        return None if as_parameter else item.mask

    def delta_base(self, use: MaskUse) -> ModelReference | None:
        """The model to which a delta mask returns dropped weights: `base:`, else the (masked) base model."""
        if use.on == "weights":
            return None
        base = BaseInput(model=use.base) if use.base else self.document.base_model
        assert base is not None  # checked when the recipe was read
        found = ModelReference.model_validate(self.input(base))
        self.delta_bases.append(found)
        return found


def _named(value: Any, files: Mapping[str, str], key: str = "") -> Any:
    """Plain values in which the texts under `mask` that are in `files`, also in rules and gradients, are replaced."""
    if isinstance(value, dict):
        return {k: _named(v, files, key if k == "value" else k) for k, v in value.items()}
    if isinstance(value, list):
        return [_named(v, files, key) for v in value]
    return files.get(value, value) if key == "mask" and isinstance(value, str) else value


class MaskedInputs(Inputs):
    """Inputs for a build. A masked input is a reference of its own: a view directory, which links to the model's, and
    for which there is a loader that masks. So one model can come in several times, masked apart.

    adapters: how mergekit merges adapters into models, as arguments of its `ModelReference.merged`.
    """

    def __init__(
        self, document: Document, book: MaskBook, stages: Mapping[str, Path], work: Path, options: MergeOptions
    ) -> None:
        super().__init__(document, book, stages, work)
        self.adapters: dict[str, object] = {
            "cache_dir": options.lora_merge_cache,
            "lora_merge_dtype": options.lora_merge_dtype,
            "trust_remote_code": options.trust_remote_code,
        }
        self.lazy_unpickle = options.lazy_unpickle
        self.views: dict[tuple[str, str], Any] = {}  # mergekit's references
        self._loaders: dict[ModelReference, Callable[[], LazyTensorLoader]] = {}

    def loaders(self) -> dict[ModelReference, LazyTensorLoader]:
        """New loaders of the masked inputs, for one thread."""
        return {reference: make() for reference, make in self._loaders.items()}

    def output_mask(self) -> OutputMask | None:
        """The result's mask, when the document has one."""
        use = self.document.mask
        return OutputMask(self.book.evaluate(use), self.delta_base(use)) if use else None

    def data(self) -> dict[str, Any]:
        """The configuration as plain values, in which parameters that are masks name files where they are."""
        found = super().data()
        files = {text: str(self.book.file(text)) for _, text in mask_parameters(self.document)}
        return dict(_named(found, files)) if files else found

    def model(self, item: ModelInput) -> dict[str, Any]:
        found = super().model(item)
        if item.mask and self.mask_of(item) is None:
            path = self.work / f"parameter-{len(list(self.work.glob('parameter-*')))}.mask"
            self.book.evaluate(item.mask).save(path)
            found["parameters"] = found.get("parameters", {}) | {"mask": str(path)}
        return found

    def input(self, item: ModelInput | BaseInput) -> Any:
        reference, mask = self.absolute(item.model), self.mask_of(item)
        return self._view(reference, mask) if mask else reference.to_mergekit()

    def _view(self, reference: Reference, use: MaskUse) -> Any:
        """mergekit's reference to the view directory of a masked model, made once for each model and mask."""
        key = (str(reference), use.model_dump_json())
        if key not in self.views:
            original = ModelReference.model_validate(reference.to_mergekit())
            merged = original.merged(**self.adapters)
            path = self.work / "views" / str(len(self.views)) / Path(reference.path).name
            path.mkdir(parents=True)
            # Of a model with an adapter: its own configuration and tokenizer, and the weights that mergekit merged.
            for source in dict.fromkeys((Path(reference.path), Path(merged.model.path))):
                for file in source.iterdir():
                    is_weight = file.suffix in (".safetensors", ".bin") or file.name.endswith(".index.json")
                    if file.is_file() and (source == Path(merged.model.path) or not is_weight):
                        (path / file.name).unlink(missing_ok=True)
                        (path / file.name).symlink_to(file.resolve())
            mask = self.book.evaluate(use)
            names, base = match(mask, opened(Path(merged.model.path), self.work), str(reference)), self.delta_base(use)
            found = Reference(path=str(path), override_architecture=reference.override_architecture).to_mergekit()
            self._loaders[ModelReference.model_validate(found)] = lambda: MaskedLoader(
                merged.lazy_loader(lazy_unpickle=self.lazy_unpickle), mask, names, base
            )
            self.views[key] = found
        return self.views[key]

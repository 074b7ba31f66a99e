"""mergekit, run with masks: inputs are masked while mergekit reads them, the result while it is written.

Two things of mergekit are replaced while a merge runs, both from outside: the loaders of masked models (put in its
loader cache beforehand) and its graph executor, whose place takes `TensorByTensor`, which holds the inputs of one
output tensor at a time. Planning, merge methods, tokenizer handling and configuration stay mergekit's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import FinalizeModel, LoaderCache, SaveTensor
from mergekit.options import MergeOptions
from pydantic import PrivateAttr

from mftmerge.checkpoint import Checkpoint
from mftmerge.checkpointwriter import SHARD_BYTES, CheckpointWriter
from mftmerge.dtypes import of_torch
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.mask import Mask
from mftmerge.matching import match
from mftmerge.recipe.catalogue import METHODS
from mftmerge.recipe.locate import absolute
from mftmerge.recipe.methods import register
from mftmerge.recipe.schema import BaseInput, Document, MaskUse, ModelInput, Reference
from mftmerge.recipe.translate import Translation
from mftmerge.select import select_torch

Progress = Callable[[int], None]  # bytes written so far


class MaskedLoader(LazyTensorLoader):
    """A checkpoint's loader that masks tensors as they are read. `names`: tensor of the checkpoint -> of the mask."""

    def __init__(
        self, inner: LazyTensorLoader, mask: Mask, names: dict[str, str], base: LazyTensorLoader | None
    ) -> None:
        super().__init__(inner.index, inner.lazy_unpickle)
        self.mask, self.names, self.base = mask, names, base

    def get_tensor(
        self, key: str, device: str = "cpu", aliases: list[str] | None = None, raise_on_missing: bool = True
    ) -> torch.Tensor | None:
        tensor = super().get_tensor(key, device, aliases, raise_on_missing)
        if tensor is None or key not in self.names:
            return tensor
        other = self.base.get_tensor(key, device) if self.base else None
        return select_torch(torch.from_numpy(self.mask.kept(self.names[key])).to(device), tensor, other, key)


@dataclass
class OutputMask:
    """The mask of a result, by output names; `base` (a loader) gives the dropped weights' values, else they are 0."""

    mask: Mask
    base: LazyTensorLoader | None

    def apply(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in self.mask:
            return tensor
        other = self.base.get_tensor(name) if self.base else None
        # The result may be narrower than the base: dropped weights take the base's value in the result's dtype.
        return select_torch(
            torch.from_numpy(self.mask.kept(name)), tensor, None if other is None else other.to(tensor.dtype), name
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


class MaskingTranslation(Translation):
    """A document as mergekit's configuration, with a view directory for each masked input.

    A view is a directory of links to a model's files under a name of its own, so that one model can be an input several
    times with different masks; its loader, which masks, is put in mergekit's loader cache.
    """

    def __init__(self, document: Document, folder: Path, stages: dict[str, Path], work: Path) -> None:
        super().__init__(document, folder)
        self.stages, self.work = stages, work
        self.views: dict[tuple[str, str], str] = {}
        self.lora_cache = work / "lora"

    def configuration(self) -> OrderedConfiguration:
        """The configuration; loaders of masked inputs are in mergekit's cache afterwards."""
        configuration = OrderedConfiguration.model_validate(self.data())
        configuration._order = [ModelReference.model_validate(self.input(i)) for _, i in self.document.parts()]
        return configuration

    def model(self, item: ModelInput) -> dict[str, Any]:
        found = super().model(item)
        if item.mask and METHODS[self.document.merge_method].mask_as_parameter:
            path = self.work / f"parameter-{len(list(self.work.glob('parameter-*')))}.mask"
            self.book.evaluate(item.mask.expression()).save(path)
            found["parameters"] = found.get("parameters", {}) | {"mask": str(path)}
        return found

    def absolute(self, reference: Reference) -> Reference:
        return absolute(reference, self.folder, self.stages)

    def input(self, item: ModelInput | BaseInput) -> Any:
        """mergekit's reference to an input: the model itself, or its view."""
        reference = self.absolute(item.model)
        as_parameter = METHODS[self.document.merge_method].mask_as_parameter and isinstance(item, ModelInput)
        return self.view(reference, item.mask) if item.mask and not as_parameter else reference.to_mergekit()

    def view(self, reference: Reference, use: MaskUse) -> str:
        """Make the view directory of a masked model (once for each model and mask) and its loader."""
        key = (str(reference), use.model_dump_json())
        if key not in self.views:
            original = ModelReference.model_validate(reference.to_mergekit())
            merged = original.merged(cache_dir=str(self.lora_cache))
            path = self.work / "views" / str(len(self.views)) / Path(reference.path).name
            path.mkdir(parents=True)
            for source in dict.fromkeys((Path(reference.path), Path(merged.model.path))):
                for file in source.iterdir():
                    is_weight = file.suffix in (".safetensors", ".bin") or file.name.endswith(".index.json")
                    if file.is_file() and (source == Path(merged.model.path) or not is_weight):
                        (path / file.name).unlink(missing_ok=True)
                        (path / file.name).symlink_to(file.resolve())
            mask = self.book.evaluate(use.expression())
            names = match(mask, Checkpoint.open(merged.model.path), str(reference))
            loader = MaskedLoader(merged.lazy_loader(), mask, names, self.delta_base(use))
            LoaderCache.loaders[ModelReference.model_validate(str(path))] = loader
            self.views[key] = str(path)
        return self.views[key]

    def delta_base(self, use: MaskUse) -> LazyTensorLoader | None:
        """Loader of the model to which a delta mask returns dropped weights: `base:`, else the (masked) base model."""
        if use.on == "weights":
            return None
        base = BaseInput(model=use.base) if use.base else self.document.base_model
        assert base is not None  # checked when the recipe was read
        return LoaderCache().get(ModelReference.model_validate(self.input(base)))

    def output_mask(self) -> OutputMask | None:
        """The result's mask, when the document has one."""
        use = self.document.mask
        return OutputMask(self.book.evaluate(use.expression()), self.delta_base(use)) if use else None


class TensorByTensor:
    """Stands in for mergekit's executor: evaluates one output tensor at a time, masks it, and writes it at once."""

    def __init__(self, out: Path, mask: OutputMask | None, random: bool, shard_bytes: int, progress: Progress | None):
        self.out, self.mask, self.random, self.shard_bytes = out, mask, random, shard_bytes
        self.progress = progress
        self.written: dict[str, int] = {}

    def __call__(self, targets: list[Any], math_device: Any = "cpu", storage_device: Any = "cpu") -> TensorByTensor:
        """Called by mergekit in place of its executor's constructor."""
        self.targets, self.device = list(targets), torch.device(math_device)
        return self

    def run(self, quiet: bool = False, desc: str | None = None) -> Iterator[tuple[Any, Any]]:
        """Do all the work; yields each target with its value, as mergekit expects."""
        saves = [t for t in self.targets if isinstance(t, SaveTensor)]
        if self.random:  # the same draws for the same tensors as mergekit, whose graph decides their order
            saves = _mergekit_order(self.targets, saves)
        planned = {t.tensor_name for t in saves}
        if self.mask and (unused := sorted(set(self.mask.mask.names) - planned)):
            raise BadInput(f"the output mask covers {unused[0]}, which the result will not have")
        others = [t for t in self.targets if not isinstance(t, SaveTensor | FinalizeModel)]
        shared: dict[Any, Any] = {}
        for task in others:  # the tokenizer
            shared[task] = task.execute(**{k: self.value(v, shared) for k, v in task.arguments().items()})
        with CheckpointWriter(self.out, [t.tensor_name for t in saves], self.shard_bytes) as writer:
            for task in saves:
                self.save(task, writer, shared)
                if self.progress:
                    self.progress(writer.total)
        yield from ((task, shared[task]) for task in others)

    def value(self, task: Any, shared: dict[Any, Any]) -> Any:
        """Value of a task of mergekit's graph; only `shared` ones are kept."""
        if task in shared:
            return shared[task]
        on_device = self.device.type != "cpu" and task.uses_accelerator()
        arguments = {k: _move(self.value(v, shared), self.device) if on_device else self.value(v, shared)
                     for k, v in task.arguments().items()}  # fmt: skip
        return task.execute(**arguments)

    def save(self, task: Any, writer: CheckpointWriter, shared: dict[Any, Any]) -> None:
        from mergekit.common import dtype_from_name

        tensor = self.value(task.tensor_task, shared)
        if tensor is None:
            if task.optional:
                return
            raise MftmergeError(f"mergekit gave no value for {task.tensor_name}")
        tensor = tensor.to("cpu", dtype_from_name(task.dtype) or tensor.dtype)
        if self.mask:
            tensor = self.mask.apply(task.tensor_name, tensor)
        flat = tensor.contiguous().reshape(-1)
        data = memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")
        writer.add(task.tensor_name, of_torch(tensor.dtype).code, tuple(tensor.shape), data)
        self.written[task.tensor_name] = data.nbytes


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return {k: _move(v, device) for k, v in value.items()} if isinstance(value, dict) else value


def _mergekit_order(targets: list[Any], saves: list[Any]) -> list[Any]:
    """`saves` in the order in which mergekit's own executor would evaluate them."""
    from mergekit.graph import Executor

    order = {handle.task(): i for i, handle in enumerate(Executor(targets).schedule.tasks)}
    return sorted(saves, key=lambda t: order[t.tensor_task])


@contextmanager
def _replaced_executor(executor: TensorByTensor) -> Iterator[None]:
    import mergekit.merge

    original = mergekit.merge.Executor
    mergekit.merge.Executor = executor
    try:
        yield
    finally:
        mergekit.merge.Executor = original


@contextmanager
def _fresh_loaders() -> Iterator[None]:
    """An empty loader cache: mergekit keeps it for the life of the process, also for files rewritten since."""
    kept = dict(LoaderCache.loaders)
    LoaderCache.loaders.clear()
    try:
        yield
    finally:
        LoaderCache.loaders.clear()
        LoaderCache.loaders.update(kept)


def merge(
    document: Document,
    folder: Path,
    out: Path,
    work: Path,
    *,
    stages: dict[str, Path] | None = None,
    seed: int | None = None,
    device: str = "cpu",
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Merge one document into `out` (mergekit's files); gives the bytes of each tensor written.

    folder: where relative paths start; stages: directories of earlier documents by name; work: a scratch directory.
    """
    register()
    with _fresh_loaders():
        translation = MaskingTranslation(document, folder, stages or {}, work)
        options = MergeOptions(
            lora_merge_cache=str(translation.lora_cache),
            quiet=True,
            write_model_card=False,
            random_seed=seed,
            device=device,
            allow_crimes=False,
        )
        LoaderCache().setup(options)
        configuration = translation.configuration()
        executor = TensorByTensor(
            out, translation.output_mask(), METHODS[document.merge_method].random, shard_bytes, progress
        )
        return run(configuration, out, options, executor)


def run(configuration: Any, out: Path, options: Any, executor: TensorByTensor) -> dict[str, int]:
    """mergekit's `run_merge` with our executor; mergekit's own failures become one line."""
    from mergekit.merge import run_merge

    with _replaced_executor(executor), _quiet():
        try:
            run_merge(configuration, str(out), options)
        except (RuntimeError, ValueError, TypeError, KeyError, OSError) as e:
            if isinstance(e, MftmergeError):
                raise
            raise MftmergeError(f"mergekit: {' '.join(str(e).split())}") from e
    return executor.written


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep mergekit's and transformers' remarks out of our output; errors are raised anyway."""
    loggers = [logging.getLogger(n) for n in ("mergekit", "transformers")] + [logging.getLogger()]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    bars = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    try:
        yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)
        if bars is None:
            del os.environ["HF_HUB_DISABLE_PROGRESS_BARS"]

"""One merge: mergekit plans it and does its arithmetic; here its plan is evaluated, one output tensor at a time.

`MergePlanner` gives a tree of tasks for each tensor of the result. Each tree is evaluated by itself, in as many threads
as there are cores, so that memory holds the inputs of the tensors in flight and nothing else. Masks come in where
tensors are read (`MaskedLoader`) and where they are written (`OutputMask`); planning, merge methods, tokenizers and
configurations are mergekit's. Every thread reads through a loader cache of its own, which mergekit provides for.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mergekit import merge as stock
from mergekit.architecture import get_architecture_info
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor, Task
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import FinalizeModel, LoaderCache, SaveTensor
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.tokenizer import TokenizerInfo
from pydantic import PrivateAttr
from transformers.trainer_utils import set_seed

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

Written = Callable[[int], None]  # called with the bytes written so far


@dataclass(frozen=True)
class Merged:
    """What one merge wrote: bytes of each tensor, and what the user should know."""

    sizes: dict[str, int]
    warnings: tuple[str, ...] = ()


# -- masks on what is read and written --------------------------------------------------------------------------------


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

    def apply(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, masked if the mask covers it."""
        if name not in self.mask:
            return tensor
        other = LoaderCache().get(self.base).get_tensor(name) if self.base else None
        # The result may be narrower than the base: dropped weights take the base's value in the result's dtype.
        narrowed = None if other is None else other.to(tensor.dtype)
        return select_torch(torch.from_numpy(self.mask.kept(name)), tensor, narrowed, name)


class OrderedConfiguration(MergeConfiguration):
    """mergekit's configuration, naming its models in the recipe's order.

    mergekit takes configuration and tokenizer from the first of them when there is no base, and keeps them in a set,
    whose order changes from run to run.
    """

    _order: list[ModelReference] = PrivateAttr(default_factory=list)

    def referenced_models(self) -> list[ModelReference]:
        found = super().referenced_models()
        return [m for m in dict.fromkeys(self._order) if m in found] + [m for m in found if m not in self._order]


@dataclass
class MaskedInputs(Translation):
    """A document in mergekit's terms. A masked input is a reference of its own: a view directory, which links to the
    model's, and for which `loaders` knows a loader that masks. So one model can come in several times, masked apart."""

    document: Document
    folder: Path
    stages: dict[str, Path]
    work: Path
    views: dict[tuple[str, str], str] = field(default_factory=dict)
    loaders: dict[ModelReference, Callable[[], LazyTensorLoader]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.document, self.folder)
        self.lora_cache = self.work / "lora"

    def configuration(self) -> OrderedConfiguration:
        """The document as mergekit's configuration."""
        configuration = OrderedConfiguration.model_validate(self.data())
        configuration._order = [ModelReference.model_validate(self.input(i)) for _, i in self.document.parts()]
        return configuration

    def output_mask(self) -> OutputMask | None:
        """The result's mask, when the document has one."""
        use = self.document.mask
        return OutputMask(self.book.evaluate(use.expression()), self._delta_base(use)) if use else None

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
        reference = self.absolute(item.model)
        as_parameter = METHODS[self.document.merge_method].mask_as_parameter and isinstance(item, ModelInput)
        return self._view(reference, item.mask) if item.mask and not as_parameter else reference.to_mergekit()

    def _view(self, reference: Reference, use: MaskUse) -> str:
        """The view directory of a masked model, made once for each model and mask."""
        key = (str(reference), use.model_dump_json())
        if key not in self.views:
            original = ModelReference.model_validate(reference.to_mergekit())
            merged = original.merged(cache_dir=str(self.lora_cache))
            path = self.work / "views" / str(len(self.views)) / Path(reference.path).name
            path.mkdir(parents=True)
            # Of a model with an adapter: its own configuration and tokenizer, and the weights that mergekit merged.
            for source in dict.fromkeys((Path(reference.path), Path(merged.model.path))):
                for file in source.iterdir():
                    is_weight = file.suffix in (".safetensors", ".bin") or file.name.endswith(".index.json")
                    if file.is_file() and (source == Path(merged.model.path) or not is_weight):
                        (path / file.name).unlink(missing_ok=True)
                        (path / file.name).symlink_to(file.resolve())
            mask = self.book.evaluate(use.expression())
            names, base = match(mask, Checkpoint.open(merged.model.path), str(reference)), self._delta_base(use)
            view = ModelReference.model_validate(str(path))
            self.loaders[view] = lambda: MaskedLoader(merged.lazy_loader(), mask, names, base)
            self.views[key] = str(path)
        return self.views[key]

    def _delta_base(self, use: MaskUse) -> ModelReference | None:
        """The model to which a delta mask returns dropped weights: `base:`, else the (masked) base model."""
        if use.on == "weights":
            return None
        base = BaseInput(model=use.base) if use.base else self.document.base_model
        assert base is not None  # checked when the recipe was read
        return ModelReference.model_validate(self.input(base))


# -- the plan, evaluated ----------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """Evaluates tasks of mergekit's plan. shared: values that several tensors need (the tokenizer)."""

    mask: OutputMask | None
    device: torch.device
    shared: dict[Task[Any], Any] = field(default_factory=dict)

    def value(self, task: Task[Any]) -> Any:
        """The value of a task and of all that it needs."""
        if task in self.shared:
            return self.shared[task]
        arguments = {name: self.value(needed) for name, needed in task.arguments().items()}
        if self.device.type != "cpu" and task.uses_accelerator():
            arguments = {name: _move(v, self.device) for name, v in arguments.items()}
        return task.execute(**arguments)

    @torch.no_grad()
    def tensor(self, task: SaveTensor) -> torch.Tensor | None:
        """An output tensor in its final dtype, masked, on the CPU; None where an optional one is absent."""
        tensor = self.value(task.tensor_task)
        if tensor is None:
            if task.optional:
                return None
            raise MftmergeError(f"mergekit gave no value for {task.tensor_name}")
        tensor = tensor.to("cpu", dtype_from_name(task.dtype) or tensor.dtype)
        return (self.mask.apply(task.tensor_name, tensor) if self.mask else tensor).contiguous()


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return {k: _move(v, device) for k, v in value.items()} if isinstance(value, dict) else value


def _in_order(
    compute: Callable[[SaveTensor], torch.Tensor | None],
    tasks: Sequence[SaveTensor],
    threads: int,
    begin: Callable[[], None],
) -> Iterator[tuple[SaveTensor, torch.Tensor | None]]:
    """Each task with its tensor, in order; as many are being computed, or wait to be taken, as there are threads.

    begin: called in each thread first. One thread is this one.
    """
    if threads < 2:
        yield from ((task, compute(task)) for task in tasks)
        return
    before = torch.get_num_threads()
    waiting: deque[tuple[SaveTensor, Future[torch.Tensor | None]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="merge", initializer=begin)
    try:
        for task in tasks:
            waiting.append((task, pool.submit(compute, task)))
            if len(waiting) > threads:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # torch keeps the number that the last thread set for the whole process


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
    progress: Written | None = None,
) -> Merged:
    """Merge one document into `out` (weights, configuration, tokenizer).

    folder: where relative paths start; stages: directories of earlier documents by name; work: a scratch directory;
    device: where arithmetic is done. Raises MftmergeError for mergekit's own failures.
    """
    register()
    inputs = MaskedInputs(document, folder, stages or {}, work)
    options = MergeOptions(
        lora_merge_cache=str(inputs.lora_cache), quiet=True, write_model_card=False, random_seed=seed, device=device
    )
    with _quiet():
        try:
            configuration, mask = inputs.configuration(), inputs.output_mask()
            with _reading(options, inputs):
                return _merge(configuration, options, inputs, mask, out, shard_bytes, progress)
        except (RuntimeError, ValueError, TypeError, KeyError, OSError) as e:
            if isinstance(e, MftmergeError):
                raise
            raise MftmergeError(f"mergekit: {' '.join(str(e).split())}") from e


def _merge(
    configuration: OrderedConfiguration,
    options: MergeOptions,
    inputs: MaskedInputs,
    mask: OutputMask | None,
    out: Path,
    shard_bytes: int,
    progress: Written | None,
) -> Merged:
    """What mergekit's `run_merge` does, with another way through the plan."""
    if options.random_seed is not None:
        set_seed(options.random_seed)
    architecture = get_architecture_info(configuration, options)
    config = stock._model_out_config(configuration, architecture)  # private, as are the others: the version is pinned
    for model in configuration.referenced_models():  # an absent one is found before anything is written
        LoaderCache().get(model)
    planner = MergePlanner(configuration, architecture, options=options, out_model_config=config)
    targets = planner.plan_to_disk(out_path=str(out))
    evaluation = Evaluation(mask, torch.device(options.device or "cpu"))
    for task in targets:
        if not isinstance(task, SaveTensor | FinalizeModel):
            evaluation.shared[task] = evaluation.value(task)
    warnings: list[str] = []
    sizes = _write(targets, evaluation, options, inputs, out, shard_bytes, progress)
    tokenizer = next((v.tokenizer for v in evaluation.shared.values() if isinstance(v, TokenizerInfo)), None)
    if tokenizer is not None:
        section = configuration.tokenizer
        stock._update_config_vocab(
            config, architecture, tokenizer, pad_to_multiple_of=section.pad_to_multiple_of if section else None
        )
    config.save_pretrained(out)
    if tokenizer is not None:
        stock._set_chat_template(tokenizer, configuration)
        tokenizer.save_pretrained(out)
    else:
        try:
            stock._copy_tokenizer(configuration, str(out), options=options)
        except Exception as e:  # transformers raises many kinds; the weights are whole, and mergekit goes on as well
            reason = " ".join(str(e).split()) or type(e).__name__
            warnings.append(f"the tokenizer could not be copied ({reason[:200]}); copy it from a model that has one")
    stock._copy_tagalong_files(configuration, str(out), files=architecture.tagalong_files or [], options=options)
    return Merged(sizes, tuple(warnings))


def _write(
    targets: Sequence[Task[Any]],
    evaluation: Evaluation,
    options: MergeOptions,
    inputs: MaskedInputs,
    out: Path,
    shard_bytes: int,
    progress: Written | None,
) -> dict[str, int]:
    """Evaluate and write every tensor; gives their bytes."""
    saves = [t for t in targets if isinstance(t, SaveTensor)]
    random = METHODS[inputs.document.merge_method].random
    if random:  # the same draws for the same tensors as mergekit, whose graph decides their order
        order = {handle.task(): i for i, handle in enumerate(Executor(list(targets)).schedule.tasks)}
        saves.sort(key=lambda t: order[t.tensor_task])
    if evaluation.mask and (unused := sorted({*evaluation.mask.mask.names} - {t.tensor_name for t in saves})):
        raise BadInput(f"the output mask covers {unused[0]}, which the result will not have")
    # Torch's threads inside each of hundreds of short operations wait for each other; one thread a tensor does not.
    threads = 1 if random or evaluation.device.type != "cpu" else min(torch.get_num_threads(), len(saves))

    def begin() -> None:
        torch.set_num_threads(1)
        _own_loaders(options, inputs)

    sizes: dict[str, int] = {}
    with CheckpointWriter(out, [t.tensor_name for t in saves], shard_bytes) as writer:
        for task, tensor in _in_order(evaluation.tensor, saves, threads, begin):
            if tensor is None:
                continue
            flat = tensor.reshape(-1)
            data = memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")
            writer.add(task.tensor_name, of_torch(tensor.dtype).code, tuple(tensor.shape), data)
            sizes[task.tensor_name] = data.nbytes
            if progress:
                progress(writer.total)
    return sizes


# -- mergekit's loader cache, and its remarks -------------------------------------------------------------------------


def _own_loaders(options: MergeOptions, inputs: MaskedInputs) -> None:
    """Give this thread's loader cache loaders of its own, masked models' among them.

    mergekit has one `LoaderCache` a thread. Its `loaders` belong to the class, where they would outlive a file that is
    rewritten, and be read by several threads at once; an attribute of the instance comes before that.
    """
    cache = LoaderCache()
    cache.setup(options)
    cache.loaders = {reference: make() for reference, make in inputs.loaders.items()}  # type: ignore[misc]


@contextmanager
def _reading(options: MergeOptions, inputs: MaskedInputs) -> Iterator[None]:
    """`_own_loaders` for this thread while the block lasts."""
    _own_loaders(options, inputs)
    try:
        yield
    finally:
        del LoaderCache().loaders


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

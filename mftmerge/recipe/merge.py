"""One merge: mergekit plans it and does its arithmetic; here its plan is evaluated, one output tensor at a time.

`MergePlanner` gives a tree of tasks for each tensor of the result. Each tree is evaluated by itself, in as many threads
as there are cores, so that memory holds the inputs of the tensors in flight and nothing else. Masks come in where
tensors are read and where they are written (inputs.py); planning, merge methods, tokenizers and
configurations are mergekit's. Every thread reads through a loader cache of its own, which mergekit provides for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mergekit import merge as stock
from mergekit.architecture import get_architecture_info
from mergekit.common import dtype_from_name
from mergekit.graph import Executor, Task
from mergekit.io.tasks import FinalizeModel, GatherTensors, LoaderCache, SaveTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.tokenizer import TokenizerInfo
from transformers.trainer_utils import set_seed

from mftmerge.checkpointwriter import CheckpointWriter
from mftmerge.dtypes import of_torch
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.machine import in_order
from mftmerge.recipe.catalogue import METHODS
from mftmerge.recipe.inputs import MaskedInputs, OrderedConfiguration, OutputMask
from mftmerge.recipe.methods import register
from mftmerge.recipe.reading import own_loaders, quiet, reading
from mftmerge.recipe.resultconfig import copy_generation_config, result_config
from mftmerge.recipe.schema import Document
from mftmerge.recipe.settings import BuildSettings

Written = Callable[[int], None]  # called with the bytes written so far


@dataclass(frozen=True)
class Merged:
    """What one merge wrote: each tensor's bytes and weights that are not finite, and what the user should know."""

    sizes: dict[str, int]
    warnings: tuple[str, ...] = ()
    not_finite: dict[str, int] = field(default_factory=dict)


# -- the plan, evaluated ----------------------------------------------------------------------------------------------


# Methods in which a weight of the result follows from the same weight of the inputs alone, so that a tensor can be
# merged in pieces: no copy of a whole tensor is made, and what a piece needs stays in the processor's cache. The others
# of the task-arithmetic family do so at density 1, where nothing is cut.
BY_ELEMENT = ("linear", "passthrough", "task_arithmetic")
AT_DENSITY_1 = ("ties", "dare_ties", "dare_linear", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear")
# Elements; a multiple of all vector widths: from four models on, torch adds the last few elements of a tensor in
# another order than the rest, and those are to be the tensor's own.
PIECE = 1 << 19


@dataclass
class Evaluation:
    """Evaluates tasks of mergekit's plan. shared: values that several tensors need (the tokenizer)."""

    mask: OutputMask | None
    device: torch.device
    shared: dict[Task[Any], Any] = field(default_factory=dict)
    not_finite: dict[str, int] = field(default_factory=dict)

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
        merge, dtype = task.tensor_task, dtype_from_name(task.dtype)
        tensor = self._in_pieces(merge, dtype) if self._by_element(merge) else self.value(merge)
        if tensor is None:
            if task.optional:
                return None
            raise MftmergeError(f"mergekit gave no value for {task.tensor_name}")
        tensor = tensor.to("cpu", dtype or tensor.dtype)
        tensor = (self.mask.apply(task.tensor_name, tensor) if self.mask else tensor).contiguous()
        if odd := _not_finite(tensor):
            self.not_finite[task.tensor_name] = odd
        return tensor

    def _by_element(self, task: Task[Any]) -> bool:
        if self.device.type != "cpu" or not isinstance(task, ExecuteMergeMethodTask):
            return False
        own = [dict(p.items()).get("density", 1) for _, p in task.input_parameters.items()]
        by_element = task.method_name in BY_ELEMENT or (task.method_name in AT_DENSITY_1 and set(own) <= {1})
        return by_element and isinstance(task.gather_tensors, GatherTensors)  # and not one that aligns vocabularies

    def _in_pieces(self, task: ExecuteMergeMethodTask, dtype: torch.dtype | None) -> torch.Tensor | None:
        """What `value(task)` gives in `dtype`, computed piece by piece."""
        gather = task.gather_tensors
        loads = gather.arguments()
        # Read as they are stored, which maps the file; the dtype of the arithmetic is for the pieces.
        stored = {name: load.model_copy(update={"dtype": None}).execute() for name, load in loads.items()}
        whole = gather.execute(**stored)
        if len({t.shape for t in whole.values()}) != 1 or not all(t.is_floating_point() for t in whole.values()):
            return self.value(task)  # buffers of whole numbers, or what mergekit is to refuse
        math = {model: dtype_from_name(loads[f"{model}:{w.name}"].dtype) for model, w in gather.weight_info.items()}
        flat = {model: t.reshape(-1) for model, t in whole.items()}
        first = next(iter(whole.values()))
        out: torch.Tensor | None = None
        for start in range(0, max(1, first.numel()), PIECE):
            part = slice(start, start + PIECE)
            merged = task.execute(tensors={m: t[part].to(math[m] or t.dtype) for m, t in flat.items()})
            if merged is None:
                return None
            if out is None:
                out = torch.empty(first.numel(), dtype=dtype or merged.dtype)
            out[part] = merged
        return None if out is None else out.view(first.shape)


def _not_finite(tensor: torch.Tensor) -> int:
    """How many weights are infinite or not a number."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0
    # The extremes of a tensor, which show one that is not finite, are found fifty times faster than all such weights.
    if all(math.isfinite(float(extreme)) for extreme in torch.aminmax(tensor)):
        return 0
    return tensor.numel() - int(torch.isfinite(tensor).sum())


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
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="merge", initializer=begin) as pool:
            yield from in_order(pool, compute, tasks, ahead=threads)
    finally:
        torch.set_num_threads(before)  # torch keeps the number that the last thread set for the whole process


def merge(
    document: Document,
    folder: Path,
    out: Path,
    work: Path,
    *,
    stages: Mapping[str, Path] | None = None,
    settings: BuildSettings | None = None,
    progress: Written | None = None,
) -> Merged:
    """Merge one document into `out` (weights, configuration, tokenizer).

    folder: where relative paths start; stages: directories of earlier documents by name; work: a scratch directory.
    Raises MftmergeError for mergekit's own failures.
    """
    register()
    inputs = MaskedInputs(document, folder, stages or {}, work)
    settings = settings or BuildSettings()
    options = MergeOptions(
        **settings.of_mergekit(),
        lora_merge_cache=str(inputs.lora_cache),
        quiet=True,
        write_model_card=False,
        random_seed=settings.seed,
        device="cuda" if settings.cuda else settings.device,
        num_threads=settings.num_threads,
    )
    with quiet():
        try:
            configuration, mask = inputs.configuration(), inputs.output_mask()
            with reading(options, inputs.loaders()):
                return _merge(configuration, options, inputs, mask, out, settings.shard_bytes, progress)
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
    config = result_config(configuration, architecture, options.trust_remote_code)
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
    copy_generation_config(configuration, out)
    return Merged(sizes, tuple(warnings), evaluation.not_finite)


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
    threads = (
        1
        if random or evaluation.device.type != "cpu"
        else min(options.num_threads or torch.get_num_threads(), len(saves))
    )

    def begin() -> None:
        torch.set_num_threads(1)
        own_loaders(options, inputs.loaders())

    sizes: dict[str, int] = {}
    with CheckpointWriter(out, [t.tensor_name for t in saves], shard_bytes) as writer:
        for task, tensor in _in_order(evaluation.tensor, saves, threads, begin):
            if tensor is None:
                continue
            flat = tensor.reshape(-1)
            data = memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")  # type: ignore[arg-type]
            writer.add(task.tensor_name, of_torch(tensor.dtype).code, tuple(tensor.shape), data)
            sizes[task.tensor_name] = data.nbytes
            if progress:
                progress(writer.total)
    return sizes

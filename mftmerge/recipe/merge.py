"""One merge: mergekit plans it and does its arithmetic; here its plan is evaluated, one output tensor at a time.

`MergePlanner` gives a tree of tasks for each tensor of the result. Each tree is evaluated by itself (evaluation.py), in
as many threads as there are cores, and goes to its place in the output at once. Masks come in where
tensors are read and where they are written (inputs.py); planning, merge methods, tokenizers and
configurations are mergekit's. Every thread reads through a loader cache of its own, which mergekit provides for.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mergekit import merge as stock
from mergekit.architecture import get_architecture_info
from mergekit.graph import Executor, Task
from mergekit.io.tasks import FinalizeModel, LoaderCache, SaveTensor
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.tokenizer import TokenizerInfo

from mftmerge.checkpoint import TensorEntry
from mftmerge.checkpointwriter import CheckpointWriter
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.machine import in_order, share_memory
from mftmerge.recipe.catalogue import COUNTED, METHODS
from mftmerge.recipe.drawing import Job, draws, with_numbers
from mftmerge.recipe.evaluation import Evaluation, Room
from mftmerge.recipe.inputs import MaskedInputs, OrderedConfiguration
from mftmerge.recipe.locate import MaskBook
from mftmerge.recipe.methods import register
from mftmerge.recipe.reading import own_loaders, quiet, reading
from mftmerge.recipe.remembered import remember
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


def merge(
    document: Document,
    book: MaskBook,
    out: Path,
    work: Path,
    tensors: Sequence[TensorEntry],
    *,
    stages: Mapping[str, Path] | None = None,
    settings: BuildSettings | None = None,
    progress: Written | None = None,
) -> Merged:
    """Merge one document into `out` (weights, configuration, tokenizer).

    book: the document's masks; work: a scratch directory; tensors: the result's, as planned; stages:
    directories of earlier documents by name.
    Raises MftmergeError for mergekit's own failures, BadInput for a device that this machine does not have.
    """
    register()
    remember()
    settings = settings or BuildSettings()
    options = MergeOptions(
        **settings.of_mergekit(),
        lora_merge_cache=str(settings.lora_merge_cache or work / "lora"),
        quiet=True,
        write_model_card=False,
        random_seed=settings.seed,
        device=_device(settings),
    )
    inputs = MaskedInputs(document, book, stages or {}, work, options)
    with quiet():
        try:
            configuration = inputs.configuration()
            output = Output(out, {e.name: e for e in tensors}, settings, progress)
            with reading(options, inputs.loaders()):
                return _merge(configuration, options, inputs, output)
        except (RuntimeError, ValueError, TypeError, KeyError, OSError) as e:
            full = isinstance(e, OSError) and e.filename is None  # whoever has made the output says where
            if isinstance(e, MftmergeError) or full:
                raise
            raise MftmergeError(f"mergekit: {' '.join(str(e).split())}") from e


def _device(settings: BuildSettings) -> str:
    name = "cuda" if settings.cuda else settings.device
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as e:  # of a build of torch without CUDA: the second
        raise BadInput(f"--device {name}: {' '.join(str(e).split())[:200]}") from None
    return name


@dataclass(frozen=True)
class Output:
    """Where the result goes: its directory, and its tensors by name."""

    folder: Path
    tensors: Mapping[str, TensorEntry]
    settings: BuildSettings
    progress: Written | None


def _merge(configuration: OrderedConfiguration, options: MergeOptions, inputs: MaskedInputs, output: Output) -> Merged:
    """What mergekit's `run_merge` does, with another way through the plan."""
    if options.random_seed is not None:
        _seed(options.random_seed)
    architecture = get_architecture_info(configuration, options)
    config = result_config(configuration, architecture, options.trust_remote_code)
    mask, out = inputs.output_mask(), output.folder
    # An absent one is found before anything is written, and an adapter is merged before threads ask for it: the second
    # one would read what the first one is still writing.
    for model in [*configuration.referenced_models(), *inputs.delta_bases]:
        LoaderCache().get(model)
    planner = MergePlanner(configuration, architecture, options=options, out_model_config=config)
    targets = planner.plan_to_disk(out_path=str(out))
    evaluation = Evaluation(mask, torch.device(options.device or "cpu"))
    for task in targets:
        if not isinstance(task, SaveTensor | FinalizeModel):
            with redirect_stderr(io.StringIO()):  # the tokenizer's draws a bar, which nothing else turns off
                evaluation.shared[task] = evaluation.value(task)
    warnings: list[str] = []
    sizes = _write(targets, evaluation, options, inputs, output)
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
    elif output.settings.copy_tokenizer:
        try:
            stock._copy_tokenizer(configuration, str(out), options=options)
        except Exception as e:  # transformers raises many kinds; the weights are whole, and mergekit goes on as well
            reason = " ".join(str(e).split()) or type(e).__name__
            warnings.append(f"the tokenizer could not be copied ({reason[:200]}); copy it from a model that has one")
    stock._copy_tagalong_files(configuration, str(out), files=architecture.tagalong_files or [], options=options)
    copy_generation_config(configuration, out)
    return Merged(sizes, tuple(warnings), evaluation.not_finite)


def _seed(seed: int) -> None:
    """What `transformers.set_seed` does, whose module imports models and peft; torch seeds all its devices."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _write(
    targets: Sequence[Task[Any]], evaluation: Evaluation, options: MergeOptions, inputs: MaskedInputs, output: Output
) -> dict[str, int]:
    """Evaluate and write every tensor; gives their bytes."""
    tensors, method = output.tensors, inputs.document.merge_method
    jobs = [
        Job(t, tensors[t.tensor_name].size) for t in targets if isinstance(t, SaveTensor) and t.tensor_name in tensors
    ]
    threads = min(output.settings.threads if evaluation.device.type == "cpu" else 1, len(jobs))
    if options.lazy_unpickle and not all(loader.index.is_safetensors for loader in LoaderCache().loaders.values()):
        # mergekit opens such files under patches of pickle and of torch.nn.Module that hold for the whole process: two
        # threads would undo each other's, and every model made afterwards would be without data.
        threads = 1
    if METHODS[method].random:  # the same draws for the same tensors as mergekit, whose graph decides their order
        order = {handle.task(): i for i, handle in enumerate(Executor(list(targets)).schedule.tasks)}
        jobs.sort(key=lambda j: order[j.task.tensor_task])
        threads = threads if method in COUNTED else 1
    else:
        jobs.sort(key=lambda j: -j.size)  # so that no thread is left alone with a large one at the end
    if evaluation.mask and (unused := sorted({*evaluation.mask.mask.names} - {j.task.tensor_name for j in jobs})):
        raise BadInput(f"the output mask covers {unused[0]}, which the result will not have")
    evaluation.room = Room(max((j.size for j in jobs), default=0))

    def begin() -> None:
        # Torch's threads inside each of hundreds of short operations wait for each other; one thread a tensor does not.
        torch.set_num_threads(1)
        own_loaders(options, inputs.loaders())

    planned: dict[str, tuple[str, tuple[int, ...]]] = {n: (e.dtype, tuple(e.shape)) for n, e in tensors.items()}
    with CheckpointWriter.planned(output.folder, planned, output.settings.shard_bytes) as writer:

        def save(job: Job) -> int:
            return evaluation.save(job, partial(writer.write, job.task.tensor_name))

        if METHODS[method].random and threads > 1:
            counted = [replace(j, draws=draws(j.task, j.size)) for j in jobs]
            done = _in_threads(save, with_numbers(counted), threads, begin)
        else:
            done = _in_threads(save, jobs, threads, begin)
        sizes: dict[str, int] = {}
        for job, nbytes in done:
            sizes[job.task.tensor_name] = nbytes
            if output.progress:
                output.progress(writer.total)
    return sizes


def _in_threads(
    save: Callable[[Job], int], jobs: Iterable[Job], threads: int, begin: Callable[[], None]
) -> Iterator[tuple[Job, int]]:
    """Each job with what `save` gives for it. begin: called in each thread first. One thread is this one."""
    if threads < 2:
        yield from ((job, save(job)) for job in jobs)
        return
    before = torch.get_num_threads()
    share_memory()
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="merge", initializer=begin) as pool:
            yield from in_order(pool, save, jobs, ahead=4 * threads)
    finally:
        torch.set_num_threads(before)  # torch keeps the number that the last thread set for the whole process

"""mergekit's plan evaluated, one output tensor at a time: its own tasks and methods do the arithmetic.

Where a merge method looks at each weight by itself, a tensor is merged and handed on in pieces, so that memory holds
pieces and not tensors. Other methods see whole tensors; then `Room` lets several be merged at a time only while they
are together no larger than the largest. Random methods get, for each tensor, the numbers that mergekit would draw.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors, SaveTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from torch.overrides import TorchFunctionMode

from mftmerge.errors import MftmergeError
from mftmerge.machine import give_back
from mftmerge.recipe import sorting
from mftmerge.recipe.catalogue import by_element
from mftmerge.recipe.inputs import OutputMask

Write = Callable[[int, memoryview], None]  # takes bytes of a tensor, and which of its bytes is the first
# Elements; a multiple of all vector widths: from four models on, torch adds the last few elements of a tensor in
# another order than the rest, and those are to be the tensor's own.
PIECE = 1 << 18


@dataclass(frozen=True)
class Job:
    """One output tensor. size: its weights. draws: random numbers that it takes, from state `start` to `end`."""

    task: SaveTensor
    size: int
    draws: int = 0
    start: torch.Tensor | None = None
    end: torch.Tensor | None = None


@dataclass
class Evaluation:
    """Evaluates tasks of mergekit's plan. shared: values that several tensors need (the tokenizer)."""

    mask: OutputMask | None
    device: torch.device
    shared: dict[Task[Any], Any] = field(default_factory=dict)
    not_finite: dict[str, int] = field(default_factory=dict)
    room: Room = field(default_factory=lambda: Room(math.inf))

    def value(self, task: Task[Any]) -> Any:
        """The value of a task and of all that it needs."""
        if task in self.shared:
            return self.shared[task]
        arguments = {name: self.value(needed) for name, needed in task.arguments().items()}
        if self.device.type != "cpu" and task.uses_accelerator():
            arguments = {name: _move(v, self.device) for name, v in arguments.items()}
        return task.execute(**arguments)

    @torch.no_grad()
    def save(self, job: Job, write: Write) -> int:
        """Hand an output tensor on in its final dtype, masked; gives its bytes."""
        task, name, dtype = job.task, job.task.tensor_name, dtype_from_name(job.task.dtype)
        mask = self.mask.over(name) if self.mask else None
        cut = sorting.in_pieces(task.tensor_task) and self._aligned(task.tensor_task)
        whole = not cut and not self._by_element(task.tensor_task)
        with self.room.taken(job.size) if whole or cut else nullcontext(), _numbers(job):
            at = count = 0
            for part in [self._whole(task)] if whole else self._pieces(task.tensor_task):
                part = part.to("cpu", dtype or part.dtype)
                part = (mask(at, part) if mask else part).contiguous()
                if odd := _not_finite(part):
                    self.not_finite[name] = self.not_finite.get(name, 0) + odd
                if part.numel():
                    write(count, memoryview(part.view(torch.uint8).numpy().data))
                at, count = at + part.numel(), count + part.nbytes
            del part
        if whole or cut:
            give_back()
        return count

    def _whole(self, task: SaveTensor) -> torch.Tensor:
        tensor: torch.Tensor | None
        with sorting.Sorts(sorting.of_whole) if sorting.sorts(task.tensor_task) else nullcontext():
            tensor = self.value(task.tensor_task)
        if tensor is None:
            raise MftmergeError(f"mergekit gave no value for {task.tensor_name}")
        return tensor.reshape(-1)

    def _by_element(self, task: Task[Any]) -> bool:
        if not isinstance(task, ExecuteMergeMethodTask):
            return False
        densities = [dict(p.items()).get("density", 1) for _, p in task.input_parameters.items()]
        return by_element(task.method_name, set(densities) <= {1}) and self._aligned(task)

    def _aligned(self, task: Task[Any]) -> bool:
        """Whether pieces of the inputs belong together as they are stored: no vocabularies are to be aligned first."""
        on_cpu = self.device.type == "cpu"
        return on_cpu and isinstance(task, ExecuteMergeMethodTask) and isinstance(task.gather_tensors, GatherTensors)

    def _pieces(self, task: ExecuteMergeMethodTask) -> Iterator[torch.Tensor]:
        """What `value(task)` gives, flat, piece by piece."""
        gather = task.gather_tensors
        loads = gather.arguments()
        # Read as they are stored, which maps the file; the dtype of the arithmetic is for the pieces.
        stored = {name: load.model_copy(update={"dtype": None}).execute() for name, load in loads.items()}
        whole = gather.execute(**stored)
        if len({t.shape for t in whole.values()}) != 1 or not all(t.is_floating_point() for t in whole.values()):
            # buffers of whole numbers, or what mergekit is to refuse
            yield self.value(task).reshape(-1)
            return
        math = {model: dtype_from_name(loads[f"{model}:{w.name}"].dtype) for model, w in gather.weight_info.items()}
        flat = {model: t.reshape(-1) for model, t in whole.items()}

        def merge(part: slice, models: Iterable[ModelReference] = tuple(flat)) -> torch.Tensor:
            merged = task.execute(tensors={m: flat[m][part].to(math[m] or flat[m].dtype) for m in models})
            if merged is None:
                raise MftmergeError(f"mergekit gave no value for {task.output_weight.name}")
            return merged

        size = next(iter(flat.values())).numel()
        parts = [slice(start, start + PIECE) for start in range(0, max(1, size), PIECE)]
        selections = sorting.selections(task, merge, flat, parts, size) if sorting.in_pieces(task) else []
        for part in parts:
            with sorting.Sorts(sorting.of_part(selections, part)) if selections else nullcontext():
                yield merge(part)


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


class Room:
    """Lets tensors in while they have together at most `limit` weights; a larger one when it is alone."""

    def __init__(self, limit: float) -> None:
        self.limit, self._taken = limit, 0
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Wait until there is room for `size` weights, and hold it during the block."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + size <= self.limit)
            self._taken += size
        try:
            yield
        finally:
            with self._changed:
                self._taken -= size
                self._changed.notify_all()


# -- random numbers ---------------------------------------------------------------------------------------------------
#
# mergekit draws from torch's one default generator, tensor after tensor. For two tensors to be merged at a time each
# needs the generator as it would have been at its turn. `torch.bernoulli` takes one number of it for each weight, so
# the turn is found by passing over numbers, which takes a fifth of the time that drawing takes.


def with_numbers(jobs: Sequence[Job]) -> Iterator[Job]:
    """The jobs, in the order in which mergekit merges them, each with the state of the generator at its turn.

    At the end torch's default generator is where mergekit would have left it.
    """
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    for job in jobs:
        start = generator.get_state()
        _pass_over(generator, job.draws)
        yield replace(job, start=start, end=generator.get_state())
    torch.set_rng_state(generator.get_state())


def draws(task: SaveTensor, size: int) -> int:
    """Random numbers that DARE or DELLA take for a tensor: one for each weight of a task vector that is thinned out."""
    merge = task.tensor_task
    assert isinstance(merge, ExecuteMergeMethodTask)
    densities: Iterable[float] = (dict(p.items()).get("density", 1) for _, p in merge.input_parameters.items())
    drawn = sum(d < 1 and (d > 0 or not merge.method_name.startswith("della")) for d in densities)
    return drawn * size


def _pass_over(generator: torch.Generator, count: int) -> None:
    buffer = torch.empty(min(count, 1 << 20), dtype=torch.int32)
    for start in range(0, count, 1 << 20):
        buffer[: count - start].random_(generator=generator)


class _Draw(TorchFunctionMode):
    """In this thread, while it lasts, `torch.bernoulli` draws from a generator of ours."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        more = {"generator": self.generator} if func is torch.bernoulli else {}
        return func(*args, **(kwargs or {}), **more)


@contextmanager
def _numbers(job: Job) -> Iterator[None]:
    """Draw from the job's own numbers. Raises MftmergeError where another number of them was drawn than was counted."""
    if job.start is None or job.end is None:
        yield
        return
    generator = torch.Generator()
    generator.set_state(job.start)
    with _Draw(generator):
        yield
    if not torch.equal(generator.get_state(), job.end):
        name = job.task.tensor_name
        raise MftmergeError(f"{name}: mergekit drew other random numbers than were counted; give --num-threads 1")

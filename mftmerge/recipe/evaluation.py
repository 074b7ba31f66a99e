"""mergekit's plan evaluated, one output tensor at a time: its own tasks and methods do the arithmetic.

Where a merge method looks at each weight by itself, perhaps once some numbers of the whole tensor are known (arc.py,
sorting.py, drawing.py), a tensor is merged and handed on in pieces, so that memory holds pieces and not tensors. Other
methods see whole tensors; then `Room` lets several be merged at a time only while they are together no larger than the
largest. Random methods get, for each tensor, the numbers that mergekit would draw.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors, SaveTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

from mftmerge.errors import MftmergeError
from mftmerge.machine import give_back
from mftmerge.recipe import arc, drawing, sorting
from mftmerge.recipe.catalogue import by_element
from mftmerge.recipe.drawing import Job
from mftmerge.recipe.inputs import OutputMask

Write = Callable[[int, memoryview], None]  # takes bytes of a tensor, and which of its bytes is the first
# Elements; a multiple of all vector widths: from four models on, torch adds the last few elements of a tensor in
# another order than the rest, and those are to be the tensor's own.
PIECE = 1 << 20


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
        assert isinstance(task.tensor_task, ExecuteMergeMethodTask)
        mask = self.mask.over(task.tensor_task.output_weight) if self.mask else None
        whole = not self._in_pieces(task.tensor_task)
        with self.room.taken(job.size) if whole else nullcontext(), drawing.numbers(job):
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
        if whole:
            give_back()
        return count

    def _whole(self, task: SaveTensor) -> torch.Tensor:
        tensor: torch.Tensor | None
        with sorting.Sorts(sorting.of_whole) if sorting.sorts(task.tensor_task) else nullcontext():
            tensor = self.value(task.tensor_task)
        if tensor is None:
            raise MftmergeError(f"mergekit gave no value for {task.tensor_name}")
        return tensor.reshape(-1)

    def _in_pieces(self, task: Task[Any]) -> bool:
        """Whether a tensor can be merged weight by weight, perhaps once something is known of the whole tensor.

        Pieces of the inputs must belong together as they are stored: no vocabularies are to be aligned first.
        """
        if not isinstance(task, ExecuteMergeMethodTask) or not isinstance(task.gather_tensors, GatherTensors):
            return False
        densities = [dict(p.items()).get("density", 1) for _, p in task.input_parameters.items()]
        plain = by_element(task.method_name, set(densities) <= {1})
        return self.device.type == "cpu" and (
            plain or sorting.in_pieces(task) or drawing.in_pieces(task) or arc.in_pieces(task)
        )

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
        asked = {model: dtype_from_name(loads[f"{model}:{w.name}"].dtype) for model, w in gather.weight_info.items()}
        loaded = {model: asked[model] or t.dtype for model, t in whole.items()}
        # mergekit promotes what is merged together to one dtype, before anything is sorted or drawn. Of some of the
        # models it would find another than of all.
        common = dtype_from_name(task.dtype) or reduce(torch.promote_types, loaded.values())
        flat = {model: t.reshape(-1) for model, t in whole.items()}

        def merged(tensors: dict[ModelReference, torch.Tensor]) -> torch.Tensor:
            found = task.execute(tensors={m: t.to(loaded[m]).to(common) for m, t in tensors.items()})
            if found is None:
                raise MftmergeError(f"mergekit gave no value for {task.output_weight.name}")
            return found

        def merge(part: slice, models: Iterable[ModelReference] = tuple(flat)) -> torch.Tensor:
            return merged({m: flat[m][part] for m in models})

        def merge_rows(rows: drawing.Rows, models: Iterable[ModelReference]) -> torch.Tensor:
            return merged({m: whole[m][rows] for m in models})

        one = next(iter(whole.values()))
        size = one.numel()
        if arc.in_pieces(task) and len(flat) == 2 and size:
            yield from arc.merged(task, flat, loaded)
            return
        parts = [slice(start, start + PIECE) for start in range(0, max(1, size), PIECE)]
        answers: Callable[[slice], AbstractContextManager[Any]] = nullcontext
        if sorting.in_pieces(task):
            with self.room.taken(size):
                answers = partial(sorting.of_part, sorting.selections(task, merge, flat, parts, size))
            give_back()
        elif drawing.in_pieces(task):
            room = partial(self.room.taken, size)
            answers = partial(drawing.Answers, drawing.thinned(task, merge_rows, flat, _rows(one), size, room))
            give_back()
        for part in parts:
            with answers(part):
                piece = merge(part)
            yield piece


def _rows(tensor: torch.Tensor) -> list[drawing.Rows]:
    """The rows of a tensor in pieces; one of all where it has no rows."""
    if tensor.dim() < 2 or not tensor.numel():
        return [slice(None)] if tensor.dim() else [...]
    step = max(1, PIECE * tensor.shape[0] // tensor.numel())
    return [slice(start, start + step) for start in range(0, tensor.shape[0], step)]


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

"""Merge methods that draw at random which changes they keep: with mergekit's own numbers, and in pieces.

mergekit draws from torch's one default generator, tensor after tensor. For two tensors to be merged at a time each
needs the generator as it would have been at its turn. `torch.bernoulli` takes one number of it for each weight, so the
turn is found by passing over numbers, which takes a fifth of the time that drawing takes (`with_numbers`, `numbers`).

Of a tensor, what is drawn and the two sums that rescale what is kept are found for each task vector first (`thinned`);
the rest follows weight by weight, in pieces, with these as the answers (`Answers`). The arithmetic is mergekit's own
code throughout: functions that it calls of torch are answered while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from types import EllipsisType
from typing import Any, TypeGuard

import torch
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.io.tasks import SaveTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from torch.overrides import TorchFunctionMode

from mftmerge.errors import MftmergeError
from mftmerge.recipe.catalogue import COUNTED


@dataclass(frozen=True)
class Job:
    """One output tensor. size: its weights. draws: random numbers that it takes, from state `start` to `end`."""

    task: SaveTensor
    size: int
    draws: int = 0
    start: torch.Tensor | None = None
    end: torch.Tensor | None = None


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
    return size * sum(_is_thinned(merge, model) for model, _ in merge.input_parameters.items())


def _is_thinned(merge: ExecuteMergeMethodTask, model: ModelReference) -> bool:
    density: float = dict(merge.input_parameters[model].items()).get("density", 1)
    return density < 1 and (density > 0 or not merge.method_name.startswith("della"))


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
        if func is not torch.bernoulli:
            return func(*args, **(kwargs or {}))
        if args[0].device.type == "cpu" and args[0].dtype != torch.float64 and _agrees():
            return drawn(args[0], self.generator)
        return func(*args, **(kwargs or {}), generator=self.generator)


BITS = (1 << 24) - 1  # of a 32-bit number, which torch makes a float in [0, 1) of


def drawn(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What `torch.bernoulli` gives for these probabilities on a CPU, in a third of the time: many at a time."""
    numbers = torch.empty(probabilities.shape, dtype=torch.int32).random_(generator=generator)
    uniform = numbers.bitwise_and_(BITS).to(torch.float32).mul_(2.0**-24)
    return (uniform < probabilities).to(probabilities.dtype)


@cache
def _agrees() -> bool:
    """Whether this version of torch draws as `drawn` does."""
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
        probabilities = torch.rand(1 << 12, generator=ours, dtype=torch.float32).to(dtype)
        theirs.set_state(ours.get_state())
        same = torch.equal(drawn(probabilities, ours), torch.bernoulli(probabilities, generator=theirs))
        if not same or not torch.equal(ours.get_state(), theirs.get_state()):
            return False
    return True


@contextmanager
def numbers(job: Job) -> Iterator[None]:
    """Draw from the job's own numbers. Raises MftmergeError where another number of them was drawn than was counted."""
    if job.start is None or job.end is None:
        with _Draw(torch.default_generator):
            yield
        return
    generator = torch.Generator()
    generator.set_state(job.start)
    with _Draw(generator):
        yield
    if not torch.equal(generator.get_state(), job.end):
        name = job.task.tensor_name
        raise MftmergeError(f"{name}: mergekit drew other random numbers than were counted; give --num-threads 1")


# -- in pieces --------------------------------------------------------------------------------------------------------

Rows = slice | EllipsisType  # all of a tensor that has none
Merge = Callable[[Rows, Iterable[ModelReference]], object]  # of rows of some models' tensors


@dataclass(frozen=True)
class Thinned:
    """A task vector's weights that were drawn (flat), and the sums of magnitudes before and after, where asked for."""

    kept: torch.Tensor
    sums: list[torch.Tensor] = field(default_factory=list)


def in_pieces(task: Task[Any]) -> TypeGuard[ExecuteMergeMethodTask]:
    """Whether a merge draws what it keeps of each task vector, and does the rest weight by weight."""
    return isinstance(task, ExecuteMergeMethodTask) and task.method_name in COUNTED and task.base_model is not None


def thinned(
    task: ExecuteMergeMethodTask,
    merge: Merge,
    models: Iterable[ModelReference],
    rows: Sequence[Rows],
    size: int,
    room: Callable[[], AbstractContextManager[None]],
) -> list[Thinned]:
    """What the merge draws of each task vector, in its order.

    merge(rows, models): merges these rows of some of the models. With the base and one other it is begun for what it
    draws, rows after rows. What it would sum, the whole task vector's magnitudes before and after, is kept meanwhile
    and summed at once: of pieces the order of additions would be another.
    room: taken while there is a whole task vector.
    """
    assert task.base_model is not None
    found = []
    rescaled = dict(task.parameters.items())["rescale"]
    for model in task.model_order:
        if model == task.base_model or model not in models or not _is_thinned(task, model):
            continue
        one = Thinned(torch.empty(size, dtype=torch.bool))
        with room() if rescaled else nullcontext():
            at, vector = 0, torch.empty(0)
            for part in rows:
                drawing = _Drawing()
                with suppress(_Seen), drawing:
                    merge(part, (task.base_model, model))
                stop = at + drawing.kept.numel()
                one.kept[at:stop] = drawing.kept.reshape(-1)
                if rescaled:
                    vector = vector if at else torch.empty(size, dtype=drawing.vector.dtype)
                    vector[at:stop] = drawing.vector.reshape(-1)
                at = stop
            if rescaled:
                one.sums.append(vector.abs_().sum())
                one.sums.append(vector.mul_(one.kept).sum())
        found.append(one)
    return found


class _Seen(Exception):
    """Ends a merge that was begun to see what it draws or sums."""


class _Drawing(TorchFunctionMode):
    """Notes what is drawn, and of which task vector, and ends where the one is multiplied with the other."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = self.vector = torch.empty(0)
        self.drawn = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.argsort:  # DELLA's second sort: of places, which turns order into ranks
            places, dim = args[0], (kwargs or {})["dim"]
            ranks = torch.arange(places.shape[dim]).view([-1 if d == dim else 1 for d in range(places.dim())])
            return torch.empty_like(places).scatter_(dim, places, ranks.expand_as(places))
        if func is torch.Tensor.mul and self.drawn:
            self.vector = args[0]
            raise _Seen
        found = func(*args, **(kwargs or {}))
        if func is torch.bernoulli:
            self.kept, self.drawn = found, True
        return found


class Answers(TorchFunctionMode):
    """While it lasts, a method draws and sums of a piece of its task vectors what was found of them whole."""

    def __init__(self, thinned: Iterable[Thinned], part: slice) -> None:
        super().__init__()
        self.rest, self.part = iter(thinned), part
        self.sums: Iterator[torch.Tensor] = iter(())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.bernoulli:
            one = next(self.rest)
            self.sums = iter(one.sums)
            return one.kept[self.part].to(args[0].dtype).view_as(args[0])
        if func is torch.Tensor.sum and len(args) == 1 and not kwargs:
            return next(self.sums)
        if func is torch.argsort:  # what DELLA ranks comes to probabilities, which were drawn from already
            return torch.arange(args[0].shape[-1]).expand_as(args[0])
        if func is torch.Tensor.argsort:
            return args[0]
        return func(*args, **(kwargs or {}))

"""What comes first in a sort by torch, without sorting: the weights that TIES and breadcrumbs keep of a task vector.

mergekit sorts all magnitudes of a tensor and takes a range of the order. On a CPU torch sorts with C++'s `std::sort`, a
quicksort that is not stable: of equal magnitudes, of which changes of bfloat16 weights have thousands, those come first
that its partitions happen to have moved ahead. `first` makes these partitions, with the same pivots and swaps, but goes
on only with the part in which the cut lies: the same weights in linear time. Where torch sorts in another way (`agrees`
compares the two, once), or a number is not one, the sort is torch's own.

`Sorts` hands a method's sorts to a function of ours. So mergekit's own code merges a tensor in pieces: first each model
by itself, to see what it would sort (`selections`), then all of them with the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from types import SimpleNamespace
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.sparsify import sparsify
from torch.overrides import TorchFunctionMode

from mftmerge.cut import DIGIT, locate
from mftmerge.recipe.catalogue import SORTED

Bools = npt.NDArray[np.bool_]
Bits = npt.NDArray[np.uint32]
Places = npt.NDArray[np.intp]
BLOCK = 1 << 16  # elements that a processor's cache holds beside their places
SMALL = 16  # std::sort leaves ranges of so many to an insertion sort, which is stable
INFINITY = 0x7F800000  # the bits of a float32; above are NaN, and negative numbers
PROBE = 1 << 13  # elements; fewer are sorted


@dataclass(frozen=True)
class Range:
    """Elements of the order in which a method sorts: which end is first, and which part of it the method takes."""

    descending: bool
    part: slice


Answer = Callable[[torch.Tensor, Range], torch.Tensor]
Merge = Callable[[slice, Iterable[ModelReference]], torch.Tensor]


class Sorts(TorchFunctionMode):
    """In this thread, while it lasts, a method's sorts of a flat tensor give what `answer` makes of tensor and range.

    Answers are booleans in the place of the indices that a method takes of an order: both say where to put a 1.
    """

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.argsort, torch.sort) or args[0].dim() != 1:
            return func(*args, **kwargs)
        order = _Order(self.answer, args[0], bool(kwargs.get("descending", False)))
        return order if func is torch.argsort else SimpleNamespace(indices=order)


@dataclass(frozen=True)
class _Order:
    answer: Answer
    tensor: torch.Tensor
    descending: bool

    def __getitem__(self, part: slice) -> torch.Tensor:
        return self.answer(self.tensor, Range(self.descending, part))


def of_whole(tensor: torch.Tensor, wanted: Range) -> torch.Tensor:
    """Answers sorts of whole tensors, for `Sorts`."""
    return torch.from_numpy(kept(tensor.numpy().view(np.uint32).copy(), wanted))


def of_part(selections: Sequence[Bools], part: slice) -> Sorts:
    """Answers a method's sorts of one piece of a tensor, in their order, with what is selected of the whole tensor."""
    rest = iter(selections)
    return Sorts(lambda tensor, wanted: torch.from_numpy(next(rest)[part]))


def sorts(task: Task[Any]) -> TypeGuard[ExecuteMergeMethodTask]:
    """Whether a merge sorts magnitudes to take a range of their order; other methods may want more of a sort."""
    return isinstance(task, ExecuteMergeMethodTask) and task.method_name in SORTED


def in_pieces(task: Task[Any]) -> bool:
    """Whether a merge sorts magnitudes, and does the rest weight by weight."""
    return sorts(task) and not dict(task.parameters.items())["rescale"] and task.base_model is not None


def selections(
    task: ExecuteMergeMethodTask, merge: Merge, models: Iterable[ModelReference], parts: Sequence[slice], size: int
) -> list[Bools]:
    """What the merge keeps of each task vector that it sorts, in the order of its sorts.

    merge(part, models): merges pieces of some of the models. With the base and one other it shows what is sorted of it.
    """
    assert task.base_model is not None
    found = []
    for model in task.model_order:
        if model == task.base_model or model not in models or (wanted := _wanted(task, model, size)) is None:
            continue
        values = np.empty(size, np.uint32)
        for part in parts:
            with suppress(_Seen), Sorts(partial(_note, values[part])):
                merge(part, (task.base_model, model))
        found.append(kept(values, wanted))
    return found


def _wanted(task: ExecuteMergeMethodTask, model: ModelReference, size: int) -> Range | None:
    """What mergekit would take of the order of a task vector's magnitudes; None where it does not sort."""
    asked: list[Range] = []

    def note(_: torch.Tensor, wanted: Range) -> torch.Tensor:
        asked.append(wanted)
        return torch.empty(0, dtype=torch.int64, device="meta")

    parameters = dict(task.input_parameters[model].items())
    method: Any = merge_methods.get(task.method_name)  # one of the generalised task arithmetic methods
    with Sorts(note):
        task_vector = torch.empty(size, device="meta")
        sparsify(task_vector, parameters["density"], method.sparsification_method, parameters.get("gamma", 0))
    return asked[0] if asked else None


class _Seen(Exception):
    """Ends a merge that was begun to see what it sorts."""


def _note(values: Bits, tensor: torch.Tensor, _: Range) -> torch.Tensor:
    values[:] = tensor.numpy().view(np.uint32)
    raise _Seen


def kept(values: Bits, wanted: Range) -> Bools:
    """Which of the magnitudes (bits of float32, no sign) stand in a range of their order. `values` is overwritten."""
    start, stop, _ = wanted.part.indices(values.size)
    if values.size < PROBE or values.max() > INFINITY or not agrees():
        return _by_sorting(values, wanted)
    if not wanted.descending:
        np.bitwise_not(values, out=values)  # the same comparisons, with the smallest first
    before = first(values.copy(), start) if start else np.zeros(values.size, np.bool_)
    found = None if before is None else first(values, max(start, stop))
    if before is None or found is None:
        return _by_sorting(values if wanted.descending else ~values, wanted)
    return np.greater(found, before, out=found)


@cache
def agrees() -> bool:
    """Whether torch sorts as `first` expects, on magnitudes with many ties."""
    some = np.random.default_rng(0).integers(0, 300, PROBE).astype(np.float32).view(np.uint32)
    half = PROBE // 2
    for descending, keys in ((True, some.copy()), (False, ~some)):
        found = first(keys, half)
        if found is None or not np.array_equal(found, _by_sorting(some, Range(descending, slice(None, half)))):
            return False
    return True


def _by_sorting(values: Bits, wanted: Range) -> Bools:
    found = np.zeros(values.size, np.bool_)
    order = torch.from_numpy(values.view(np.float32)).argsort(descending=wanted.descending)  # no `torch.argsort`: Sorts
    found[order[wanted.part].numpy()] = True
    return found


def first(keys: Bits, count: int) -> Bools | None:
    """Which `count` of the keys std::sort puts first when the largest is first. `keys` is overwritten.

    None, and the keys as they were, where so many partitions come to little that std::sort turns to a heap.
    """
    if not 0 < count < keys.size:
        return np.full(keys.size, count > 0)
    edge = _edge(keys, keys.size - count)
    found = keys >= edge
    if np.count_nonzero(found) == count:  # no tie is left out
        return found
    np.greater(keys, edge, out=found)
    places = np.arange(keys.size, dtype=np.int32 if keys.size <= 1 << 31 else np.int64)
    whole, everywhere = keys, places
    deepest = 2 * (keys.size.bit_length() - 1)
    while keys.size > SMALL and count:
        if not deepest:
            whole[everywhere] = whole.copy()
            return None
        deepest -= 1
        cut = _partition(keys, places)
        if cut <= count:
            found[places[:cut][keys[:cut] == edge]] = True
            keys, places, count = keys[cut:], places[cut:], count - cut
        else:
            keys, places = keys[:cut], places[:cut]
    found[places[np.argsort(~keys, kind="stable")[:count]]] = True
    return found


def _edge(keys: Bits, dropped: int) -> np.uint32:
    """The smallest key but `dropped` smaller ones. Digit by digit (cut.py), without a copy of the keys."""
    blocks = [keys[start : start + BLOCK] for start in range(0, keys.size, BLOCK)]
    high, rest = locate(_counts(b >> 16 for b in blocks), dropped)
    low, _ = locate(_counts(b[b >> 16 == high] & 0xFFFF for b in blocks), rest)
    return np.uint32(high << 16 | low)


def _counts(digits: Iterable[npt.NDArray[Any]]) -> npt.NDArray[np.int64]:
    counts = np.zeros(DIGIT, np.int64)
    for block in digits:
        counts += np.bincount(block, minlength=DIGIT)
    return counts


def _partition(keys: Bits, places: npt.NDArray[Any]) -> int:
    """One partition of std::sort, of keys and their places; gives where its second part begins.

    The pivot, the median of three keys, goes to the front. From both ends of the rest scans stop at keys that are not
    on the right side of it, equal ones among them, and these are swapped in pairs until the scans meet.
    """
    middle = _median(keys, 1, keys.size // 2, keys.size - 1)
    for values in (keys, places):
        values[0], values[middle] = values[middle], values[0]
    pivot, rest, moved = keys[0], keys[1:], places[1:]
    back = rest[::-1]
    lefts = chain(_stops(rest, lambda block: block <= pivot), [np.array([rest.size])])
    rights = chain((rest.size - 1 - p for p in _stops(back, lambda block: block >= pivot)), [np.array([-1])])
    left = right = np.empty(0, np.intp)
    last = rest.size
    while True:
        while not left.size:
            left = next(lefts)
        while not right.size:
            right = next(rights)
        pairs = min(left.size, right.size)
        apart = int(np.count_nonzero(left[:pairs] < right[:pairs]))
        a, b = left[:apart], right[:apart]
        for values in (rest, moved):
            values[a], values[b] = values[b], values[a]
        last = int(b[-1]) if apart else last
        if apart < pairs:
            return 1 + min(int(left[apart]), last)
        left, right = left[pairs:], right[pairs:]


def _stops(keys: Bits, stop: Callable[[Bits], Bools]) -> Iterator[Places]:
    """The positions at which a scan stops, block by block."""
    for start in range(0, keys.size, BLOCK):
        yield np.flatnonzero(stop(keys[start : start + BLOCK])) + start


def _median(keys: Bits, *three: int) -> int:
    """Which of three positions holds the median; of equal keys the one that std::sort's comparisons come to."""
    (a, x), (b, y), (c, z) = ((p, keys[p]) for p in three)
    if x > y:
        return b if y > z else c if x > z else a
    return a if x > z else c if y > z else b

"""`slerp` in pieces: mergekit's arithmetic in mergekit's order, so that the bits are equal, without whole tensors.

mergekit sums chunk by chunk already, but makes every temporary tensor anew, whose pages the system has to clear: that
is most of its time. Here two buffers of one chunk serve all operations. Where another mergekit calculates in another
way (`agrees` compares the two, once), `slerp` is mergekit's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, TypeGuard

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.graph import Task
from mergekit.merge_methods.slerp import slerp
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

Read = Callable[[slice], tuple[torch.Tensor, torch.Tensor]]

CHUNK = 1 << 20  # elements of which mergekit sums at a time
PARALLEL, TINY = 0.9995, 1e-8  # mergekit's: the cosine from which it goes straight on, and the norm below which it is 1


def in_pieces(task: Task[Any]) -> TypeGuard[ExecuteMergeMethodTask]:
    """Whether a merge is a slerp that `pieces` can do."""
    return isinstance(task, ExecuteMergeMethodTask) and task.method_name == "slerp" and agrees()


def merged(
    task: ExecuteMergeMethodTask,
    tensors: Mapping[ModelReference, torch.Tensor],
    dtypes: Mapping[ModelReference, torch.dtype],
) -> Iterator[torch.Tensor]:
    """What a slerp of two flat tensors gives, piece by piece. dtypes: those in which mergekit would load them."""
    assert task.base_model is not None
    ends = [task.base_model, *(m for m in tensors if m != task.base_model)]  # mergekit has the base at the start
    dtype = dtype_from_name(task.dtype) or torch.promote_types(*(dtypes[m] for m in ends))

    def read(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (tensors[m][part].to(dtypes[m]).to(dtype) for m in ends)
        return a, b

    return pieces(dict(task.parameters.items())["t"], read, tensors[task.base_model].numel(), dtype)


def pieces(t: float, read: Read, size: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The point `t` of the way along the arc from one flat tensor to another, piece by piece.

    read: gives a part of both tensors, of `size` elements and in `dtype`. A piece lasts until the next is asked for.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    parts = [slice(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK)]
    buffers = torch.empty(2, 1, min(CHUNK, size), dtype=exact)

    def both(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = buffers[..., : part.stop - part.start]
        for buffer, values in zip((x, y), read(part), strict=True):
            buffer.copy_(values)
        return x, y

    norms = [[torch.linalg.vector_norm(v, dim=1, keepdim=True) for v in both(part)] for part in parts]
    norm_a, norm_b = (torch.linalg.vector_norm(torch.stack(found), dim=0) for found in zip(*norms, strict=True))
    norm_a, norm_b = (torch.where(norm > TINY, norm, 1) for norm in (norm_a, norm_b))
    dots = []
    for part in parts:
        x, y = both(part)
        dots.append(x.div_(norm_a).mul_(y.div_(norm_b)).sum(dim=1, keepdim=True))
    share_a, share_b = _shares(torch.tensor(t, dtype=exact), torch.stack(dots).sum(dim=0).clamp(-1, 1))
    for part in parts:
        x, y = both(part)
        yield x.mul_(share_a).add_(y.mul_(share_b)).reshape(-1).to(dtype)


def _shares(t: torch.Tensor, cosine: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How much of each tensor is in the result: Shoemake's sines, or 1 - t and t where they are parallel."""
    straight = cosine.abs() > PARALLEL
    angle = torch.acos(torch.where(straight, 0, cosine))
    sine = torch.sin(angle)
    far, near = torch.sin((1 - t) * angle) / sine, torch.sin(t * angle) / sine
    return torch.where(straight, 1 - t, far), torch.where(straight, t, near)


@cache
def agrees() -> bool:
    """Whether mergekit's slerp gives what `pieces` gives, on two chunks and a bit."""
    a, b = torch.randn(2, 2 * CHUNK + 77, generator=torch.Generator().manual_seed(0))
    found = torch.cat([piece.clone() for piece in pieces(0.3, lambda part: (a[part], b[part]), len(a), a.dtype)])
    return torch.equal(found, slerp(torch.tensor([0.3]), a[None], b[None])[0])

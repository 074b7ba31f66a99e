"""Adam on scores: the fused kernel on float32 moments, or on moments that are kept in 8 bits between the steps.

8 bits: Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861). A moment is cut into
blocks, each divided by its largest absolute value, and each quotient becomes an index into 256 values whose spacing
shrinks with their size (dynamic quantisation). Two things differ, because a score moves by the ratio of the moments:

- The root of the second moment is stored, and never as 0: the denominator has at least the range of the numerator, and
  no score leaps because its second moment was rounded away.
- Values are rounded up or down at random, in proportion to the distance. A second moment changes by 1/1000 a step, far
  less than half of a spacing: rounding to the nearest would leave it where it is for ever. The random numbers are drawn
  from the tensor's name and the step, so that a run that is resumed, or another rank, draws the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.optim.adam import adam

from mftmerge.errors import BadInput, MftmergeError

BLOCK = 256  # elements that share a scale
PIECE = BLOCK * 256  # elements that are in float32 at a time: they stay in the processor's cache
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # signed?


def start(score: Tensor, bits: int) -> dict[str, Tensor]:
    """Adam's state for one float32 score tensor: moments of 0, in float32 or as uint8 codes and block scales."""
    state = {"step": torch.zeros(())}
    for name in MOMENTS:
        if bits == 32:
            state[name] = torch.zeros_like(score)
        else:
            state[name] = torch.zeros(score.numel(), dtype=torch.uint8, device=score.device)
            state[f"{name}_scale"] = torch.zeros(-(-score.numel() // BLOCK), device=score.device)
    return state


def step(name: str, state: dict[str, Any], gradient: Tensor, divisor: Tensor | None, group: dict[str, object]) -> None:
    """One step on `state["score"]`, in place. divisor: what the gradient is divided by on the way (clipping)."""
    state["step"] = state["step"].to(gradient.device)
    if "exp_avg_scale" not in state:
        moments = (state["exp_avg"], state["exp_avg_sq"])
        _fused(state["score"], gradient, *moments, state["step"], divisor, group)
        return
    seed = hashlib.blake2b(f"{name}\0{int(state['step'])}".encode(), digest_size=8).digest()
    random = torch.Generator(gradient.device).manual_seed(int.from_bytes(seed, "little") >> 1)
    scores, gradients = state["score"].view(-1), gradient.reshape(-1)
    for at in range(0, scores.numel(), PIECE):
        part, blocks = slice(at, at + PIECE), slice(at // BLOCK, (at + PIECE) // BLOCK)
        stored = {m: (state[m][part], state[f"{m}_scale"][blocks]) for m in MOMENTS}
        first, root = (dequantise(*stored[m], signed=signed) for m, signed in MOMENTS.items())
        second = root.square_()
        _fused(scores[part], gradients[part], first, second, state["step"].clone(), divisor, group)
        quantise(first, *stored["exp_avg"], signed=True, random=random)
        quantise(second.sqrt_(), *stored["exp_avg_sq"], signed=False, random=random)
    state["step"] += 1


def norm_and_divisor(squares: list[Tensor], clip: float | None, steps: int, group: object = None) -> tuple[float, Any]:
    """The norm of all gradients together, from the sums of squares of each, and what clipping divides them by.

    steps: done so far, for the message. group: of the ranks that hold other rows. Raises MftmergeError for a gradient
    that is not finite.
    """
    total = torch.stack(squares).sum() if squares else torch.zeros(())
    if group is not None and squares:
        torch.distributed.all_reduce(total, group=group)
    norm = total.sqrt()
    if not torch.isfinite(norm):
        raise MftmergeError(f"step {steps + 1}: the gradient is not finite; use float32 or a lower learning rate")
    return float(norm), (norm / clip).clamp(min=1.0) if clip else None


def load(state: Mapping[str, Any], saved: Mapping[str, Tensor], bits: int) -> None:
    """Copy what was saved of one tensor's state over it, bit for bit. Raises BadInput for moments of other bits."""
    for key, value in saved.items():
        mine = state.get(key)
        if mine is None or mine.dtype != value.dtype:
            raise BadInput(f"the saved training state is not one of --adam-bits {bits}")
        mine.copy_(value)  # torch's own loader would cast the scores to a bfloat16 parameter's dtype


@cache
def levels(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of the dynamic data type, ascending, float32: in [-1, 1], or in (0, 1] without a 0.

    The number of leading zero bits is the (negative) power of ten, the other bits divide [0.1, 1] evenly. One bit more
    goes to the precision where there is no sign.
    """
    bits = 7 if signed else 8
    positive = [torch.ones(1, dtype=torch.float64)]
    for zeros in range(bits):
        edges = torch.linspace(0.1, 1, 2 ** (bits - 1 - zeros) + 1, dtype=torch.float64)
        positive.append((edges[:-1] + edges[1:]) / 2 * 10.0**-zeros)
    both = torch.cat([*positive, *([-p for p in positive[1:]] if signed else []), torch.zeros(int(signed))])
    return both.sort().values.float().to(device)


@cache
def _cells(signed: bool, device: torch.device) -> Tensor:
    """For each value of a float32's upper 17 bits, the index of the last level that is not above any such number.

    At most one level lies between two such numbers, so that one comparison settles the rest: much faster on a CPU than
    a binary search.
    """
    upper = torch.arange(1 << 17, dtype=torch.int64) << 15
    lowest = torch.where(upper < 1 << 31, upper, upper - (1 << 32) + 0x7FFF)  # negative numbers order backwards
    values = lowest.to(torch.int32).view(torch.float32).nan_to_num()
    found = torch.bucketize(values, levels(signed, torch.device("cpu")), right=True) - 1
    return found.clamp_(0, 254).int().to(device)


def _below(unit: Tensor, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of values in [-1, 1], shape (n,): the index (0 to 254) of the level below, that level, and the next one."""
    steps = levels(signed, unit.device)
    index = _cells(signed, unit.device).index_select(0, (unit.view(torch.int32) >> 15) & 0x1FFFF)
    index += unit >= steps.index_select(0, index + 1)
    index.clamp_(max=254)
    return index, steps.index_select(0, index), steps.index_select(0, index + 1)


def dequantise(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """float32 values, shape (n,), of uint8 codes (n,) and scales (blocks,)."""
    values = levels(signed, codes.device).index_select(0, codes.int())
    return values.mul_(scales.repeat_interleave(BLOCK)[: codes.numel()])


def quantise(values: Tensor, codes: Tensor, scales: Tensor, *, signed: bool, random: torch.Generator) -> None:
    """Write float32 values (n,) into `codes` and `scales`, each as one of its two neighbours, unbiased."""
    size = values.numel()
    blocks = pad(values, (0, -size % BLOCK)).view(-1, BLOCK)
    torch.amax(blocks.abs(), 1, out=scales)
    unit = (blocks / scales[:, None].clamp(min=torch.finfo(torch.float32).tiny)).view(-1)[:size]
    index, low, high = _below(unit, signed)
    share = (unit - low) / (high - low)
    # Up with the probability of its share of the way: expected value the exact one, so that small steps add up.
    codes.copy_(index.add_(torch.rand(size, generator=random, device=values.device) < share))


def _fused(
    score: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    count: Tensor,
    divisor: Tensor | None,
    group: dict[str, Any],
) -> None:
    """torch's fused Adam kernel on one tensor; it divides the gradient by `divisor` on the way."""
    on = gradient.device
    adam(
        [score],
        [gradient.float()],
        [first],
        [second],
        [],
        [count],
        fused=True,
        grad_scale=None if divisor is None else divisor.to(on),
        found_inf=None if divisor is None else torch.zeros((), device=on),
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=0.0,
        eps=group["eps"],
        maximize=False,
    )

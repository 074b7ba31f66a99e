"""Which parameters are masked: the matrices of the chosen decoder layers that multiply activations.

That is linear layers and experts, by the kind of module that holds them. Embeddings, heads, norms, convolutions, the
state decay of recurrent layers (A_log) and whatever chooses experts or streams (routers, AltUp) are never masked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import xxhash
from torch import Tensor, nn

from mftmerge.dtypes import integer_view
from mftmerge.errors import BadInput
from mftmerge.naming import decoder_layers
from mftmerge.train.sharding import Shard

_ROUTERS = {"gate", "wg", "shared_expert_gate", "altup", "indexer"}
_MIXERS = ("router", "hyper_connection")  # parts of such names
_DOWN = ("down", "output", "w2")  # names of matrices that lead back to the hidden states


@dataclass(frozen=True)
class Target:
    """One parameter to mask.

    name: the live model's parameter name. layer: its decoder layer. blocks: number of equal contiguous pieces that are
    matrices of their own (fused experts hold one a expert, two where gate and up are fused), each cut separately.
    input_dim: the dimension that is summed over in the product, for N:M patterns. A parameter that several layers share
    has the name and number of the first.
    """

    name: str
    parameter: nn.Parameter
    layer: int
    blocks: int = 1
    input_dim: int = -1
    keep: str | None = None  # share kept where it is not that of all targets


def find(model: nn.Module, layers: str | None = None, modules: str = "attn,mlp") -> list[Target]:
    """The parameters to mask, in the model's order.

    layers: such as "4-7" or "0,2,28-29", None for the last four. modules: "attn", "mlp", parts of names such as
    "q_proj,v_proj", or a regular expression that is searched for in the parameter's name.
    Raises BadInput, listing what there is, when nothing matches.
    """
    prefix, stack = decoder_layers(model)
    chosen = set(parse_layers(layers, len(stack)))
    wanted = _matcher(modules)
    first: dict[int, Target] = {}  # by identity: a layer may use the parameters of another (Zamba)
    used: set[int] = set()  # by the chosen layers
    for t in _candidates(stack, prefix):
        first.setdefault(id(t.parameter), t)
        if t.layer in chosen:
            used.add(id(t.parameter))
    everything = [t for key, t in first.items() if key in used]
    found = [t for t in everything if wanted(t.name)]
    if not found:
        kinds = sorted({re.sub(rf"^{re.escape(prefix)}\.\d+\.", "", t.name) for t in everything})
        raise BadInput(f"--modules {modules}: matches nothing in layers {sorted(chosen)}; there are {', '.join(kinds)}")
    return found


def parse_layers(text: str | None, count: int) -> list[int]:
    """Layer numbers from "4-7,9"; None means the last four."""
    if text is None:
        return list(range(max(0, count - 4), count))
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match:
            raise BadInput(f"--layers {text}: give numbers and ranges such as 4-7 or 0,2,28-29")
        low, high = int(match[1]), int(match[2] or match[1])
        if high < low or high >= count:
            raise BadInput(f"--layers {text}: the model has layers 0 to {count - 1}")
        numbers += range(low, high + 1)
    return sorted(set(numbers))


def share(model: nn.Module, targets: Sequence[Target], layers: str | None = None) -> float:
    """Of all weights in the chosen layers, the share that the targets hold."""
    stack = decoder_layers(model)[1]
    chosen = parse_layers(layers, len(stack))
    everything = {id(p): p.numel() for number in chosen for p in stack[number].parameters()}
    return sum(t.parameter.numel() for t in targets) / max(1, sum(everything.values()))


def _candidates(stack: nn.ModuleList, prefix: str) -> Iterator[Target]:
    from transformers.pytorch_utils import Conv1D

    for number, layer in enumerate(stack):
        for path, module in layer.named_modules():
            parts = path.split(".")
            if _ROUTERS & set(parts) or any(word in part for part in parts for word in _MIXERS):
                continue
            kind = type(module).__name__
            linear = isinstance(module, nn.Linear | Conv1D) or kind.endswith("Linear")
            experts = not linear and ("Expert" in kind or "experts" in parts)
            for short, p in module.named_parameters(recurse=False) if linear or experts else ():
                name = ".".join(filter(None, (prefix, str(number), path, short)))
                if short.endswith("bias") or p.ndim not in (2, 3):
                    continue
                if linear and p.ndim == 2:
                    yield Target(name, p, number, 1, 0 if isinstance(module, Conv1D) else -1)
                elif p.ndim == 3:  # (experts, out, in), or (experts, in, out)
                    transposed = _is_transposed(module)
                    halves = "gate_up" in short and not transposed and getattr(module, "is_concatenated", True)
                    yield Target(name, p, number, p.shape[0] * (2 if halves else 1), -2 if transposed else -1)
                elif count := _experts(module):  # (experts * inner, hidden), DBRX's
                    yield Target(name, p, number, count, 0 if short in _DOWN else -1)


def _experts(module: nn.Module) -> int:
    return next((int(getattr(module, n)) for n in ("num_experts", "moe_num_experts") if hasattr(module, n)), 0)


def _is_transposed(module: nn.Module) -> bool:
    """Whether fused experts are stored as (experts, in, out): said by the module, or by the sizes of its matrices."""
    said = getattr(module, "is_transposed", None)
    if said is not None:
        return bool(said)
    hidden = next((getattr(module, n) for n in ("hidden_size", "hidden_dim") if hasattr(module, n)), None)
    for name, p in module.named_parameters(recurse=False):
        if p.ndim == 3 and p.shape[1] != p.shape[2] and hidden in p.shape[1:]:
            return (p.shape[1] == hidden) != any(word in name for word in _DOWN)
    return False


def _matcher(modules: str) -> Callable[[str], bool]:
    parts = {m.strip() for m in modules.split(",")}
    if all(re.fullmatch(r"\w+", p) for p in parts):

        def matches(name: str) -> bool:
            path = name.split(".")
            return bool(parts & {*path, "attn" if is_attention(name) else "mlp"})

        return matches
    try:
        expression = re.compile(modules)
    except re.error as e:
        raise BadInput(f"--modules {modules}: not a regular expression ({e})") from None
    return lambda name: bool(expression.search(name))


def is_attention(name: str) -> bool:
    """Whether a parameter belongs to an attention block; all others count as the MLP's."""
    return any("attn" in p or "attention" in p for p in name.split("."))


def freeze_others(model: nn.Module, targets: Sequence[Target]) -> dict[str, bool]:
    """Let gradients flow to the targets only: backward never goes below them. Returns the flags as they were."""
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    learnt = {t.name for t in targets}
    for name, p in model.named_parameters():
        p.requires_grad_(name in learnt)
    return flags


@contextmanager
def learning_alone(model: nn.Module, targets: Sequence[Target]) -> Iterator[None]:
    """`freeze_others` inside the block; after it all parameters have their flags again, and no gradients."""
    flags = freeze_others(model, targets)
    try:
        yield
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(flags[name])
            p.grad = None


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of named tensors, of this rank's rows: whether two runs train over the same model."""
    h = xxhash.xxh3_128()
    for name, tensor in tensors:
        local = Shard.local(tensor.detach()).cpu().contiguous()
        h.update(f"{name}\0{local.dtype}\0{tuple(local.shape)}\0".encode())
        h.update(integer_view(local).numpy().data)
    return h.hexdigest()

"""Checkpoint names <-> parameter names of a live transformers model: the only place that knows that the two differ.

Masks use checkpoint names, the keys of the safetensors files. Where transformers renames or fuses tensors on loading
(Mixtral's `block_sparse_moe.experts.3.w1.weight` becomes a slice of `mlp.experts.gate_up_proj`), the same conversions
are applied here to tensors of any dtype: masks, scores, weights. They only move elements, so they are exact.
A model without conversions, or one that is no transformers model, keeps its names.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Set
from copy import deepcopy
from typing import Any

import numpy.typing as npt
import torch

from mftmerge.errors import BadInput

Tensors = Mapping[str, torch.Tensor]


def layout(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of `model`'s checkpoint, under the names that transformers saves it with.

    Tied parameters are listed under each of their names. Nothing is computed: the conversions run on meta tensors.
    """
    return {name: tuple(t.shape) for name, t in _revert(model, _placeholders(model)).items()}


def to_checkpoint(
    model: torch.nn.Module, tensors: Tensors, *, names: Container[str] | None = None
) -> dict[str, torch.Tensor]:
    """Turn `{parameter name: tensor}` into `{checkpoint name: tensor}`, splitting fused parameters.

    tensors: one per parameter, of the parameter's shape and any dtype (bool, uint8, float32, ...).
    names: the checkpoint's own names, where they are known; settles whether they carry the base model's prefix
    (`transformer.h.0` or `h.0`) and which name of a tied parameter is stored.
    Raises BadInput for a name or shape that is not the model's, and when only some of the parameters that one
    checkpoint tensor holds are given.
    """
    full = _placeholders(model)
    for name, tensor in tensors.items():
        if name not in full:
            raise BadInput(f"the model has no parameter {name!r}")
        _require_shape(name, tensor, tuple(full[name].shape))
    converted = {k: t for k, t in _revert(model, {**full, **tensors}).items() if t.device.type != "meta"}
    if sum(t.numel() for t in converted.values()) != sum(t.numel() for t in tensors.values()):
        raise BadInput("the checkpoint fuses parameters of which only some are given; give all parts of a fused tensor")
    if names is None:
        return converted
    tied = _tied(model)
    return {_known(k, names, _prefix(model), _aliases(k, tied)): t for k, t in converted.items()}


def to_arrays(
    model: torch.nn.Module, tensors: Tensors, *, names: Container[str] | None = None
) -> dict[str, npt.NDArray[Any]]:
    """`to_checkpoint` as numpy arrays, which masks are made of; tensors: on the CPU."""
    return {n: t.contiguous().numpy() for n, t in to_checkpoint(model, tensors, names=names).items()}


def to_parameters(
    model: torch.nn.Module, tensors: Tensors, *, fill: float | bool | None = None
) -> dict[str, torch.Tensor]:
    """Turn `{checkpoint name: tensor}` into `{parameter name: tensor}`, fusing where the model fuses.

    Names may lack or carry the base model's prefix, and a tied parameter may go by any of its names: the result has
    the first (that of `named_parameters()`).
    fill: value for those parts of a fused parameter that are not given (True for "keep"); None makes them an error.
    Raises BadInput for names that the model does not have, other shapes, and two names of one tied parameter that are
    given different tensors.
    """
    return dict(iter_parameters(model, tensors, tensors.__getitem__, fill=fill))


def iter_parameters(
    model: torch.nn.Module,
    names: Iterable[str],
    read: Callable[[str], torch.Tensor],
    *,
    fill: float | bool | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """`to_parameters` one parameter at a time: `read(name)` is called for a checkpoint tensor when its turn comes."""
    shapes, tied = layout(model), _tied(model)
    given: dict[str, str] = {}
    for name in names:
        known = _known(name, shapes, _prefix(model), _aliases(name, tied))
        if known in given:
            raise BadInput(f"{given[known]!r} and {name!r} are the same tensor of this model")
        given[known] = name

    def checked(known: str) -> torch.Tensor:
        tensor = read(given[known])
        _require_shape(given[known], tensor, shapes[known])
        return tensor

    shared: dict[str, torch.Tensor] = {}  # tensors of parameters with several names, until all are seen
    for name, tensor in _convert(model, shapes, given, checked, fill):
        first = tied.get(name, name)
        if first in shared:
            if not _equal(shared[first], tensor):
                raise BadInput(f"{first!r} and {name!r} are tied in this model, but they are given different tensors")
            continue
        if len(list(_aliases(name, tied))) > 1:
            shared[first] = tensor
        yield first, tensor


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside wrappers that hold it whole: torch.compile, data parallel, peft."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), torch.nn.Module):
            model = inner
        elif isinstance(model, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "peft_config") and callable(found := getattr(model, "get_base_model", None)):
            model = found()
        else:
            return model


def model_with(model: torch.nn.Module, names: Set[str]) -> torch.nn.Module:
    """The model that has tensors of these checkpoint names: `model`, or what it wraps, be it a shell of one's own.

    Raises BadInput for tensors that a peft adapter trains as a whole: the model uses the adapter's copy of them.
    """
    model = unwrapped(model)
    while not names & set(layout(model)):
        children = list(model.children())
        if len(children) != 1 or next(model.parameters(recurse=False), None) is not None:
            break
        model = unwrapped(children[0])
    for copied, module in model.named_modules():
        if not (hasattr(module, "modules_to_save") and hasattr(module, "original_module")):
            continue
        if found := next((n for n in sorted(names) if n.startswith(f"{copied}.")), None):
            raise BadInput(f"{found!r} is replaced by the adapter's own copy (modules_to_save); merge it first")
    return model


def live_names(model: torch.nn.Module) -> dict[str, str]:
    """Parameter name without adapters -> its name in this model, where peft has put its layers between.

    peft calls a layer's own weight `x.base_layer.weight`; the other parameters under `x` are the adapter's.
    """
    adapted = [n for n, m in model.named_modules() if isinstance(getattr(m, "base_layer", None), torch.nn.Module)]
    names: dict[str, str] = {}
    for name in model.state_dict(keep_vars=True):
        inside = [a for a in adapted if name.startswith(f"{a}.")]
        if all(name.startswith(f"{a}.base_layer.") for a in inside):
            names[name.replace(".base_layer.", ".") if inside else name] = name
    return names


def _placeholders(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A meta tensor for each name of the state dict, tied names included."""
    state = model.state_dict(keep_vars=True)
    return {
        plain: torch.empty(state[name].shape, dtype=state[name].dtype, device="meta")
        for plain, name in live_names(model).items()
    }


def _revert(model: torch.nn.Module, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The conversion that `save_pretrained` does."""
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    if not isinstance(model, PreTrainedModel):
        return dict(tensors)
    try:
        return dict(revert_weight_conversion(model, dict(tensors)))
    except (RuntimeError, ValueError) as e:
        raise BadInput(f"transformers cannot turn this model's names back into its checkpoint's: {e}") from None


def _conversions(model: torch.nn.Module) -> list[object]:
    """What was applied when the model was loaded, or its class's own list for a model that was not loaded."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    if not isinstance(model, PreTrainedModel):
        return []
    used = getattr(model, "_weight_conversions", None)
    if used is None:  # as in revert_weight_conversion: without a file nobody knows whether it had the prefix
        used = [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]
    return deepcopy(list(used))


def _convert(
    model: torch.nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    given: Container[str],
    read: Callable[[str], torch.Tensor],
    fill: float | bool | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The conversion that `from_pretrained` does, for those of the checkpoint's tensors that are given.

    All of the checkpoint's names take part in the matching, because a rule may depend on the names before it.
    """
    conversions = _conversions(model)
    if not conversions:
        yield from ((name, read(name)) for name in shapes if name in given)
        return
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    meta = _placeholders(model)
    groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for name in sorted(shapes, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, _prefix(model), meta)
        if pattern is not None:
            groups.setdefault(target, (deepcopy(by_pattern[pattern]), []))[1].append((name, pattern))
        elif name in given:
            yield target, read(name)
    for target, (converter, parts) in groups.items():
        if any(name in given for name, _ in parts):
            tensors = _filled(target, [name for name, _ in parts], shapes, given, read, fill)
            for (name, pattern), tensor in zip(parts, tensors, strict=True):
                converter.add_tensor(target, name, pattern, tensor)
            for k, t in converter.convert(target, model=model, config=model.config).items():
                yield k, (t[0] if isinstance(t, list) else t)


def _filled(
    target: str,
    parts: list[str],
    shapes: Mapping[str, tuple[int, ...]],
    given: Container[str],
    read: Callable[[str], torch.Tensor],
    fill: float | bool | None,
) -> list[torch.Tensor]:
    """The parts of one fused parameter, with `fill` for those that are not given."""
    missing = [name for name in parts if name not in given]
    if missing and fill is None:
        raise BadInput(f"the model fuses {len(parts)} tensors into {target!r}, of which {missing[0]!r} is not given")
    present = {name: read(name) for name in parts if name in given}
    like = next(iter(present.values()))
    return [
        present[name] if name in present else torch.full(shapes[name], fill or 0, dtype=like.dtype, device=like.device)
        for name in parts
    ]


def _prefix(model: torch.nn.Module) -> str:
    return getattr(model, "base_model_prefix", "") or ""


def _tied(model: torch.nn.Module) -> dict[str, str]:
    """Name -> first name of the same parameter, for all names of the model's parameters."""
    first: dict[int, str] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {k: first.setdefault(id(parameters[n]), k) for k, n in live_names(model).items() if n in parameters}


def _aliases(name: str, tied: Mapping[str, str]) -> Iterable[str]:
    """The other names of a tied parameter (tied tensors are embeddings, which no conversion renames)."""
    return (other for other, first in tied.items() if name in tied and first == tied[name])


def _known(name: str, known: Container[str], prefix: str, aliases: Iterable[str]) -> str:
    """`name` as `known` spells it: itself, with or without the base model's prefix, or a tied name."""
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."), *aliases):
        if candidate in known:
            return candidate
    raise BadInput(f"no tensor {name!r} here; was the mask made for another architecture?")


def _require_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise BadInput(f"tensor {name!r} has shape {tuple(tensor.shape)}, the model has {shape}")


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def decoder_layers(model: torch.nn.Module) -> tuple[str, torch.nn.ModuleList]:
    """Name and list of a causal LM's decoder layers: the longest ModuleList of its text model, not inside another one.

    Of a model for pictures or sound the text model is what `get_decoder` gives: its other towers may be deeper.
    """
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)]
    outer = [(n, m) for n, m in found if not any(n.startswith(f"{o}.") for o, _ in found)]
    if not outer:
        raise BadInput(f"{type(model).__name__}: no list of decoder layers found; is it a causal language model?")
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else None
    if isinstance(decoder, torch.nn.Module):
        inside = {id(m) for m in decoder.modules()}
        outer = [(n, m) for n, m in outer if id(m) in inside] or outer
    config = getattr(model, "config", None)
    text_config = getattr(config, "get_text_config", None)
    count = None if text_config is None else getattr(text_config(), "num_hidden_layers", None)
    return max(outer, key=lambda pair: (len(pair[1]) == count, len(pair[1])))

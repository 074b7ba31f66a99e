"""The configuration of a merge's result: mergekit's, with its lists of layers taken from the layers' models."""

from __future__ import annotations

import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mergekit import merge as stock
from mergekit.architecture import ModelArchitecture
from mergekit.architecture.base import ModuleArchitecture
from mergekit.common import get_auto_cls, get_config_value, set_config_value
from mergekit.config import MergeConfiguration, OutputSliceDefinition
from transformers import PretrainedConfig
from transformers.initialization import no_init_weights

from mftmerge.errors import BadInput
from mftmerge.names import layer_of
from mftmerge.recipe.kmask import LAYER_KEYS

# Lists as long as the model is deep that say nothing of layers.
NOT_OF_LAYERS = ("token", "architectures", "rope", "scal", "languages", "labels", "factor")
INDICES = ("mlp_only_layers",)  # lists of layers' numbers


def result_config(
    configuration: MergeConfiguration, architecture: ModelArchitecture, trust_remote_code: bool
) -> PretrainedConfig:
    """The result's configuration. mergekit sets its number of layers alone; per-layer lists (`layer_types`, ...) of
    another length make transformers refuse it. Must be called before the planner, which changes `configuration`."""
    config = stock._model_out_config(configuration, architecture, trust_remote_code=trust_remote_code)
    for name, module in architecture.modules.items():
        defined = (configuration.modules or {}).get(name)
        slices = configuration.slices or (defined.slices if defined else None)
        if slices:
            key = _depth_key(slices[0], module.architecture, trust_remote_code)
            layers = _layers(slices, key, trust_remote_code)
            set_config_value(config, key, len(layers))
            _take_from_layers(config, key.rpartition(".")[0], layers)
            moved = any(at != layer.number or layer.depth != len(layers) for at, layer in enumerate(layers))
            if moved and len(architecture.modules) == 1:
                _check_kinds(config, layers)
    return config


@dataclass(frozen=True)
class Layer:
    """A layer of the result: the number it had in a model, and that model's configuration, whole and its part on it."""

    whole: PretrainedConfig
    part: PretrainedConfig
    depth: int
    number: int
    model: str


def _depth_key(first: OutputSliceDefinition, architecture: ModuleArchitecture, trust_remote_code: bool) -> str:
    """Where a configuration says how many layers there are. For architectures that it has no definition of, mergekit
    does not know, and leaves the old number: then transformers drops layers, or makes some up.

    Raises BadInput where several places, or none, could be meant.
    """
    if known := architecture.num_layers_config_key():
        return known
    config = first.sources[0].model.config(trust_remote_code=trust_remote_code)
    depth = architecture.num_layers(config)
    parts = {f"{n}.": p for n, p in vars(config).items() if isinstance(p, PretrainedConfig)}
    places = [at + key for at, p in ({"": config} | parts).items() for key in LAYER_KEYS if getattr(p, key, 0) == depth]
    places = [p for p in places if "." in p] or places[:1]  # a whole shows a part's number as its own
    if len(places) != 1:
        raise BadInput(f"slices: the model's configuration does not say in one place that it has {depth} layers")
    return places[0]


def _layers(slices: list[OutputSliceDefinition], key: str, trust_remote_code: bool) -> list[Layer]:
    """The result's layers, from the slices' first sources."""
    part, found = key.rpartition(".")[0], []
    for out in slices:
        source = out.sources[0]
        whole = source.model.config(trust_remote_code=trust_remote_code)
        inner, depth = get_config_value(whole, part) if part else whole, get_config_value(whole, key)
        found += [Layer(whole, inner, depth, i, str(source.model)) for i in range(*source.layer_range)]
    return found


def _take_from_layers(config: PretrainedConfig, part: str, layers: list[Layer]) -> None:
    """Write the per-layer lists of `config`, or of its part of that name."""
    if not layers:
        return
    own = get_config_value(config, part) if part else config
    for key in layers[0].part.to_dict():
        lists: list[Any] = [getattr(layer.part, key, None) for layer in layers]
        other = any(word in key for word in NOT_OF_LAYERS) and "layer" not in key
        if other or not all(isinstance(v, list | tuple) for v in lists):
            continue
        each = list(zip(lists, layers, strict=True))
        if key in INDICES:
            setattr(own, key, [at for at, (v, layer) in enumerate(each) if layer.number in v])
        elif all(len(v) == layer.depth for v, layer in each):
            setattr(own, key, [v[layer.number] for v, layer in each])


def _check_kinds(config: PretrainedConfig, layers: list[Layer]) -> None:
    """Raise BadInput where the result's configuration would make a layer of another kind than it is.

    Some configurations give layers their kinds by a rule (each third one attends, the first one is dense), which other
    layers in their places do not follow. What kind a layer is show the names of its parameters.
    """
    expected = _kinds(config)
    sources = {model: _kinds(whole) for model, whole in {layer.model: layer.whole for layer in layers}.items()}
    for at, layer in enumerate(layers):
        own = sources[layer.model].get(layer.number)
        if own and at in expected and own != expected[at]:
            odd = min(own ^ expected[at])
            raise BadInput(
                f"slices: layer {at} of the result is layer {layer.number} of {Path(layer.model).name}, but its"
                f" configuration makes layer {at} one of another kind ({odd}); keep such layers in their places"
            )


def _kinds(config: PretrainedConfig) -> dict[int, frozenset[str]]:
    """Of each layer, by number, what follows the number in the names of its parameters; {} where there is no model."""
    try:
        with torch.device("meta"), no_init_weights():
            model = get_auto_cls((config.architectures or [""])[0]).from_config(config)
    except Exception:  # a class that needs other packages or code of its own; then transformers does not check either
        return {}
    found: dict[int, set[str]] = defaultdict(set)
    for name, _ in model.named_parameters():
        if (number := layer_of(name)) is not None:
            found[number].add(name.partition(f".{number}.")[2])
    return {number: frozenset(names) for number, names in found.items()}


def copy_generation_config(configuration: MergeConfiguration, out: Path) -> None:
    """The first model's generation_config.json, which mergekit leaves out whenever it writes a tokenizer of its own."""
    donor = configuration.base_model or configuration.referenced_models()[0]
    source = Path(donor.model.path) / "generation_config.json"
    if source.is_file() and not (out / source.name).exists():
        shutil.copyfile(source, out / source.name)

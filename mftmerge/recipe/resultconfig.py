"""The configuration of a merge's result: mergekit's, with its lists of layers taken from the layers' models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mergekit import merge as stock
from mergekit.architecture import ModelArchitecture
from mergekit.common import get_config_value
from mergekit.config import MergeConfiguration, OutputSliceDefinition
from transformers import PretrainedConfig

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
        key = module.architecture.num_layers_config_key()
        if slices and key:
            _take_from_layers(config, key.rpartition(".")[0], slices, module.architecture.num_layers, trust_remote_code)
    return config


def _take_from_layers(
    config: PretrainedConfig, part: str, slices: list[OutputSliceDefinition], depth: Any, trust_remote_code: bool
) -> None:
    """Write the per-layer lists of `config`, or of its part of that name, from the slices' first sources."""

    def inner(whole: PretrainedConfig) -> PretrainedConfig:
        return get_config_value(whole, part) if part else whole

    layers: list[tuple[PretrainedConfig, int, int]] = []  # of each layer of the result: a model's config, depth, number
    for out in slices:
        source = out.sources[0]
        whole = source.model.config(trust_remote_code=trust_remote_code)
        layers += [(inner(whole), depth(whole), i) for i in range(*source.layer_range)]
    if not layers:
        return
    for key in inner(layers[0][0]).to_dict():
        lists: list[Any] = [getattr(own, key, None) for own, _, _ in layers]
        if any(word in key for word in NOT_OF_LAYERS) or not all(isinstance(v, list | tuple) for v in lists):
            continue
        if key in INDICES:
            setattr(
                inner(config), key, [at for at, (v, (_, _, i)) in enumerate(zip(lists, layers, strict=True)) if i in v]
            )
        elif all(len(v) == count for v, (_, count, _) in zip(lists, layers, strict=True)):
            setattr(inner(config), key, [v[i] for v, (_, _, i) in zip(lists, layers, strict=True)])


def copy_generation_config(configuration: MergeConfiguration, out: Path) -> None:
    """The first model's generation_config.json, which mergekit leaves out whenever it writes a tokenizer of its own."""
    donor = configuration.base_model or configuration.referenced_models()[0]
    source = Path(donor.model.path) / "generation_config.json"
    if source.is_file() and not (out / source.name).exists():
        shutil.copyfile(source, out / source.name)

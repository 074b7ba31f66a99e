"""Parameters of a merge for each tensor: filters, gradients over the layers, defaults; and each tensor's layer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from mftmerge.recipe.catalogue import Kind, Parameter

LAYER = "${layer_index}"


def lookup(setting: Any, name: str, t: float) -> Any:
    """The value of a setting for a tensor at relative depth `t` (0 first layer, 1 last); None where no rule matches.

    A list of numbers is a gradient, linear between equally spaced points; a list of rules gives the first whose filter
    is part of the tensor's name. This is mergekit's reading, which a test compares with it.
    """
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if any(isinstance(v, dict) for v in setting):
        for rule in setting:
            wanted = rule.get("filter")
            if wanted is None or wanted == "*" or (name and wanted in name):
                return lookup(rule["value"], name, t)
        return None
    at = t * (len(setting) - 1)
    low = int(at)
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in setting):
        try:
            setting = [float(v) if not isinstance(v, bool) else v for v in setting]
        except ValueError:
            return setting[low]
        if any(isinstance(v, bool) for v in setting):
            return setting[low]
    high, share = min(len(setting) - 1, low + 1), at - low
    return (1 - share) * setting[low] + share * setting[high]


def value(parameter: Parameter, sources: Iterable[Mapping[str, Any] | None], key: str, name: str, t: float) -> Any:
    """A parameter's value for a tensor, from the first of `sources` that has one, else its default."""
    for source in sources:
        if source is not None and key in source:
            found = lookup(source[key], name, t)
            if found is not None:
                return convert(found, parameter.kind)
    return parameter.default


def convert(found: Any, kind: Kind) -> Any:
    """A YAML scalar as a parameter's type."""
    if kind == "bool" and isinstance(found, str):
        return found.lower() in ("true", "yes", "on", "1", "t", "y")
    return {"float": float, "int": int, "bool": bool, "str": str}[kind](found)


@dataclass(frozen=True)
class Layout:
    """The tensors of an architecture as mergekit defines them: relative depth by name, and which may be absent."""

    depth: dict[str, float]
    optional: frozenset[str]


@cache
def _definitions() -> dict[str, list[dict[str, Any]]]:
    """mergekit's architecture definitions by transformers class name, read as data: mergekit is not imported."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in files("mergekit._data.architectures").iterdir():
        if file.name.endswith(".json"):
            definition = json.loads(file.read_text())
            for name in definition["architectures"]:
                found.setdefault(name, []).append(definition)
    return found


def layout(config: Mapping[str, Any]) -> Layout | None:
    """The layout of a model with this config.json; None where mergekit does more than a list of names says."""
    names = config.get("architectures") or []
    candidates = _definitions().get(names[0], []) if len(names) == 1 else []
    if len(candidates) > 1:
        candidates = [c for c in candidates if c.get("model_type") == config.get("model_type")]
    if len(candidates) != 1 or candidates[0].get("kind", "module") != "module":
        return None
    definition = candidates[0]
    count = config.get(definition.get("num_layers_config_key") or "num_hidden_layers")
    if definition.get("override_num_layers") is not None or not isinstance(count, int):
        return None
    outer = [*definition["pre_weights"], *definition["post_weights"]]
    inner = definition["layer_templates"]["weights"]
    if any("force_dtype" in w or "${" in w["name"].replace(LAYER, "") for w in [*outer, *inner]):
        return None
    depth = {w["name"]: 0.0 for w in outer}
    optional = {w["name"] for w in outer if w.get("optional")}
    for i in range(count):
        t = i / (count - 1) if count > 1 else 1.0
        for weight in inner:
            name = weight["name"].replace(LAYER, str(i))
            depth[name] = t
            optional |= {name} if weight.get("optional") else set()
    return Layout(depth, frozenset(optional))


def read_config(model: Path) -> dict[str, Any]:
    """config.json of a model; empty when it cannot be read."""
    try:
        config = json.loads((model / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}

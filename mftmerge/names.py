"""What a tensor's name says: its layer, and the module that is the same in all layers.

Short, and apart from `naming`, which needs torch: everything that shows masks by layer imports it.
"""

from __future__ import annotations

import re

# The first part of a name that is a number. At most nine digits: int() refuses thousands of them.
LAYER = re.compile(r"(?:(?<=\.)|^)(\d{1,9})(?=\.|$)")


def layer_of(name: str) -> int | None:
    """Index of the layer that a tensor belongs to (the first number in its name), None outside the layers."""
    found = LAYER.search(name)
    return int(found[1]) if found else None


def in_layer(name: str, layer: int) -> str:
    """The name of the same tensor in another layer."""
    return LAYER.sub(str(layer), name, count=1)


def module_of(name: str) -> str:
    """The part of a tensor's name that is the same in all layers, such as `self_attn.q_proj` or `experts.w1`."""
    parts = name.removesuffix(".weight").split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(p for p in parts[numbers[0] + 1 if numbers else 0 :] if not p.isdigit()) or name

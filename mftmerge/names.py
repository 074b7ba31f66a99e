"""What a tensor's name says: its layer, and the module that is the same in all layers.

Short, and apart from `naming`, which needs torch: everything that shows masks by layer imports it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# The first part of a name that is a number. At most nine digits: int() refuses thousands of them.
LAYER = re.compile(r"(?:(?<=\.)|^)(\d{1,9})(?=\.|$)")


def layer_of(name: str) -> int | None:
    """Index of the layer that a tensor belongs to (the first number in its name), None outside the layers."""
    found = LAYER.search(name)
    return int(found[1]) if found else None


def layer_name(layer: int | None, before: str = "") -> str:
    """How tables and pictures call a layer: its number, or "other" for what is in none."""
    return "other" if layer is None else f"{before}{layer}"


def in_order(layers: Iterable[int | None]) -> list[int | None]:
    """Each layer once, by number; what is in none comes last."""
    return sorted(set(layers), key=lambda layer: (layer is None, layer or 0))


def ranges(numbers: Iterable[int], to: str = "-", between: str = ",") -> str:
    """4, 5, 6, 9 as "4-6,9"."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return between.join(f"{p[0]}{to}{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def module_of(name: str) -> str:
    """The part of a tensor's name that is the same in all layers, such as `self_attn.q_proj` or `experts.w1`."""
    parts = name.removesuffix(".weight").split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(p for p in parts[numbers[0] + 1 if numbers else 0 :] if not p.isdigit()) or name

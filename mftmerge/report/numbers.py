"""Numbers as the page writes them."""

from __future__ import annotations

import math

from mftmerge.evaluate.results import LOSS
from mftmerge.names import ranges

MINUS = "−"  # as wide as the plus sign, so that columns align


def signed(value: float, places: int = 4) -> str:
    """A difference with its sign."""
    return f"{value:+.{places}f}".replace("-", MINUS) if math.isfinite(value) else "unknown"


def measured(value: float, metric: str, *, sign: bool = False) -> str:
    """A loss with four places (nats a token), a share of right answers in per cent with one."""
    if not math.isfinite(value):
        return "unknown"
    places, factor, unit = (4, 1.0, "") if metric == LOSS else (1, 100.0, " %")
    return (signed(value * factor, places) if sign else f"{value * factor:.{places}f}") + unit


def count(value: int) -> str:
    """A number of weights: 14.2 M."""
    for size, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**4, "k")):
        if value >= size:
            return f"{value / (10**3 if unit == 'k' else size):.3g} {unit}"
    return str(value)


def nbytes(value: int) -> str:
    """A size on disk."""
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value} B"


def plain(value: object) -> str:
    """A setting's value in words: no quotes, no long tails of digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(plain(v) for v in value)
    return "" if value is None else str(value)


def layers_in_words(values: list[int]) -> str:
    """Indices of layers: 4, 5, 6, 9 as "layers 4–6, 9", nothing as nothing."""
    said = ranges(values, "–", ", ")
    return f"layer{'s' * (len(values) > 1)} {said}" if values else ""


def options(given: dict[str, object]) -> str:
    """The options of an operation, in brackets. Weights stand beside the masks that they weigh."""
    said = [f"{name} {plain(value)}" for name, value in given.items() if value is not None and name != "weights"]
    return f" ({', '.join(said)})" if said else ""

"""What a training run gained, as a table with a curve in a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mftmerge import notebook, plots
from mftmerge.mask import Mask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEANING = {
    "base": "the model as it is",
    "initial": "mask before training",
    "mask": "best mask",
    "weights": "control: weights trained for as many steps",
    "random": "control: random mask",
    "magnitude": "control: smallest weights dropped",
}


def html(
    comparison: Mapping[str, Any], history: Sequence[Mapping[str, Any]], mask: Mask, best_step: int, gained: bool
) -> str:
    """The comparison as a table, below it the curve where matplotlib is there."""
    said = f"best mask: step {best_step}" if gained else "nothing was gained over the base"
    title = f"{said}; {len(mask)} tensors, density {mask.density():.4f}"
    rows = []
    for name, facts in comparison.items():
        difference = facts.get("difference")
        against = "" if difference is None else f"{difference:+.4f} ± {facts['standard_error']:.4f}"
        rows.append([MEANING.get(name, name), f"{facts['loss']:.4f}", against])
    shown = notebook.table(["", "validation loss", "minus the base's ± one standard error"], rows, title)
    return shown + (
        notebook.picture(curve(history, comparison, best_step)) if history and find_spec("matplotlib") else ""
    )


def curve(history: Sequence[Mapping[str, Any]], comparison: Mapping[str, Any], best_step: int) -> Figure:
    """Training loss (thin), validation loss (circles) and the base's (dashed) by step; the best step is marked."""
    figure = plots.new_figure(6.0, 3.0)
    axes = figure.subplots()
    steps = [(h["step"], h["loss"]) for h in history if h.get("loss") is not None]
    if steps:
        axes.plot(*zip(*steps, strict=True), color="#999999", linewidth=0.8, label="training rows")
    valid = [(h["step"], h["validation"]) for h in history if h.get("validation") is not None]
    if valid:
        axes.plot(*zip(*valid, strict=True), color="#1f77b4", marker="o", label="validation rows")
        axes.axvline(best_step, color="#222222", linewidth=0.8, linestyle=":", label=f"best: step {best_step}")
    if "base" in comparison:
        axes.axhline(comparison["base"]["loss"], color="#222222", linewidth=0.8, linestyle="--", label="base")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per answer token")
    axes.legend(fontsize=8)
    return figure

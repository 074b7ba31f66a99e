"""What a training run gave: as values, in a line, and as a table with a curve in a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mftmerge import notebook, plots
from mftmerge.mask import Mask
from mftmerge.train.settings import TrainSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mftmerge.evaluate.pairing import Values
    from mftmerge.loss import Losses

MEANING = {
    "base": "the model as it is",
    "initial": "mask before training",
    "mask": "best mask",
    "weights": "control: weights trained for as many steps",
    "random": "control: random mask",
    "magnitude": "control: smallest weights dropped",
}


@dataclass
class TrainResult:
    """What a run gives.

    mask: the best one. history: an entry a step (step, loss, lr, flipped, density, validation where it was done).
    losses: validation losses of each row, float64 (rows, 2), under "base", "initial", "mask" and, with `control`,
    "weights", "random", "magnitude". marks: likewise, of the answers, with another metric than the loss. comparison:
    differences from the base with standard errors. gained: the trained mask has a lower validation loss (or more right
    answers) than the base model and than the initial mask.
    """

    mask: Mask
    history: list[dict[str, Any]]
    comparison: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, Losses] = field(default_factory=dict)
    marks: dict[str, Values] = field(default_factory=dict)
    best_step: int = 0
    gained: bool = False
    stopped_early: bool = False
    seconds: float = 0.0
    settings: TrainSettings = field(default_factory=TrainSettings)

    def __repr__(self) -> str:
        """In one line: whether it gained, and the losses; not the arrays."""
        losses = "".join(f", {name} loss {self.comparison[name]['loss']:.4f}" for name in self.comparison)
        what = f"gained, best step {self.best_step}" if self.gained else "nothing gained"
        return f"TrainResult({what}{losses}, mask={self.mask!r})"

    def _repr_html_(self) -> str:
        """In a notebook: losses against the base, and the course of the run."""
        return html(self.comparison, self.history, self.mask, self.best_step, self.gained)

    def plot(self) -> Figure:
        """A matplotlib figure: loss and validation loss by step."""
        return curve(self.history, self.comparison, self.best_step)


def html(
    comparison: Mapping[str, Any], history: Sequence[Mapping[str, object]], mask: Mask, best_step: int, gained: bool
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


def curve(history: Sequence[Mapping[str, object]], comparison: Mapping[str, Any], best_step: int) -> Figure:
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

"""What a quickstart run does: sizes, steps and names of files. One plan for the real model, one for a tiny one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

DOMAINS = ("python", "arithmetic")
KEEP = 0.9
# Name of the combination -> (operation, options).
COMBINATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "union": ("union", {}),
    "intersection": ("intersection", {}),
    "vote": ("vote", {"density": KEEP}),
    "score": ("score", {}),
}


@dataclass(frozen=True)
class Plan:
    """Settings of a run.

    model: "smollm2", "tiny", or the path or hub id of the reader's own model. sizes: rows a split. longest: characters
    of a Python function at most. steps, batch_size: of every training, mask or control. max_length: tokens a row.
    weight_rates: learning rates that the weight-training control may choose from, on validation rows.
    """

    model: str
    sizes: dict[str, int] = field(default_factory=lambda: {"train": 320, "validation": 64, "test": 96})
    longest: int = 480
    steps: int = 40
    batch_size: int = 8
    max_length: int = 384
    weight_rates: tuple[float, ...] = (3e-4, 1e-3)
    seed: int = 0

    def facts(self) -> dict[str, Any]:
        """The plan as JSON."""
        return asdict(self) | {"weight_rates": list(self.weight_rates)}


def full_plan(model: str | None = None, seed: int = 0) -> Plan:
    """The main job on SmolLM2-135M-Instruct, or on the reader's model."""
    return Plan(model or "smollm2", seed=seed)


def tiny_plan(seed: int = 0) -> Plan:
    """The same steps on a model made on the spot, in under two minutes."""
    sizes = {"train": 160, "validation": 32, "test": 48}
    return Plan("tiny", sizes, longest=200, steps=30, max_length=192, weight_rates=(1e-3,), seed=seed)


@dataclass(frozen=True)
class Layout:
    """Where things are in the quickstart's directory."""

    root: Path

    def mask(self, name: str) -> Path:
        return self.root / "masks" / f"{name}.mask"

    def row(self, name: str) -> Path:
        """The stored measurement of one row of the results table."""
        return self.root / "eval" / f"{name}.json"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def applied(self) -> Path:
        return self.root / "applied"

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yml"

    @property
    def built(self) -> Path:
        return self.root / "built"

    @property
    def state(self) -> Path:
        return self.root / "quickstart.json"

    @property
    def results(self) -> Path:
        return self.root / "results"

"""What a quickstart does: its settings, and the two recipes that it builds."""

from __future__ import annotations

from dataclasses import dataclass, field

from mftmerge.settings import Seed, valid

RECIPE = """\
# The average of the two masked models: weights that only one mask drops are halved, those that both drop are 0.
# Built with `mftmerge build recipe.yml -o built`; `mftmerge export recipe.yml -o stock` makes it run in mergekit.
merge_method: linear
dtype: float32
out_dtype: bfloat16
models:
  - model: {model}
    mask: masks/python.mask
    parameters:
      weight: 0.5
  - model: {model}
    mask: masks/arithmetic.mask
    parameters:
      weight: 0.5
"""
LEARNT = """\
# The two trained models in one: which weights take which one's change, learnt from rows that neither was trained on.
# Learnt with `mftmerge train --recipe merge.yml -o learnt`, built with `mftmerge build learnt/recipe.yml -o merged`.
merge_method: select
base_model: {model}
dtype: float32
out_dtype: bfloat16
models:
  - model: trained/python
    mask: {{learn: {{data: data/python-validation.jsonl}}}}
  - model: trained/arithmetic
    mask: {{learn: {{data: data/arithmetic-validation.jsonl}}}}
"""


@dataclass(frozen=True)
class Plan:
    """Settings of a run.

    model: "smollm2", "tiny", or the path or hub id of the reader's own model. sizes: rows a split. longest: characters
    of a Python function at most. steps, batch_size: of every training, mask or control. max_length: tokens a row.
    weight_rates: learning rates that the weight-training control may choose from, on validation rows.
    """

    model: str = "smollm2"
    sizes: dict[str, int] = field(default_factory=lambda: {"train": 320, "validation": 64, "test": 96})
    longest: int = 480
    steps: int = 40
    batch_size: int = 8
    max_length: int = 384
    weight_rates: tuple[float, ...] = (3e-4, 1e-3)
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise BadInput for a seed that training would not take, before anything is fetched for it."""
        valid(Seed, self.seed, f"--seed {self.seed}")


def tiny_plan(seed: int = 0) -> Plan:
    """The same steps on a model made on the spot, in under two minutes."""
    sizes = {"train": 160, "validation": 32, "test": 48}
    return Plan("tiny", sizes, longest=200, steps=30, max_length=192, weight_rates=(1e-3,), seed=seed)

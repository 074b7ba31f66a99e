"""What is trained over a base, in the order in which it is worth its time."""

from __future__ import annotations

from collections.abc import Collection

from research.claim.bench import Bench, Cell
from research.claim.common import write_json

STEPS = 100
TRAVEL = 0.0125  # the default rate of masks: 2 * TRAVEL / steps
RATE = 2 * TRAVEL / STEPS


def cells(before: str) -> list[Cell]:
    """What is trained. A mask of four layers takes 1.77 MB, as LoRA of rank 21 does in 16 bits.

    Archived it takes 0.85 MB, as LoRA of rank 10 does. Over all thirty layers LoRA of rank 3 takes 1.90 MB.
    """
    return [
        Cell("mask", lr=RATE),
        Cell("weights 1e-4", "weights", lr=1e-4),
        Cell("mask, a tenth of the rate", lr=RATE / 10),
        Cell("lora of equal bytes", "lora", lr=3e-4, rank=21),
        Cell("lora of equal bytes, 1e-3", "lora", lr=1e-3, rank=21),
        Cell("weights 3e-4", "weights", lr=3e-4),
        Cell("delta mask, keep 0.5", lr=RATE, keep=0.5, delta=before),
        Cell("delta mask, keep 0.9", lr=RATE, keep=0.9, delta=before),
        Cell("mask, twice the rate", lr=2 * RATE),
        Cell("weights 3e-5", "weights", lr=3e-5),
        Cell("lora of equal bytes, 3e-3", "lora", lr=3e-3, rank=21),
        Cell("lora of the archive's bytes, 3e-3", "lora", lr=3e-3, rank=10),
        Cell("lora of rank 3, 1e-3", "lora", lr=1e-3, rank=3),
        Cell("paper's start", lr=2 * 0.0187 / STEPS, init="normal"),
        Cell("mask, keep 0.95", lr=RATE, keep=0.95),
        Cell("mask, keep 0.99", lr=RATE / 10, keep=0.99),
    ]


def measure(bench: Bench, before: str, names: Collection[str]) -> None:
    """Train and measure the cells of these names, and what nothing is trained for, unless it is there.

    before: checkpoint before fine-tuning, for delta masks.
    """
    if not (bench.out / "signal.json").exists():
        write_json(bench.out / "signal.json", bench.signal())
    todo = [cell for cell in cells(before) if cell.name in names and not bench.done(cell)]
    if todo and "validation" in bench.markers:
        bench.validate()  # the base's own answers are the drafts of everything after it
    bench.record("base", {})
    for cell in todo:
        bench.run(cell, STEPS)
    bench.record("smallest weights", bench.smallest(rows=False))
    bench.record("smallest rows", bench.smallest(rows=True))
    bench.record("random mask", bench.random_mask())

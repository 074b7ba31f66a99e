"""Everything over one base: `python -m research.claim.cells OUT --base DIR --domain wikisql --data FOLDER --seed 0`.

One file a state in OUT; what is there is not done again, so that a run that was stopped goes on. The cells stand in the
order in which they are worth their time. Put `--before DIR` for the model before fine-tuning (delta masks), and
`--only a,b` for some cells.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from research.claim.bench import TESTED, Bench, Cell
from research.claim.common import write_json

STEPS = 100
TRAVEL = 0.0125  # the default rate of masks: 2 * TRAVEL / steps
RATE = 2 * TRAVEL / STEPS


def cells(before: str | None) -> list[Cell]:
    """What is trained. A mask of four layers takes 1.77 MB, as LoRA of rank 21 does in 16 bits."""
    found = [
        Cell("mask", lr=RATE),
        Cell("weights 1e-4", "weights", lr=1e-4),
        Cell("mask, a tenth of the rate", lr=RATE / 10),
        Cell("lora of equal bytes", "lora", lr=3e-4, rank=21),
        Cell("lora of equal bytes, 1e-3", "lora", lr=1e-3, rank=21),
        Cell("weights 3e-4", "weights", lr=3e-4),
        Cell("mask, twice the rate", lr=2 * RATE),
        Cell("weights 3e-5", "weights", lr=3e-5),
        Cell("lora of equal bytes, 3e-3", "lora", lr=3e-3, rank=21),
        Cell("paper's start", lr=2 * 0.0187 / STEPS, init="normal"),
        Cell("mask, keep 0.99", lr=RATE / 10, keep=0.99),
    ]
    if before:
        found.insert(6, Cell("delta mask, keep 0.5", lr=RATE, keep=0.5, delta=before))
        found.insert(7, Cell("delta mask, keep 0.9", lr=RATE, keep=0.9, delta=before))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", required=True)
    parser.add_argument("--domain", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--before")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", default="26-29")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", help="names of cells, with ; between")
    parser.add_argument("--answers", default="validation,test", help="splits whose answers are marked; the rest: loss")
    parser.add_argument("--tested", type=int, default=TESTED, help="test rows")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    answers = tuple(given.answers.split(",")) if given.answers else ()
    bench = Bench(given.base, given.domain, given.data, given.out, given.seed, given.layers, answers, given.tested)
    if not (given.out / "signal.json").exists():
        write_json(given.out / "signal.json", bench.signal())
        print((given.out / "signal.json").read_text(), flush=True)
    if "validation" in answers:
        bench.validate()  # the base's own answers are the drafts of everything after it
    bench.record("base", {})
    only = given.only.split(";") if given.only else None
    bench.record("smallest weights", bench.smallest(rows=False))
    for number, cell in enumerate(cells(given.before)):
        if only is None or cell.name in only:
            bench.run(cell, given.steps)
        if number == 3:
            bench.record("smallest rows", bench.smallest(rows=True))
            bench.record("random mask", bench.random_mask())


if __name__ == "__main__":
    main()

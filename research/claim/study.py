"""All of the study: `python -m research.claim.study LAB --model DIR --data FOLDER`.

Bases are fine-tuned in LAB, everything over them is trained and measured, results/ gets every test row's loss and mark,
and docs/claim.md its tables. One file a state in LAB; what is there is not done again, so that a run that was stopped
goes on. `--only REGEX` takes the parts whose names it matches: what says most comes first.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from research.claim import fft, page
from research.claim.bench import TESTED, Bench
from research.claim.cells import measure
from research.claim.common import DOMAINS

MASK, WEIGHTS, LORA = "mask", "weights 1e-4", "lora of equal bytes, 1e-3"
HIGHER = ("weights 3e-4", "lora of equal bytes, 3e-3")  # the controls' best rates over the first bases
RATES = ("mask, a tenth of the rate", "lora of equal bytes", "weights 3e-5")
OTHERS = ("mask, twice the rate", "mask, keep 0.95", "mask, keep 0.99", "delta mask, keep 0.9")
LORAS = ("lora of equal bytes", LORA, "lora of equal bytes, 3e-3")  # at all three rates


@dataclass(frozen=True)
class Part:
    """What is trained over one base. name: of its file in results/; seeds of one thing differ by `-seedN` alone.

    state: which state of the base's run, "" for the best; answers: splits whose answers are marked ("functions": the
    functions with tests), of the rest the loss alone is known; tested: test rows; learnt: split that is trained on,
    "train" for the rows that the base saw and "new" for others.
    """

    name: str
    domain: str
    cells: tuple[str, ...] = (MASK, WEIGHTS, LORA, *HIGHER)
    seed: int = 0
    state: str = ""
    answers: tuple[str, ...] = ()
    tested: int = 400
    layers: str = "26-29"
    learnt: str = "train"

    @property
    def base(self) -> str:
        return f"fft-{self.domain}-s{self.seed}{self.state}"


BY_ANSWERS = (MASK, WEIGHTS, LORA, *HIGHER, *RATES, "mask, keep 0.95", "delta mask, keep 0.5")
PARTS = [
    *(
        Part(f"wikisql-seed{n}", "wikisql", BY_ANSWERS, n, answers=("validation", "test"), tested=TESTED)
        for n in (0, 1, 2)
    ),
    Part("gsm8k-seed0", "gsm8k"),
    Part("python-seed0", "python", answers=("functions",)),
    Part("wikisql under-trained-seed0", "wikisql", state="-quarter"),
    Part("wikisql over-trained-seed0", "wikisql", state="-over"),
    Part("wikisql new rows-seed0", "wikisql", (MASK, *HIGHER), answers=("test",), tested=TESTED, learnt="new"),
    Part("wikisql other settings-seed0", "wikisql", (MASK, *OTHERS, "lora of the archive's bytes, 3e-3")),
    Part("wikisql all layers-seed0", "wikisql", (MASK, "weights 3e-5", *LORAS, "lora of rank 3, 1e-3"), layers="0-29"),
    Part("wikisql paper's layers-seed0", "wikisql", ("paper's start", MASK), layers="0-7,19-22"),
]
OVER = 80  # steps past the end of a run, for the over-trained base: another pass over its rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lab", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with wikisql/ and gsm8k/train.jsonl")
    parser.add_argument("--only", default="", help="regular expression that a part's name must contain")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.lab.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        if re.search(given.only, part.name):
            domain = DOMAINS[part.domain]
            fft.fine_tune(given.lab, given.model, given.data, domain, part.seed)
            if part.state == "-over":
                fft.over_fit(given.lab, given.model, given.data, domain, part.seed, OVER)
            out = given.lab / f"cells-{part.name}"
            out.mkdir(exist_ok=True)
            base = given.lab / part.base
            options = (part.seed, part.layers, part.answers, part.tested, part.learnt)
            bench = Bench(base, part.domain, given.data, out, *options)
            measure(bench, given.model, part.cells)
            page.collect(out, part.name)
            page.write()


if __name__ == "__main__":
    main()

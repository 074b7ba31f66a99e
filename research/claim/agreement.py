"""How far batches agree on a mask's first step, on bases fine-tuned more or less: `python -m research.claim.agreement`.

`--data FOLDER NAME=DIR ...`: writes results/agreement.json, from which docs/claim.md has its table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from research.claim.bench import Bench
from research.claim.common import write_json
from research.claim.page import AGREEMENT

BATCHES, SIZE = 8, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bases", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--domain", default="wikisql")
    parser.add_argument("--layers", default="26-29")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name, path in (base.split("=", 1) for base in given.bases):
        bench = Bench(path, given.domain, given.data, Path(), 0, given.layers)
        found[name] = bench.signal(BATCHES, SIZE)
    write_json(AGREEMENT, found)


if __name__ == "__main__":
    main()

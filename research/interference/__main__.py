"""Will two masks combine? The whole study, and the tables of docs/interference.md from it.

    python -m research.interference OUT --model DIR --domain math=FILE --domain sql=FILE --domain python=stdlib --seed 0

Trains the seed's masks, takes slopes and predictions on validation rows, replaces single layers of the own masks and
measures that on test rows. All of it is kept in OUT and not done again; a seed's results go to results/, beside those
of other seeds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mftmerge.files import replacing
from research.interference import page, predict
from research.interference.measure import open_bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--domain", action="append", required=True, help="NAME=FILE.jsonl or NAME=stdlib")
    parser.add_argument("--seed", type=int, action="append", required=True)
    given = parser.parse_args()
    record = json.loads(predict.MEASURED.read_text(encoding="utf-8"))
    bench = open_bench(given.out, given.model, given.domain)
    for seed in given.seed:
        _keep(page.RESULT, seed, predict.seed_shares(bench, seed, record))
        _keep(page.LAYERS, seed, predict.seed_layers(bench, seed))
    page.write()


def _keep(path: Path, seed: int, found: dict[str, Any]) -> None:
    """A seed's combinations in a file of results, in the place of what it had of that seed."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    others = {name: one for name, one in before.items() if not name.startswith(f"seed{seed}/")}
    every = others | {f"seed{seed}/{name}": one for name, one in found.items()}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(dict(sorted(every.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Learn a mask for one domain and write the masked model: `python examples/train_and_apply.py MODEL ROWS.jsonl OUT`.

ROWS.jsonl has a `prompt` and a `completion` a line; a tenth of it is held out to choose the best mask.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mftmerge


def main(model: str, rows: str, out: Path, steps: int = 60) -> None:
    result = mftmerge.train_mask(model, rows, out.with_suffix(".mask"), steps=steps, note=print)
    if not result.gained:
        print("nothing was gained on the held-out rows; the model is written all the same, to look at")
    report = mftmerge.apply_mask(result.mask, model, out)
    print(f"{out}: {report.dropped:,} of {report.covered:,} weights set to 0 in {report.tensors} tensors")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *map(int, sys.argv[4:]))

"""Two masks with scores, added up and cut once: `python examples/score_combination.py MODEL A.jsonl B.jsonl OUT.mask`.

Masks that start from the same scores differ by the evidence that each domain gathered. Adding the evidence and cutting
once keeps more of both gains than a union or an intersection of the finished masks.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mftmerge


def main(model: str, files: list[str], out: Path, steps: int = 60) -> None:
    paths = []
    for file in files:
        path = out.with_name(f"{Path(file).stem}.mask")
        mftmerge.train_mask(model, file, path, steps=steps, scores=True, note=print)
        paths.append(path)
    for operation, options in (("union", {}), ("intersection", {}), ("score", {"density": 0.9})):
        target = out if operation == "score" else out.with_name(f"{operation}.mask")
        report = mftmerge.combine_files(operation, paths, target, **options)
        print(f"{target.name}: keeps {report.density:.3f}; bits changed: {[i.changed for i in report.inputs]}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:4], Path(sys.argv[4]), *map(int, sys.argv[5:]))

"""A mask learnt on one model, applied to a merge: `python examples/mask_on_merged.py BASE OTHER MASK OUT`.

Writes a recipe that averages BASE and OTHER and masks the result, and builds it in one pass.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

import mftmerge


def main(base: str, other: str, mask: str, out: Path) -> None:
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(Path(m).absolute()), "parameters": {"weight": 0.5}} for m in (base, other)],
        "mask": str(Path(mask).absolute()),
    }
    path = out.with_suffix(".yml")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    report = mftmerge.build_recipe(path, out)
    print(f"{report.out}: {report.tensors} tensors in {report.seconds:.1f} s")


if __name__ == "__main__":
    main(*sys.argv[1:4], Path(sys.argv[4]))

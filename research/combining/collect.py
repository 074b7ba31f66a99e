"""Gather the records of a run into one file: `python -m research.combining.collect OUT NAME.json` (in results/).

The file holds, for the base model, the untrained mask and every model of every seed, the loss sums of the test rows
(rounded to a thousandth of a nat), the mean validation losses, and what is known about it. Token counts are kept once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mftmerge.files import replacing
from research.combining.common import mean, read_record


def collect(out: Path) -> dict[str, Any]:
    """All records of a directory."""
    study = json.loads((out / "study.json").read_text(encoding="utf-8"))
    records = {}
    tokens: dict[str, list[int]] = {}
    for path in sorted(out.glob("*.json")) + sorted(out.glob("seed*/**/*.json")):
        if path.name == "study.json" or "masks" in path.relative_to(out).parts:
            continue  # beside the records lie the masks and the settings of unfinished runs
        record = read_record(path)
        name = str(path.relative_to(out).with_suffix("")) if path.parent != out else path.stem
        for domain, values in record["test"].items():
            counts = [int(n) for n in values[:, 1]]
            if tokens.setdefault(domain, counts) != counts:
                raise SystemExit(f"{path}: other test rows than the records before it")
        records[name] = {
            "facts": record["facts"],
            "validation": {d: round(mean(v), 5) for d, v in record.get("validation", {}).items()},
            "test": {d: [round(float(s), 3) for s in v[:, 0]] for d, v in record["test"].items()},
        }
    return {"study": study, "tokens": tokens, "records": records}


def main() -> None:
    out, target = Path(sys.argv[1]), Path(sys.argv[2])
    found = collect(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        lines = [f"{json.dumps(name)}: {json.dumps(record)}" for name, record in found.pop("records").items()]
        head = json.dumps(found)[:-1]
        temporary.write_text(head + ', "records": {\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")
    print(f"{target}: {len(lines)} records")


if __name__ == "__main__":
    main()

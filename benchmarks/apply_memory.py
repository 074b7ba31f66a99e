"""Claim: applying a mask needs at most 32 MB above the interpreter with numpy, whatever the model's size.

One process per size applies a mask over all linear layers, in the plain form and to the delta from a base, with the
base's fingerprints checked; its peak resident memory is compared with that of a process that only imports numpy.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from apply_speed import make_checkpoint, make_mask
from common import machine, write

LIMIT = 32.0
PEAK = (
    "from pathlib import Path; print([int(x.split()[1]) / 1024 for x in "
    "Path('/proc/self/status').read_text().splitlines() if x.startswith('VmHWM')][0])"
)


def peak(code: str) -> float:
    """Peak resident megabytes of a Python process that runs `code`."""
    done = subprocess.run([sys.executable, "-c", f"{code}\n{PEAK}"], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two small sizes")
    options = parser.parse_args()
    interpreter = min(peak("import numpy") for _ in range(3))
    rows = []
    for layers, hidden in [(4, 512), (8, 1024)] if options.quick else [(4, 512), (8, 1024), (12, 2048)]:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            make_checkpoint(root / "model", layers, hidden, 0)
            make_checkpoint(root / "base", layers, hidden, 1)
            make_mask(root / "model", root / "a.mask", range(layers), True)
            size = sum(f.stat().st_size for f in (root / "model").glob("*.safetensors"))
            call = f"from mftmerge import apply_mask; apply_mask({str(root / 'a.mask')!r}, {str(root / 'model')!r}, "
            row: dict[str, float] = {"gigabytes": round(size / 1e9, 3)}
            row["weights to 0"] = peak(f"import numpy; {call}{str(root / 'o1')!r})") - interpreter
            base = f"base={str(root / 'base')!r}"
            row["delta to base"] = peak(f"import numpy; {call}{str(root / 'o2')!r}, {base})") - interpreter
            rows.append({k: round(v, 3) for k, v in row.items()})
            worst = max(row["weights to 0"], row["delta to base"])
            print(f"{size / 1e9:6.3f} GB: {worst:5.1f} MB above {interpreter:.1f} MB (limit {LIMIT:g})", end=" ")
            print("ok" if worst <= LIMIT else "MISSED", flush=True)
    if not options.quick:
        result = {"limit MB": LIMIT, "interpreter MB": round(interpreter, 1), "MB above it": rows}
        write("apply_memory", result | machine() | {"numpy": np.__version__})


if __name__ == "__main__":
    main()

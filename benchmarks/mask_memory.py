"""Claim: combining masks of 1e9 bits takes at most 64 MB of memory above the interpreter with numpy imported.

Each case runs in a process of its own; the figure is the peak of its resident memory over what it was after
`import numpy`. Sizes differ by 8x to show that it does not grow with them; with scores (32 bits a weight) a tenth.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from mask_common import at_most, plain, quick, random_mask, record

from mftmerge.mask import Mask, MaskInfo

CHILD = """
import sys, json, time
import numpy
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
options = json.loads(sys.argv[1])
before, start = peak(), time.perf_counter()
from mftmerge.combine import combine_files
combine_files(options.pop("op"), sys.argv[2:-1], sys.argv[-1], overwrite=True, **options)
print(peak() - before, time.perf_counter() - start)
"""

CASES = {
    "union of 2": '{"op": "union"}',
    "vote of 5": '{"op": "vote"}',
    "vote of 5, archived": '{"op": "vote", "archive": true}',
    "weighted vote of 5": '{"op": "vote", "weights": [5, 4, 3, 2, 1]}',
    "vote of 5 at density 0.9": '{"op": "vote", "density": 0.9}',
}


def child(options: str, masks: list[Path], out: Path) -> tuple[float, float]:
    command = [sys.executable, "-c", CHILD, options, *map(str, masks), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    memory, seconds = map(float, done.stdout.split())
    return memory, seconds


def scored_mask(path: Path, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = {"w": rng.standard_normal(size, np.float32)}
    Mask({"w": np.full(size // 8, 255, np.uint8)}, {"w": (size,)}, MaskInfo(keep=0.9), scores).save(path)


def main() -> None:
    small = quick()
    sizes = (1 << 24, 1 << 26) if small else (1 << 27, 1_000_000_000)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        masks = [folder / f"{i}.mask" for i in range(5)]
        for size in sizes:
            for i, path in enumerate(masks):
                random_mask(path, size, i, tensors=5)
            for case, options in CASES.items():
                some = masks[: 2 if case.startswith("union") else 5]
                memory, seconds = child(options, some, folder / "out.mask")
                rows.append(at_most(f"{case}, {size:.3g} bits", memory, 64, "MB"))
                rows.append(plain(f"{case}, {size:.3g} bits: time", seconds, "s"))
        for path in masks:
            path.unlink()
        for size in sizes:
            size = size // 80 * 8
            for i, path in enumerate(masks[:3]):
                scored_mask(path, size, i)
            memory, seconds = child('{"op": "score"}', masks[:3], folder / "out.mask")
            rows.append(at_most(f"score of 3, {size:.3g} weights with float32 scores", memory, 64, "MB"))
            rows.append(plain(f"score of 3, {size:.3g} weights: time", seconds, "s"))
    record(__file__, (__doc__ or "").split("\n")[0], rows)


if __name__ == "__main__":
    main()

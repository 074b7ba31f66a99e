"""Claim: combining mask files takes little more than copying one of them: union >= 0.85x `cp`, 3-of-5 vote >= 0.5x.

Measured in two places. On a memory file system nothing waits for a disk: the program's own speed. On a disk, both
sides end with their data on it, since a combination is synced before it is renamed: `cp` is followed by `sync FILE`.
Combining verifies every input's check sum, counts the result and the changed bits, on as many threads as there are
cores (at most 4). `bare loop` is the limit of the hardware: on as many threads it reads n files and writes one, with no
operation at all. Where it is below a target, no program on this machine meets it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from functools import partial
from pathlib import Path

from common import bare_loop, interleaved
from mask_common import at_least, plain, quick, random_mask, record

from mftmerge.combine import combine_files
from mftmerge.machine import cores


def measure(folder: Path, where: str, sync: bool, size: int, rounds: int) -> list[dict[str, object]]:
    masks = [folder / f"{i}.mask" for i in range(5)]
    for i, path in enumerate(masks):
        random_mask(path, size, i)
    out = folder / "out.mask"

    def copy() -> None:
        subprocess.run(["cp", masks[0], out], check=True)
        if sync:
            subprocess.run(["sync", out], check=True)

    threads = min(cores(), 4)

    def floor(n: int) -> None:
        bare_loop(masks[:n], out, threads)
        if sync:
            subprocess.run(["sync", out], check=True)

    def forget() -> None:
        with contextlib.suppress(FileNotFoundError):
            out.unlink()
        if sync:
            os.sync()

    sides = {
        "cp": copy,
        **{f"bare loop over {n}": partial(floor, n) for n in (2, 3, 5)},
        "union of 2": lambda: combine_files("union", masks[:2], out),
        "vote 2 of 3": lambda: combine_files("vote", masks[:3], out, threshold=2),
        "vote 3 of 5": lambda: combine_files("vote", masks, out, threshold=3),
    }
    seconds = interleaved(sides, rounds, before=forget)
    rows: list[dict[str, object]] = [plain(f"{where}: cp", seconds["cp"], "s")]
    targets = {"union of 2": (2, 0.85), "vote 2 of 3": (3, 0.5), "vote 3 of 5": (5, 0.5)}
    for name, (n, target) in targets.items():
        bare = seconds[f"bare loop over {n}"]
        rows.append(at_least(f"{where}: {name} against cp", seconds["cp"] / seconds[name], target))
        rows.append(plain(f"{where}: bare loop over {n}, {threads} threads, against cp", seconds["cp"] / bare, "x"))
        rows.append(plain(f"{where}: {name} against that loop", bare / seconds[name], "x"))
    return rows


def main() -> None:
    small = quick()
    size, rounds = (1 << 26, 3) if small else (1 << 30, 5)
    rows: list[dict[str, object]] = [plain("bits of each mask", size, "bits")]
    if os.access("/dev/shm", os.W_OK):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            rows += measure(Path(folder), "memory", False, size, rounds)
    with tempfile.TemporaryDirectory() as folder:
        rows += measure(Path(folder), "disk", True, size, rounds)
    record(__file__, (__doc__ or "").split("\n")[0], rows)


if __name__ == "__main__":
    main()

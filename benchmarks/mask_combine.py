"""Claim: combining mask files takes little more than copying one of them: union >= 0.85x `cp`, 3-of-5 vote >= 0.5x.

Measured in two places. On a memory file system nothing waits for a disk: the program's own speed. On a disk, both
sides end with their data on it, since a combination is synced before it is renamed: `cp` is followed by `sync FILE`.
Combining verifies every input's check sum, counts the result and the changed bits, on as many threads as there are
idle cores (at most 4). `floor` is the least that any program on one thread does which reads n files and writes one:
`pread` and `pwrite`, no operation at all. Where the floor is below a target, only idle cores can reach it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path

from common import interleaved
from mask_common import at_least, plain, quick, random_mask, record

from mftmerge.combine import combine_files


def measure(folder: Path, where: str, sync: bool, size: int, rounds: int) -> list[dict[str, object]]:
    masks = [folder / f"{i}.mask" for i in range(5)]
    for i, path in enumerate(masks):
        random_mask(path, size, i)
    out = folder / "out.mask"

    def copy() -> None:
        subprocess.run(["cp", masks[0], out], check=True)
        if sync:
            subprocess.run(["sync", out], check=True)

    def floor(n: int) -> None:
        piece = bytearray(1 << 18)
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(p, "rb", buffering=0)) for p in masks[:n]]
            target = stack.enter_context(open(out, "wb", buffering=0))
            while got := files[0].readinto(piece):
                for file in files[1:]:
                    file.readinto(piece)
                target.write(memoryview(piece)[:got])
            if sync:
                os.fsync(target.fileno())

    def forget() -> None:
        with contextlib.suppress(FileNotFoundError):
            out.unlink()
        if sync:
            os.sync()

    sides = {
        "cp": copy,
        "floor of 2": lambda: floor(2),
        "floor of 5": lambda: floor(5),
        "union of 2": lambda: combine_files("union", masks[:2], out),
        "vote 2 of 3": lambda: combine_files("vote", masks[:3], out, threshold=2),
        "vote 3 of 5": lambda: combine_files("vote", masks, out, threshold=3),
    }
    seconds = interleaved(sides, rounds, before=forget)
    rows: list[dict[str, object]] = [plain(f"{where}: cp", seconds["cp"], "s")]
    rows += [plain(f"{where}: floor of {n} against cp", seconds["cp"] / seconds[f"floor of {n}"], "x") for n in (2, 5)]
    targets = {"union of 2": 0.85, "vote 2 of 3": 0.5, "vote 3 of 5": 0.5}
    rows += [at_least(f"{where}: {n} against cp", seconds["cp"] / seconds[n], t) for n, t in targets.items()]
    return rows


def main() -> None:
    small = quick()
    size, rounds = (1 << 26, 3) if small else (1 << 30, 7)
    rows: list[dict[str, object]] = [plain("bits of each mask", size, "bits")]
    if os.access("/dev/shm", os.W_OK):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            rows += measure(Path(folder), "memory", False, size, rounds)
    with tempfile.TemporaryDirectory() as folder:
        rows += measure(Path(folder), "disk", True, size, rounds)
    record(__file__, (__doc__ or "").split("\n")[0], rows)


if __name__ == "__main__":
    main()

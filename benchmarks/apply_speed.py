"""Claim: applying a mask to a checkpoint is at least 0.9x as fast as `cp -r` of that checkpoint.

Both sides run alternately, each finding the files as a fresh process would (page cache warm), into
an empty target. On a disk both sides end with their data on it: `cp` is followed by `sync` of its files, since apply
syncs too. On a memory file system there is no disk to wait for, so it shows the program's own speed.

Cases: all linear layers masked; the same with the base's fingerprints checked (hashes every covered byte beside the
copying); four layers masked and checked, as the method's masks are; all layers to the delta from a base. `bare loop` is
the limit of the hardware: reads and writes alone, on as many threads; with the base, it reads both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import bare_loop, machine, write
from safetensors.numpy import save_file

from mftmerge import Mask, MaskInfo, apply_mask
from mftmerge.apply import WORKERS
from mftmerge.checkpoint import Checkpoint

TARGET = 0.9


def make_checkpoint(path: Path, layers: int, hidden: int, seed: int) -> None:
    """A sharded Llama-like 16-bit checkpoint of random bits (two layers a shard)."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    block = rng.integers(0, 1 << 16, 1 << 24, dtype=np.uint16)
    shapes = {"q_proj": (hidden, hidden), "k_proj": (hidden // 4, hidden), "v_proj": (hidden // 4, hidden)}
    shapes |= {"o_proj": (hidden, hidden), "gate_proj": (4 * hidden, hidden)}
    shapes |= {"up_proj": (4 * hidden, hidden), "down_proj": (hidden, 4 * hidden)}
    weight_map = {}
    groups = [{"model.embed_tokens.weight": (32000, hidden), "model.norm.weight": (hidden,)}]
    for i in range(0, layers, 2):
        names = [(j, n, s) for j in (i, i + 1) if j < layers for n, s in shapes.items()]
        groups.append({f"model.layers.{j}.{n}.weight": s for j, n, s in names})
    for number, group in enumerate(groups):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        save_file({n: np.resize(block, s).view(np.float16) for n, s in group.items()}, path / file)
        weight_map |= dict.fromkeys(group, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text("{}")


def make_mask(path: Path, out: Path, layers: range, checked: bool) -> None:
    checkpoint = Checkpoint.open(path)
    names = [n for n in checkpoint.names if ".layers." in n and int(n.split(".")[2]) in layers]
    block = np.packbits(np.random.default_rng(0).random(1 << 24) < 0.9, bitorder="little")
    shapes = {n: checkpoint.entry(n).shape for n in names}
    packed = {n: np.resize(block, int(np.prod(s)) // 8) for n, s in shapes.items()}
    prints = {n: checkpoint.fingerprint(n) for n in names} if checked else {}
    Mask(packed, shapes, MaskInfo(fingerprints=prints)).save(out)


def measure(
    cases: dict[str, Callable[[Path], object]], target: Path, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall and processor seconds of each case. The latter say what a busy machine hides."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    processor: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            shutil.rmtree(target, ignore_errors=True)
            os.sync()
            started, before = time.perf_counter(), sum(os.times()[:4])
            run(target)
            seconds[name].append(time.perf_counter() - started)
            processor[name].append(sum(os.times()[:4]) - before)
    shutil.rmtree(target, ignore_errors=True)
    return seconds, processor


def run_on(where: Path, layers: int, hidden: int, rounds: int, durable: bool) -> dict[str, object]:
    with tempfile.TemporaryDirectory(dir=where) as folder:
        root = Path(folder)
        make_checkpoint(root / "model", layers, hidden, 0)
        make_checkpoint(root / "base", layers, hidden, 1)
        make_mask(root / "model", root / "all.mask", range(layers), False)
        make_mask(root / "model", root / "checked.mask", range(layers), True)
        make_mask(root / "model", root / "four.mask", range(4, 8), True)

        def copy(target: Path) -> None:
            subprocess.run(["cp", "-r", root / "model", target], check=True)
            if durable:
                subprocess.run(["sync", *target.iterdir()], check=True)

        def loop(target: Path, *models: str) -> None:
            target.mkdir()
            for shard in (root / "model").glob("*.safetensors"):
                bare_loop([root / m / shard.name for m in models], target / shard.name, WORKERS)
            if durable:
                subprocess.run(["sync", *target.iterdir()], check=True)

        cases: dict[str, Callable[[Path], object]] = {
            "cp": copy,
            "bare loop": lambda t: loop(t, "model"),
            "bare loop, with the base": lambda t: loop(t, "model", "base"),
            "all layers": lambda t: apply_mask(root / "all.mask", root / "model", t),
            "all layers, base checked": lambda t: apply_mask(root / "checked.mask", root / "model", t),
            "four layers, base checked": lambda t: apply_mask(root / "four.mask", root / "model", t),
            "all layers, delta": lambda t: apply_mask(root / "all.mask", root / "model", t, base=root / "base"),
        }
        seconds, processor = measure(cases, root / "out", rounds)
        size = sum(f.stat().st_size for f in (root / "model").glob("*.safetensors"))
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    ratios = {n: round(medians["cp"] / s, 3) for n, s in medians.items() if n != "cp"}
    used = {name: round(statistics.median(s), 3) for name, s in processor.items()}
    return {
        "gigabytes": round(size / 1e9, 3),
        "median seconds": {name: round(s, 3) for name, s in medians.items()},
        "throughput against cp": ratios,
        "median processor seconds": used,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small checkpoint, few rounds")
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"))
    options = parser.parse_args()
    layers, hidden, rounds = (8, 1024, 3) if options.quick else (12, 2048, 3)
    results: dict[str, object] = {}
    for name, where, durable in (("memory", options.memory, False), ("disk", options.disk, True)):
        if not where.is_dir():
            continue
        results[name] = one = run_on(where, layers, hidden, rounds, durable)
        for case, ratio in one["throughput against cp"].items():  # type: ignore[attr-defined]
            verdict = "" if case.startswith("bare") else "met" if ratio >= TARGET else "NOT MET"
            print(f"{name:6} {case:28} {ratio:5.2f}x cp" + (f" (target {TARGET}) {verdict}" if verdict else ""))
    results |= {"target": TARGET, **machine(), "numpy": np.__version__}
    results["load average"] = round(os.getloadavg()[0], 1)
    if not options.quick:
        write("apply_speed", results)


if __name__ == "__main__":
    main()

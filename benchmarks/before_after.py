"""An earlier commit of the package against this one, side by side: combine, apply, build and a training step.

    python benchmarks/before_after.py d2c4eed [--rounds 5] [--job build]

Each side is a process of its own with its own package, and the two take turns, so that a busy machine meets both. The
jobs are called by the public names that both have. Printed are median seconds and before / after, above 1 is faster,
on the clock and of the processor, which other programs' load does not change.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import common

HERE = Path(__file__).resolve()
JOBS = ("combine", "combine to a density", "apply", "build", "train, 6 steps")


def jobs(folder: Path, mine: Path) -> dict[str, Callable[[], object]]:
    """What a side does, with the package that it imports. folder: inputs of both sides; mine: this side's own."""
    import numpy as np
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import mftmerge

    with safe_open(folder / "base/model.safetensors", "numpy") as opened:
        shapes = {n: opened.get_slice(n).get_shape() for n in opened.keys() if "proj" in n}  # noqa: SIM118
    masks = [mine / f"{name}.mask" for name in "abc"]
    for seed, path in enumerate(masks):
        random = np.random.default_rng(seed)
        mftmerge.Mask.from_bools({n: random.random(s, np.float32) < 0.9 for n, s in shapes.items()}).save(path)
    models = ", ".join(
        f"{{model: {folder / name}, mask: {{file: {mask}, on: delta}}, parameters: {{weight: 0.5}}}}"
        for name, mask in zip(("math", "code"), masks, strict=False)
    )
    (mine / "r.yml").write_text(f"merge_method: task_arithmetic\nbase_model: {folder / 'base'}\nmodels: [{models}]\n")
    model = AutoModelForCausalLM.from_pretrained(folder / "small", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "small")
    training = {"steps": 6, "batch_size": 4, "eval_share": 0.0, "tokenizer": tokenizer}
    return {
        "combine": partial(mftmerge.combine_files, "vote", masks, mine / "o.mask", overwrite=True),
        "combine to a density": partial(
            mftmerge.combine_files, "vote", masks, mine / "o.mask", overwrite=True, density=0.9
        ),
        "apply": partial(mftmerge.apply_mask, masks[0], folder / "base", mine / "applied", overwrite=True),
        "build": partial(mftmerge.build_recipe, mine / "r.yml", mine / "built", overwrite=True),
        "train, 6 steps": partial(mftmerge.train_mask, model, str(folder / "rows.jsonl"), **training),
    }


def serve(folder: Path, mine: Path) -> None:
    """One side: does the jobs whose names come in, and says when each is done."""
    answers, sys.stdout = sys.stdout, sys.stderr
    found = jobs(folder, mine)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        before = time.process_time()
        found[line.strip()]()
        print(time.process_time() - before, file=answers, flush=True)


def start(package: Path, folder: Path, name: str) -> Callable[[str], float]:
    """A side with the package in a directory; gives what has it do a job, and says how long its processor took."""
    (folder / name).mkdir()
    side = subprocess.Popen(
        [sys.executable, str(HERE), "--serve", str(folder), str(folder / name)],
        env=os.environ | {"PYTHONPATH": str(package), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert side.stdin
    assert side.stdout

    def do(job: str) -> float:
        assert side.stdin
        assert side.stdout
        side.stdin.write(f"{job}\n")
        side.stdin.flush()
        if not (answer := side.stdout.readline()):
            raise SystemExit(f"{name}: {job} failed")
        return float(answer)

    if side.stdout.readline() != "ready\n":
        raise SystemExit(f"{name}: could not begin")
    return do


def take_turns(
    sides: Mapping[str, Callable[[str], float]], job: str, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each side on the clock, and of its processor."""
    used: dict[str, list[float]] = {name: [] for name in sides}
    ways = {name: partial(lambda name: used[name].append(sides[name](job)), name) for name in sides}
    clock = common.interleaved(ways, rounds)
    return clock, {name: statistics.median(seconds[1:]) for name, seconds in used.items()}  # the first one warms up


def main() -> None:
    """Make the inputs, let both sides take turns, print and write the result."""
    from mftmerge.quickstart.tiny import tiny_checkpoint

    parser = argparse.ArgumentParser()
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--job", choices=JOBS, action="append", help="only these")
    given = parser.parse_args()
    root = HERE.parent.parent
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for seed, name in enumerate(("base", "math", "code")):
            tiny_checkpoint(folder / name, hidden=640, layers=8, seed=seed)
        tiny_checkpoint(folder / "small", hidden=256, layers=8)
        rows = [{"prompt": f"what is {i}?" * 8, "completion": f"it is {i}" * 8} for i in range(64)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "package").mkdir()
        archive = subprocess.run(
            ["git", "archive", given.commit, "mftmerge"], cwd=root, stdout=subprocess.PIPE, check=True
        )
        subprocess.run(["tar", "-x", "-C", str(folder / "package")], input=archive.stdout, check=True)
        sides = {"before": start(folder / "package", folder, "before"), "after": start(root, folder, "after")}
        medians, processor = {}, {}
        for job in given.job or JOBS:
            medians[job], processor[job] = take_turns(sides, job, given.rounds)
            for what, seconds in (("clock", medians[job]), ("processor", processor[job])):
                a, b = seconds["before"], seconds["after"]
                print(f"{job:22s} {what:9s} {a:8.3f} s before {b:8.3f} s after {a / b:6.2f}", flush=True)
    result = {"commit": given.commit, "median_seconds": medians, "median_processor_seconds": processor}
    result["machine"] = common.machine()
    common.write("before_after", result)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()

"""How the quickstart's training step fares beside busy neighbours, with threads that spin and threads that sleep.

The command line lets OpenMP's threads sleep while they wait (OMP_WAIT_POLICY=passive) unless the user has set it.
Beside as many busy processes as there are cores a step is to be at least 2.5 times faster than with the default, and
idle not slower by more than a tenth. Also: products in float32 and bfloat16, which `--dtype auto` chooses between.

    python benchmarks/busy_machine.py [--steps N]

The model has random weights and the shape of SmolLM2-135M's top four layers, which is what a step of the quickstart
computes (hidden states below are cached), with a smaller vocabulary. Each cell is a process of its own, as the policy
is read at start. Where the machine has other work already, "idle" is not: its load is in the results.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from common import small_llama
from train_common import finish

from mftmerge.machine import WAITING, cores, lacks_bfloat16

ROWS, TOKENS = 4, 96
VOCABULARY = 8192
NEIGHBOUR = "x = 1\nwhile True:\n    x = x * 3 % 1000003"


def measure(steps: int) -> dict[str, list[float]]:
    """Wall and processor seconds of each training step, in this process."""
    import torch
    from transformers import LlamaForCausalLM

    from mftmerge.train import scores, targets
    from mftmerge.train.optimizer import MaskOptimizer

    torch.manual_seed(0)
    model = LlamaForCausalLM(small_llama(VOCABULARY, layers=4))
    model.config.use_cache = False
    found = targets.find(model, "0-3")
    targets.freeze_others(model, found)
    optimizer = MaskOptimizer(found, scores.initial(found, "magnitude"), signed=True)
    ids = torch.randint(0, VOCABULARY, (ROWS, TOKENS))  # (rows, tokens)
    wall, processor = [], []
    for step in range(steps + 1):
        start, own = time.perf_counter(), time.process_time()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step:  # the first one warms up
            wall.append(time.perf_counter() - start)
            processor.append(time.process_time() - own)
    return {"wall": wall, "processor": processor}


def products() -> dict[str, float]:
    """GFLOP/s of a product of two matrices of 1,024 x 1,024, by dtype."""
    import torch

    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(1024, 1024).to(dtype)
        times = []
        for _ in range(12):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        found[str(dtype).removeprefix("torch.")] = 2 * 1024**3 / min(times) / 1e9
    return found


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that use all of a core that they get."""
    running = [subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def cell(what: str, steps: int, policy: str | None) -> dict[str, list[float]]:
    """A measurement in a process of its own, under a waiting policy (None: the library's default)."""
    environment = {k: v for k, v in os.environ.items() if k not in (*WAITING, "OMP_NUM_THREADS")}
    if policy:
        environment["OMP_WAIT_POLICY"] = policy
    done = subprocess.run(
        [sys.executable, __file__, "--cell", what, "--steps", str(steps)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    result: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="steps of each cell and round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cell", choices=("step", "products"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(measure(arguments.steps) if arguments.cell == "step" else products()))
        return
    load = os.getloadavg()[0]
    wall: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for busy in (0, cores()):
            for policy in (None, "passive"):
                key = f"{'busy' if busy else 'idle'} {policy or 'default'}"
                with neighbours(busy):
                    found = cell("step", arguments.steps, policy)
                wall.setdefault(key, []).extend(found["wall"])
                processor.setdefault(key, []).extend(found["processor"])
    seconds = {key: statistics.median(values) for key, values in wall.items()}
    seconds |= {f"{key}, processor": statistics.median(values) for key, values in processor.items()}
    speed = cell("products", 0, "passive")
    ratios = {
        "busy: default / passive, wall": seconds["busy default"] / seconds["busy passive"],
        "busy: default / passive, processor": seconds["busy default, processor"] / seconds["busy passive, processor"],
        "idle: passive / default, wall": seconds["idle passive"] / seconds["idle default"],
        "idle: default / passive, processor": seconds["idle default, processor"] / seconds["idle passive, processor"],
        "products: float32 / bfloat16, GFLOP/s": speed["float32"] / speed["bfloat16"],
    }
    targets = {"busy: default / passive, wall": (">=", 2.5), "idle: passive / default, wall": ("<=", 1.1)}
    what = {"rows": ROWS, "tokens": TOKENS, "neighbours": cores(), "load before": round(load, 1)}
    what |= {"GFLOP/s": speed, "processor lacks bfloat16 arithmetic": lacks_bfloat16()}
    finish("busy_machine", what, seconds, ratios, targets)


if __name__ == "__main__":
    main()

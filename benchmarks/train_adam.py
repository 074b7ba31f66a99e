"""What 8-bit moments cost and save: one update of the scores (Adam and the cut), without forward and backward passes.

The state of 8-bit Adam takes at most 0.51 of 32-bit's bytes, scores included. There is no target for its time.

    python benchmarks/train_adam.py [--quick]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from common import interleaved
from train_common import finish

from mftmerge.train import scores
from mftmerge.train.optimizer import MaskOptimizer
from mftmerge.train.targets import Target

SHAPES = [(1024, 1024), (2816, 1024), (1024, 2816)]


def updater(bits: int) -> tuple[Callable[[], None], int]:
    """A function that makes one update of all matrices, and the bytes of scores and moments."""
    torch.manual_seed(0)
    found = [Target(f"w{i}", torch.nn.Parameter(torch.randn(s) * 0.02), 0) for i, s in enumerate(SHAPES)]
    optimizer = MaskOptimizer(found, scores.initial(found), adam_bits=bits)
    gradients = [torch.randn(s) * 1e-3 for s in SHAPES]

    def update() -> None:
        for t, g in zip(found, gradients, strict=True):
            t.parameter.grad = g.clone()
        optimizer.step()

    states = [optimizer.state[t.parameter] for t in found]
    return update, sum(v.nbytes for s in states for k, v in s.items() if k not in ("original", "step"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds")
    rounds = 3 if parser.parse_args().quick else 15
    torch.set_num_threads(1)
    made = {f"{bits} bits": updater(bits) for bits in (32, 8)}
    ways = {name: update for name, (update, _) in made.items()}
    seconds = interleaved(ways, rounds, clock=time.thread_time, warm=2)
    ratios = {
        "bytes of scores and moments, 8 / 32 bits": made["8 bits"][1] / made["32 bits"][1],
        "time of an update, 8 / 32 bits": seconds["8 bits"] / seconds["32 bits"],
    }
    what = {"shapes": SHAPES, "weights": sum(a * b for a, b in SHAPES), "threads": 1}
    finish("train_adam", what, seconds, ratios, {next(iter(ratios)): ("<=", 0.51)})


if __name__ == "__main__":
    main()

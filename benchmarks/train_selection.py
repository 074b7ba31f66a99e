"""Claim: the exact k-th value of float32 scores costs at least 40 times less than a full sort.

python benchmarks/train_selection.py [--quick]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from common import interleaved
from train_common import finish

from mftmerge.train import selection

TARGET = 40.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="4 million scores instead of 45 million")
    size = 4_000_000 if parser.parse_args().quick else 45_000_000
    torch.set_num_threads(1)
    values = torch.randn(size, generator=torch.Generator().manual_seed(0)).abs()
    dropped = size // 10
    ways = {
        "sort": lambda: float(torch.sort(values).values[dropped]),
        "numpy sort": lambda: float(np.sort(values.numpy())[dropped]),
        "topk": lambda: float(torch.topk(values, dropped + 1, largest=False).values[-1]),
        "kthvalue": lambda: float(torch.kthvalue(values, dropped + 1).values),
        "histogram": lambda: selection.smallest_kept_over([values], dropped),
        "ours": lambda: selection.smallest_kept(values, dropped),
        "abs": lambda: values.abs(),
    }
    found = {name: way() for name, way in ways.items() if name != "abs"}
    assert len(set(found.values())) == 1, found
    seconds = interleaved(ways, 3, clock=time.thread_time, warm=0)  # warm from the check above
    ratios = {f"{name} / ours": seconds[name] / seconds["ours"] for name in ways if name not in ("ours",)}
    finish("train_selection", {"scores": size, "dropped": dropped}, seconds, ratios, {"sort / ours": (">=", TARGET)})


if __name__ == "__main__":
    main()

"""Claim: rows of mixed lengths are trained on at least twice as fast as in plain padded batches.

A step takes the same rows on both sides: padded to the longest, or as `train` runs them on a CPU, rows of like length
together. The lengths are of 32 rows each of GSM8K and WikiSQL, drawn at random, as SmolLM2's tokenizer and chat
template make them. Forward and backward passes of a Llama of SmolLM2's width with random weights, all layers learnt.

    python benchmarks/train_rows.py [--quick]
"""

from __future__ import annotations

import argparse
import random
import time

import torch
from common import interleaved, small_llama
from train_common import finish
from transformers import LlamaForCausalLM

from mftmerge.data import Tokens
from mftmerge.loss import token_losses
from mftmerge.train.batches import PASS_TOKENS, loader

# fmt: off
GSM8K = [331, 307, 222, 183, 146, 217, 157, 132, 280, 181, 201, 197, 243, 195, 213, 141,
         223, 216, 132, 191, 190, 327, 146, 204, 252, 198, 191, 348, 305, 124, 122, 164]
WIKISQL = [86, 77, 98, 89, 77, 106, 90, 89, 126, 80, 101, 82, 97, 80, 75, 97,
           74, 102, 84, 77, 92, 103, 118, 92, 101, 76, 84, 108, 93, 99, 124, 82]
# fmt: on
VOCABULARY = 4096  # the head runs at labels only, so that it has no part in padding


def rows() -> list[Tokens]:
    """Rows whose second half is labelled, in random order."""
    draw = random.Random(0)
    found: list[Tokens] = []
    for length in draw.sample(GSM8K + WIKISQL, 64):
        ids = [draw.randrange(1, VOCABULARY) for _ in range(length)]
        found.append({"input_ids": ids, "labels": [*[-100] * (length // 2), *ids[length // 2 :]]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, 16 rows a step")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    config = small_llama(VOCABULARY, layers=2)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    data = rows()

    def step(size: int, pass_tokens: int | None) -> None:
        torch.manual_seed(1)
        for batch in loader(model, data, size, 0, pass_tokens):
            for one in batch:
                token_losses(model, one["input_ids"], one["labels"])[0].sum().backward()
            model.zero_grad()

    sizes = (16,) if quick else (8, 16, 32)
    ways = {
        f"{size} rows, {name}": lambda size=size, tokens=tokens: step(size, tokens)
        for size in sizes
        for name, tokens in (("padded", None), ("by length", PASS_TOKENS))
    }
    seconds = interleaved(ways, 1 if quick else 2, clock=time.thread_time, warm=0)
    ratios = {
        f"{n} rows a step, rows a second": seconds[f"{n} rows, padded"] / seconds[f"{n} rows, by length"] for n in sizes
    }
    targets = dict.fromkeys(ratios, (">=", 2.0))
    finish("train_rows", {"rows": len(data), "threads": 1, "tokens a pass": PASS_TOKENS}, seconds, ratios, targets)


if __name__ == "__main__":
    main()

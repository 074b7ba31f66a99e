"""Claim: answers come at least as fast as from transformers' own batch generation, and a mask's in a fraction of that.

Greedy answers of a chat model (SmolLM2-135M-Instruct by default) to word problems, in float32 on one thread, counted in
answers per minute of processor time. transformers generates in batches of 16 in the order of the rows, in batches of
16 of like length. The last way is what a mask over the model costs:
the model's answers are its drafts (here of a mask that drops the smallest 10 % of four layers).
All ways of one model must give the same answers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from common import interleaved, machine, write

from mftmerge.evaluate import generation
from mftmerge.quickstart.domains import arithmetic_splits
from mftmerge.train import scores, targets
from mftmerge.train.optimizer import MaskOptimizer

BATCH = 16


def by_transformers(model: Any, tokenizer: Any, prompts: Sequence[list[int]], new: int, *, like: bool) -> list[str]:
    """Answers from `generate` in batches of 16, padded on the left."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i])) if like else list(range(len(prompts)))
    texts = [""] * len(prompts)
    for first in range(0, len(order), BATCH):
        places = order[first : first + BATCH]
        batch = tokenizer.pad({"input_ids": [prompts[i] for i in places]}, padding_side="left", return_tensors="pt")
        written = model.generate(**batch, do_sample=False, max_new_tokens=new)[:, batch["input_ids"].shape[1] :]
        for i, text in zip(places, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
            texts[i] = text
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--quick", action="store_true", help="8 rows of 8 tokens")
    options = parser.parse_args()
    rows, new = (8, 8) if options.quick else (options.rows, options.new_tokens)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    asked = generation.questions(arithmetic_splits({"train": 1, "test": rows})["test"], tokenizer)
    prompts = [q.prompt for q in asked]
    found: dict[str, Any] = {}
    ids: list[list[int]] = []

    def ours(drafts: Any = None) -> list[str]:
        answers = generation.generate(model, tokenizer, prompts, max_new_tokens=new, drafts=drafts)
        ids[:] = ids or answers
        return [str(t) for t in tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def keep(name: str, way: Any) -> Any:
        return lambda: found.__setitem__(name, way())

    ways = {
        "transformers, in order": lambda: by_transformers(model, tokenizer, prompts, new, like=False),
        "transformers, of like length": lambda: by_transformers(model, tokenizer, prompts, new, like=True),
        "mftmerge": ours,
    }
    seconds = interleaved({n: keep(n, w) for n, w in ways.items()}, 1, clock=time.thread_time, warm=0)
    same = {n: sum(a == b for a, b in zip(found[n], found["mftmerge"], strict=True)) for n in ways}
    masked = targets.find(model, "26-29" if len(model.model.layers) > 29 else None)
    optimizer = MaskOptimizer(masked, scores.initial(masked))
    drafted = {"a mask, from nothing": ours, "a mask, with the model's answers as drafts": lambda: ours(list(ids))}
    seconds |= interleaved({n: keep(n, w) for n, w in drafted.items()}, 1, clock=time.thread_time, warm=0)
    equal = [a == b for a, b in zip(*(found[n] for n in drafted), strict=True)]
    optimizer.restore()
    per_minute = {name: round(60 * rows / s, 1) for name, s in seconds.items()}
    ratio = per_minute["mftmerge"] / max(n for name, n in per_minute.items() if name.startswith("transformers"))
    met = "met" if ratio >= 1 else "NOT met"
    print(f"mftmerge against the faster way of transformers: {ratio:.2f} (target >= 1: {met})")
    result: dict[str, Any] = {"against transformers": round(ratio, 3), "target": ">= 1", "met": ratio >= 1}
    result |= {"answers per minute of processor time": per_minute, "rows": rows, "new tokens": new}
    result |= {"the same answers as mftmerge": same, "a mask's answers equal with and without drafts": sum(equal)}
    print(*(f"{name}: {n} answers a minute" for name, n in per_minute.items()), result, sep="\n")
    if not options.quick:
        write("generation", result | {"machine": machine(), "transformers": transformers.__version__})


if __name__ == "__main__":
    main()

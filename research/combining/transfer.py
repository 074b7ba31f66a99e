"""Masks on models that they were not trained on: `python -m research.combining.transfer OUT --model DIR --study DIR`.

The masks of a finished `run.py` (its directory is --study) are applied to the average and to the sum (task arithmetic,
scale 0.5) of the weight controls of the same seed, and to every checkpoint given as --target NAME=DIR.
Beside them: the same model without a mask, with the untrained and with a random mask, and with the task vector of the
domain's weight control added, which is what a mask has to compete with.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mftmerge.combine import combine
from mftmerge.mask import Mask
from mftmerge.train.run import train_mask
from research.combining.combinations import bools
from research.combining.common import Bench, Plan, Weights, average, read_rows, task_arithmetic

DENSITY = 0.93  # of the combined mask: the score operation's default for masks of 0.9


def measure_on(bench: Bench, place: str, values: Weights, base: Weights, study: Path, seed: int) -> None:
    """Every row of the table for one target model, whose masked parameters hold `values`."""
    home = study / f"seed{seed}"
    loaded = [Mask.load(home / "masks" / f"{d}.mask") for d in bench.domains]
    masks = {d: bools(mask) for d, mask in zip(bench.domains, loaded, strict=True)}
    for name, kept in {
        "no mask": None,
        "untrained mask": bools(Mask.load(study / "untrained.mask")),
        "random mask": bools(Mask.load(study / "random.mask")),
        "combined mask": bools(combine("score", loaded, density=DENSITY)),
    }.items():
        bench.measure(f"{place}/{name}", values if kept is None else bench.masked(kept, values), splits=("test",))
    for domain in bench.domains:
        trained = load_file(home / "weights" / f"{domain}.safetensors")
        moved = {n: values[n] + trained[n] - base[n] for n in values}
        bench.measure(f"{place}/{domain} mask", bench.masked(masks[domain], values), splits=("test",), domains=[domain])
        bench.measure(f"{place}/{domain} task vector", moved, splits=("test",), domains=[domain])


def untrained_masks(bench: Bench, study: Path) -> None:
    """The mask of the smallest weights and a random one, as training would start from them."""
    for name, init in (("untrained", "magnitude"), ("random", "normal")):
        if not (study / f"{name}.mask").exists():
            settings = {"steps": 0, "init": init, "keep": bench.plan.keep, "layers": bench.plan.layers}
            domain = bench.domains[0]
            train_mask(
                bench.model,
                bench.rows[domain]["train"][:2],
                study / f"{name}.mask",
                settings=settings,
                eval_data=bench.rows[domain]["validation"][:1],
                tokenizer=bench.tokenizer,
                prefix=bench.cache,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--study", type=Path, required=True)
    parser.add_argument("--domain", action="append", required=True)
    parser.add_argument("--target", action="append", default=[])
    parser.add_argument("--seed", type=int, action="append", required=True)
    given = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    plan, tokenizer = Plan(), AutoTokenizer.from_pretrained(given.model)
    rows = read_rows(dict(d.split("=", 1) for d in given.domain), tokenizer, plan)

    def bench_of(path: str) -> Bench:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        return Bench(plan, model, tokenizer, rows, given.out)

    bench = bench_of(given.model)
    untrained_masks(bench, given.study)
    base = bench.originals
    given.out.mkdir(parents=True, exist_ok=True)
    facts = {"plan": vars(plan), "domains": bench.domains, "model": Path(given.model).name}
    (given.out / "study.json").write_text(json.dumps(facts) + "\n")
    for seed in given.seed:
        place = given.study / f"seed{seed}" / "weights"
        trained = [load_file(place / f"{d}.safetensors") for d in bench.domains]
        for name, values in (("average", average(trained)), ("task arithmetic", task_arithmetic(base, trained, 0.5))):
            measure_on(bench, f"seed{seed}/{name}", values, base, given.study, seed)
    for target in given.target:
        name, path = target.split("=", 1)
        bench = bench_of(path)
        for seed in given.seed:
            measure_on(bench, f"seed{seed}/{name}", bench.originals, base, given.study, seed)


if __name__ == "__main__":
    main()

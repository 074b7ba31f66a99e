"""Run the study on one base model: `python -m research.combining.run OUT --model DIR --domain math=FILE ... --seed 0`.

Every trained mask and every measurement is a file in OUT; what is there already is not done again, so that a run that
was stopped goes on, and seeds can run in several processes. `page.py` turns OUT into tables and pictures.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from research.combining import combinations, learn
from research.combining.common import Bench, Plan, average, mean, read_record, read_rows, task_arithmetic


def seed_of_masks(bench: Bench, seed: int, parts: set[str], only: set[str] | None) -> None:
    """Everything for one seed. only: names of the combinations to try, None for all."""
    place, plan = f"seed{seed}", bench.plan
    bench.measure("base", {})
    masks = []
    for domain in bench.domains:
        found = learn.mask(bench, seed, domain, [domain])
        masks.append(found)
        bench.measure(
            f"{place}/{domain} mask",
            bench.masked(combinations.bools(found)),
            best_step=found.info.training["best_step"],
        )
    family = combinations.Family(masks, gains(bench, seed, "validation"), plan.keep)
    bench.measure("untrained mask", bench.masked(combinations.bools(family.start)))
    if "combine" in parts:
        for name, make in combinations.untuned(family).items():
            if (only is None or name in only) and not (bench.out / place / f"{name}.json").exists():
                kept = make()
                bench.measure(f"{place}/{name}", bench.masked(kept), density=density(kept))
        for name, change, options in (
            ("score balanced", None, {}),
            ("score elected and balanced", combinations.elected, {}),
            ("score balanced at 0.94", combinations.normalised, {"keep": 0.94, "step": 0.5}),
        ):
            if only is None or name in only:
                balance(bench, seed, family, name, change, **options)
    if "weights" in parts:
        controls(bench, seed)
    if "joint" in parts:
        trained_together(bench, seed)


def gains(bench: Bench, seed: int, split: str) -> list[float]:
    """How much each domain's own mask lowers its loss on a split."""
    base = read_record(bench.out / "base.json")[split]
    own = {d: read_record(bench.out / f"seed{seed}" / f"{d} mask.json")[split] for d in bench.domains}
    return [mean(base[d]) - mean(own[d][d]) for d in bench.domains]


def density(kept: combinations.Kept) -> float:
    return float(sum(np.count_nonzero(k) for k in kept.values()) / sum(k.size for k in kept.values()))


def balance(bench: Bench, seed: int, family: combinations.Family, name: str, change: Any, **options: Any) -> None:
    """Score arithmetic with weights chosen on validation rows."""
    path = f"seed{seed}/{name}"
    if (bench.out / f"{path}.json").exists():
        return
    base = read_record(bench.out / "base.json")["validation"]

    def shares(kept: combinations.Kept) -> list[float]:
        with bench.using(bench.masked(kept)):
            found = bench.losses("validation")
        return [(mean(base[d]) - mean(found[d])) / g for d, g in zip(bench.domains, family.gains, strict=True)]

    weights, kept, history = combinations.balanced(family, shares, change, **options)
    bench.measure(path, bench.masked(kept), density=density(kept), chosen=weights, history=history)


def controls(bench: Bench, seed: int) -> None:
    """The same steps on the weights; the merges that they allow."""
    trained = []
    for domain in bench.domains:
        trained.append(learn.weights(bench, seed, domain, [domain]))
        bench.measure(f"seed{seed}/{domain} weights", trained[-1])
    bench.measure(f"seed{seed}/average of the weights", average(trained))
    for scale in (0.5, 1.0):
        added = task_arithmetic(bench.originals, trained, scale)
        bench.measure(f"seed{seed}/task arithmetic of the weights {scale}", added)


def trained_together(bench: Bench, seed: int) -> None:
    """Upper baselines: one mask for the mixture, in the steps of one domain or of all; masks one after the other."""
    plan, everything, place = bench.plan, bench.domains, f"seed{seed}"
    for name, steps in (("joint, steps of one", plan.steps), ("joint, steps of all", plan.steps * len(everything))):
        found = learn.mask(bench, seed, name, everything, steps=steps, eval_every=max(10, steps // 6))
        bench.measure(
            f"{place}/{name}", bench.masked(combinations.bools(found)), best_step=found.info.training["best_step"]
        )
    order = list(itertools.permutations(everything))[seed % 6]
    start = bench.out / place / "masks" / f"{order[0]}.mask"
    for i, domain in enumerate(order[1:], 2):
        name = f"sequential {i}"
        found = learn.mask(bench, seed, name, [domain], start=str(start))
        start = bench.out / place / "masks" / f"{name}.mask"
    bench.measure(f"{place}/sequential", bench.masked(combinations.bools(found)), order=order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--domain", action="append", required=True, help="NAME=FILE.jsonl or NAME=stdlib")
    parser.add_argument("--seed", type=int, action="append", required=True)
    parser.add_argument("--parts", default="combine,weights,joint")
    parser.add_argument("--only", help="combinations to try, with ; between their names; all of them by default")
    parser.add_argument(
        "--weight-rates", type=lambda text: tuple(map(float, text.split(","))), default=Plan.weight_rates
    )
    for name, value in vars(Plan()).items():
        if not isinstance(value, tuple):
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args())
    plan = Plan(**{name: given[name] for name in vars(Plan()) if name in given})
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32).eval()
    rows = read_rows(dict(d.split("=", 1) for d in given["domain"]), tokenizer, plan)
    bench = Bench(plan, model, tokenizer, rows, given["out"])
    given["out"].mkdir(parents=True, exist_ok=True)
    facts = {"plan": vars(plan), "domains": bench.domains, "model": Path(given["model"]).name}
    (given["out"] / "study.json").write_text(json.dumps(facts) + "\n")
    for seed in given["seed"]:
        seed_of_masks(
            bench, seed, set(given["parts"].split(",")), set(given["only"].split(";")) if given["only"] else None
        )


if __name__ == "__main__":
    main()

"""Train masks and measure what predicts: `python -m research.interference.measure OUT --model DIR --seed 0 ...`.

For each domain: gradient and diagonal curvature of its validation loss at the untrained mask and at its own mask, one
backward pass a row. What is in OUT already is not done again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mftmerge.loss import padded, token_losses
from research.combining import combinations, learn
from research.combining.common import Bench, Plan, read_rows

Slopes = dict[str, torch.Tensor]  # "gradient/NAME" and "curvature/NAME" for each masked tensor


def differentiated(bench: Bench) -> dict[str, torch.nn.Parameter]:
    """The masked parameters, of which alone gradients are taken from now on."""
    for name, p in bench.model.named_parameters():
        p.requires_grad_(name in bench.originals)
    return {n: p for n, p in bench.model.named_parameters() if n in bench.originals}


def slope(bench: Bench, domain: str) -> Slopes:
    """Of the mean loss (nats a token) of a domain's validation rows, with the model as it is."""
    parameters = differentiated(bench)
    found = {f"{kind}/{n}": torch.zeros_like(p) for kind in ("gradient", "curvature") for n, p in parameters.items()}
    tokens = 0
    with bench.cache.use():
        for row in bench.rows[domain]["validation"]:
            ids, labels, attention = padded([row])
            losses, _ = token_losses(bench.model, ids, labels, attention_mask=attention)
            tokens += len(losses)
            losses.sum().backward()
            for n, p in parameters.items():
                assert p.grad is not None
                found[f"gradient/{n}"] += p.grad
                found[f"curvature/{n}"] += p.grad.square()  # rows as the samples of the empirical Fisher information
                p.grad = None
    return {n: (v / tokens).detach() for n, v in found.items()}


def measured(bench: Bench, seed: int, domain: str, where: str, kept: combinations.Kept) -> Slopes:
    """From the file if it is there."""
    path = bench.out / f"seed{seed}" / "slopes" / f"{domain} at {where}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with bench.using(bench.masked(kept)):
            save_file(slope(bench, domain), path)
        print(path.stem, flush=True)
    return load_file(path)


def options(doc: str | None) -> argparse.ArgumentParser:
    """What all programs of this study are told."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--domain", action="append", required=True, help="NAME=FILE.jsonl or NAME=stdlib")
    parser.add_argument("--seed", type=int, action="append", required=True)
    return parser


def open_bench(out: Path, model: str, domains: list[str]) -> Bench:
    """domains: as `--domain` takes them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    sources = dict(d.split("=", 1) for d in domains)

    logging.set_verbosity_error()
    plan, tokenizer = Plan(), AutoTokenizer.from_pretrained(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return Bench(plan, loaded, tokenizer, read_rows(sources, tokenizer, plan), out)


def family(bench: Bench, seed: int) -> combinations.Family:
    """The seed's masks, trained if they are not there; gains are not needed."""
    masks = [learn.mask(bench, seed, domain, [domain]) for domain in bench.domains]
    return combinations.Family(masks, [1.0] * len(masks), bench.plan.keep)


def main() -> None:
    given = options(__doc__).parse_args()
    bench = open_bench(given.out, given.model, given.domain)
    for seed in given.seed:
        masks = family(bench, seed)
        for domain, mask in zip(bench.domains, masks.masks, strict=True):
            measured(bench, seed, domain, "start", combinations.bools(masks.start))
            measured(bench, seed, domain, "own", combinations.bools(mask))


if __name__ == "__main__":
    main()

"""What the study of predictions measures: slopes, what the product predicts, and losses with one layer replaced.

Everything is kept in OUT/seedN, and what is there already is not done again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mftmerge.data import IGNORE
from mftmerge.evaluate import pairing, prediction
from mftmerge.files import replacing
from mftmerge.loss import padded, token_losses
from mftmerge.mask import Mask
from mftmerge.names import layer_of
from research.combining import combinations, learn
from research.combining.common import Bench, Plan, mean, read_record, read_rows

Losses = dict[str, dict[str, dict[str, float]]]  # model -> split -> domain -> nats a token
Slopes = dict[str, torch.Tensor]  # "gradient/NAME" and "curvature/NAME" for each masked tensor
# Those of which every layer is put into the own masks alone, and measured.
ROWS_BY_LAYER = 48  # of the test rows: a measurement for every layer of every combination
SOME = "some test rows"
BY_LAYER = ("union", "intersection", "score", "score elected at 0.93")


def open_bench(out: Path, model: str, domains: list[str]) -> Bench:
    """domains: NAME=FILE.jsonl or NAME=stdlib."""
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


def compared(masks: combinations.Family) -> dict[str, combinations.Kept]:
    """Every combination of which a loss can be predicted, by name; shares of weights are no mask."""
    made = combinations.untuned(masks).items()
    return {n: make() for n, make in made if "gain" not in n and n != "average of the masks"}


def slopes(bench: Bench, seed: int, domain: str, where: str, kept: combinations.Kept) -> Slopes:
    """Gradient and diagonal curvature of the mean loss (nats a token) of a domain's validation rows under a mask."""
    path = bench.out / f"seed{seed}" / "slopes" / f"{domain} at {where}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with bench.using(bench.masked(kept)):
            save_file(_slopes(bench, domain), path)
        print(seed, path.stem, flush=True)
    return load_file(path)


def _slopes(bench: Bench, domain: str) -> Slopes:
    kinds, tokens = ("gradient", "curvature"), 0
    found = {f"{kind}/{n}": torch.zeros_like(w) for kind in kinds for n, w in bench.originals.items()}
    with bench.cache.use(), prediction.differentiated(bench.model, set(bench.originals)) as parameters:
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


def outlook(bench: Bench, seed: int, masks: combinations.Family, kept: Mapping[str, combinations.Kept]) -> Any:
    """What the product predicts: domain -> "base" and "own" loss, combination -> share, and its change by layer."""
    path = bench.out / f"seed{seed}" / "outlook.json"
    if not path.exists():
        own = dict(zip(bench.domains, masks.masks, strict=True))
        rows = {d: bench.rows[d]["validation"] for d in own}
        proposals = [Mask.from_bools(one) for one in kept.values()]
        with bench.cache.use():
            found = prediction.predict(bench.model, own, rows, proposals)
        made = {
            domain: {
                "base": one.base,
                "own": one.own,
                "shares": dict(zip(kept, one.shares.tolist(), strict=True)),
                "layers": {name: one.layer_changes(i) for i, name in enumerate(kept)},
            }
            for domain, one in found.items()
        }
        _write(path, made)
        print(seed, "predicted", flush=True)
    return json.loads(path.read_text(encoding="utf-8"))


def losses(
    bench: Bench,
    seed: int,
    record: Mapping[str, Any],
    masks: combinations.Family,
    kept: Mapping[str, combinations.Kept],
) -> Losses:
    """Losses of the base, the untrained mask, the own masks ("DOMAIN mask") and the combinations on record.

    They are those of the record of the study of combinations for domains whose rows are the same; for others, whose
    masks are then other ones too, they are measured.
    """
    rows = {d: [sum(i != IGNORE for i in row["labels"][1:]) for row in bench.rows[d]["test"]] for d in bench.domains}
    same = [d for d in bench.domains if record["tokens"][d] == rows[d]]
    start, found = combinations.bools(masks.start), Losses()
    made = {"base": {n: np.ones_like(k) for n, k in start.items()}, "untrained mask": start}
    made |= {f"{d} mask": combinations.bools(m) for d, m in zip(bench.domains, masks.masks, strict=True)} | dict(kept)
    for name, given in made.items():
        known = record["records"].get(name if name in ("base", "untrained mask") else f"seed{seed}/{name}")
        if known is None:
            continue
        found[name] = {"validation": {d: known["validation"][d] for d in same}}
        found[name]["test"] = {d: sum(known["test"][d]) / sum(rows[d]) for d in same}
        if others := [d for d in bench.domains if d not in same]:
            place = f"seed{seed}/losses/{name}"
            bench.measure(place, bench.masked(given), domains=others)
            here = read_record(bench.out / f"{place}.json")
            for split, domains in found[name].items():
                domains |= {d: mean(here[split][d]) for d in others}
    return found


def replaced(
    bench: Bench, seed: int, masks: combinations.Family, kept: Mapping[str, combinations.Kept]
) -> dict[str, Any]:
    """combination -> domain -> layer -> change of the loss (nats a token) on test rows, and its standard error, where
    that layer of the own mask, and no other, is the combination's."""
    out: dict[str, Any] = {}
    for domain, mask in zip(bench.domains, masks.masks, strict=True):
        own = combinations.bools(mask)
        bench.rows[domain][SOME] = bench.rows[domain]["test"][:ROWS_BY_LAYER]

        def losses(place: str, given: combinations.Kept, domain: str = domain) -> Any:
            place = f"seed{seed}/by layer/{domain} {place}"
            bench.measure(place, bench.masked(given), splits=[SOME], domains=[domain])
            return np.array(read_record(bench.out / f"{place}.json")[SOME][domain], np.float64)

        before = losses("own", own)
        for name in BY_LAYER:
            for layer in sorted({layer_of(n) for n in own}, key=str):
                mixed = {n: kept[name][n] if layer_of(n) == layer else k for n, k in own.items()}
                change = pairing.paired(losses(f"{name} {layer}", mixed), before)
                found = {"measured": change.mean, "error": change.standard_error}
                out.setdefault(name, {}).setdefault(domain, {})[str(layer)] = found
    return out


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")

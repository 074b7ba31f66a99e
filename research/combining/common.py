"""What the study shares: rows by domain and split, the loaded model, weights in and out of it, losses on record."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mftmerge import data
from mftmerge.files import replacing
from mftmerge.loss import row_losses
from mftmerge.prefix import PrefixCache
from mftmerge.quickstart.domains import python_splits
from mftmerge.train.targets import find

HELD_OUT = 512  # rows at the end of a file: never trained on. The 512 before them validate.
SPLITS = ("train", "validation", "test")
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """The study's settings, the same for every base model.

    pool: rows of a domain that training may draw from; rows: of these, what one seed trains on (another draw and
    another order for every seed). steps and batch: one pass over `rows`. max_length: in tokens; longer rows are left
    out. lr: of the scores; weight_rates: what the weight controls choose from, by validation.
    """

    layers: str = "26-29"
    keep: float = 0.9
    pool: int = 480
    rows: int = 320
    validation: int = 48
    test: int = 96
    steps: int = 40
    batch: int = 8
    max_length: int = 192
    lr: float = 6.25e-4
    weight_rates: tuple[float, ...] = (3e-4, 1e-3)

    def settings(self, seed: int, **more: Any) -> dict[str, Any]:
        """Settings of `train_mask`."""
        given = {"keep": self.keep, "layers": self.layers, "steps": self.steps, "batch_size": self.batch, "lr": self.lr}
        return given | {"max_length": self.max_length, "seed": seed, "scores": True, "eval_every": 10} | more


@dataclass
class Bench:
    """A base model in memory with every row of the study, and the directory that holds what was found.

    rows: domain -> split -> tokenised rows.
    """

    plan: Plan
    model: Any
    tokenizer: Any
    rows: dict[str, dict[str, list[Any]]]
    out: Path
    cache: PrefixCache = field(init=False)
    originals: Weights = field(init=False)

    def __post_init__(self) -> None:
        targets = find(self.model, self.plan.layers)
        self.originals = {t.name: t.parameter.detach().clone() for t in targets}
        self.cache = PrefixCache(self.model, targets[0].layer)
        for splits in self.rows.values():
            for rows in splits.values():
                self.cache.add(rows)

    @property
    def domains(self) -> list[str]:
        return list(self.rows)

    def training_rows(self, domain: str, seed: int) -> list[Any]:
        """The rows that a seed trains on."""
        return random.Random(f"{domain} {seed}").sample(self.rows[domain]["train"], self.plan.rows)

    @contextmanager
    def using(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """The model with other values in its masked parameters, and its own again afterwards."""
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in weights.items():
                parameters[name].copy_(value)
        try:
            yield  # outside of `no_grad`: gradients may be asked for in between
        finally:
            with torch.no_grad():
                for name in weights:
                    parameters[name].copy_(self.originals[name])

    def masked(self, kept: Mapping[str, Any], on: Mapping[str, torch.Tensor] | None = None) -> Weights:
        """Weights times a mask (boolean, or shares between 0 and 1) of the same names and shapes."""
        values = on or self.originals
        return {n: values[n] * torch.from_numpy(np.asarray(kept[n], np.float32)) for n in values}

    def losses(self, split: str, domains: Sequence[str] | None = None) -> dict[str, Any]:
        """domain -> (rows, 2) losses of the model as it is."""
        with self.cache.use():
            return {domain: row_losses(self.model, self.rows[domain][split]) for domain in domains or self.rows}

    def measure(
        self,
        place: str,
        weights: Mapping[str, torch.Tensor],
        *,
        splits: Sequence[str] = SPLITS[1:],
        domains: Sequence[str] | None = None,
        **facts: Any,
    ) -> None:
        """Losses on validation and test rows under `weights`, on record in `place`.json unless they are there."""
        path = self.out / f"{place}.json"
        if path.exists():
            return
        with self.using(weights):
            found = {split: self.losses(split, domains) for split in splits}
        record = {split: {d: [[round(s, 5), int(n)] for s, n in v] for d, v in f.items()} for split, f in found.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({"facts": facts, **record}) + "\n", encoding="utf-8")
        print(
            place, {d: round(float(v[:, 0].sum() / v[:, 1].sum()), 4) for d, v in found[splits[-1]].items()}, flush=True
        )


def average(trained: Sequence[Weights]) -> Weights:
    """The mean of several models' weights."""
    return {n: torch.stack([t[n] for t in trained]).mean(0) for n in trained[0]}


def task_arithmetic(base: Weights, trained: Sequence[Weights], scale: float) -> Weights:
    """The base plus `scale` times the sum of what each model changed."""
    return {n: base[n] + scale * sum(t[n] - base[n] for t in trained) for n in base}


def read_rows(sources: Mapping[str, str], tokenizer: Any, plan: Plan) -> dict[str, dict[str, list[Any]]]:
    """domain -> split -> tokenised rows of at most `max_length` tokens. sources: files, or "stdlib" (functions)."""
    found = {}
    sizes = {"train": plan.pool, "validation": plan.validation, "test": plan.test}
    for domain, source in sources.items():
        if source == "stdlib":
            raw = python_splits({"train": 1000, "validation": 150, "test": 250}, seed=0)
        else:
            rows = data.load_rows(source)
            raw = {
                "train": rows[: -2 * HELD_OUT],
                "validation": rows[-2 * HELD_OUT : -HELD_OUT],
                "test": rows[-HELD_OUT:],
            }
        found[domain] = {
            s: _short(raw[s][: 4 * n], tokenizer, plan.max_length, n, f"{domain} {s}") for s, n in sizes.items()
        }
    return found


def _short(rows: list[Any], tokenizer: Any, longest: int, count: int, what: str) -> list[Any]:
    tokens = [t for t in data.tokenize(rows, tokenizer, longest + 1) if len(t["input_ids"]) <= longest]
    if len(tokens) < count:
        raise SystemExit(f"{what}: {len(tokens)} rows of at most {longest} tokens, {count} are needed")
    return tokens[:count]


def read_record(path: Path) -> dict[str, Any]:
    """A record of `Bench.measure` with losses as arrays."""
    record = json.loads(path.read_text(encoding="utf-8"))
    for split in record.keys() & set(SPLITS):
        record[split] = {d: np.array(v, np.float64) for d, v in record[split].items()}
    return record


def mean(values: Any) -> float:
    return float(values[:, 0].sum() / values[:, 1].sum())

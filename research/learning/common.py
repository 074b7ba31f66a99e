"""What the study of learnt merges shares: rows, the model in memory, lower layers computed once, and the record."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mftmerge import data
from mftmerge.errors import BadInput
from mftmerge.files import replacing
from mftmerge.loss import row_losses
from mftmerge.prefix import PrefixCache
from mftmerge.quickstart.domains import python_splits
from mftmerge.train.targets import find
from research.combining.common import HELD_OUT, Weights, mean

Tokens = dict[str, Any]
OTHER = "other"  # the fourth domain, which no expert saw
CLAIMED = {"math": "gsm8k", "sql": "wikisql", "python": "python"}  # our domains -> those of research/claim
PACKAGES = (
    *("accelerate", "datasets", "huggingface-hub", "mergekit", "numpy", "peft", "pydantic", "rich", "tokenizers"),
    *("torch", "transformers", "trl", "typer"),
)


@dataclass(frozen=True)
class Plan:
    """The study's settings.

    pool: training rows of a domain; a seed draws `expert_rows` of them for its experts and learns merges from others.
    validation: rows that choose scales, densities, rates and steps of everything that is chosen; test: rows that
    nothing was chosen on; the `skipped` test rows before them are those of earlier studies. max_length: in tokens;
    longer rows are left out. expert_steps of `batch` rows at `expert_rate` make an expert.
    """

    layers: str = "26-29"  # "": all tensors
    pool: int = 480
    expert_rows: int = 140
    expert_steps: int = 34
    batch: int = 8
    expert_rate: float = 1e-3
    validation: int = 24
    skipped: int = 96
    test: int = 96
    other: int = 48
    max_length: int = 192


@dataclass(frozen=True)
class Item:
    """A row as its file has it, and its tokens."""

    row: dict[str, Any]
    tokens: Tokens


class Cells:
    """The record: a file of JSON lines, one a measured cell. A cell that is there is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, dict[str, dict[str, Any]]()
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            self.found = {cell["cell"]: cell for cell in map(json.loads, lines)}

    def __contains__(self, name: str) -> bool:
        return name in self.found

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self.found[name]

    def add(self, name: str, **record: Any) -> None:
        """Put a cell on record; the file appears whole, so that a kill takes no other with it."""
        self.found[name] = {"cell": name, **record}
        whole = "".join(json.dumps(cell) + "\n" for cell in self.found.values())
        with replacing(self.path) as temporary:
            temporary.write_text(whole, encoding="utf-8")


class States:
    """Hidden states below the learnt layers, in files: a row is computed once in the whole study."""

    used = 0  # no budget: the directory may grow

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def _file(self, key: bytes) -> Path:
        return self.directory / f"{hashlib.sha256(key).hexdigest()[:24]}.npy"

    def get(self, key: bytes) -> Tensor | None:
        path = self._file(key)
        return torch.from_numpy(np.load(path)) if path.exists() else None

    def put(self, key: bytes, states: Tensor) -> None:
        with replacing(self._file(key)) as temporary, temporary.open("wb") as file:
            np.save(file, states.contiguous().numpy())


@dataclass
class Bench:
    """The base in memory, every row of the study, and the directory that holds experts, merges and states.

    rows: domain -> split -> items. originals: the tensors in which experts differ from the base.
    """

    plan: Plan
    model: Any
    tokenizer: Any
    rows: dict[str, dict[str, list[Item]]]
    lab: Path
    source: str
    cells: Cells
    cache: PrefixCache = field(init=False)
    originals: Weights = field(init=False)

    def __post_init__(self) -> None:
        parameters = dict(self.model.named_parameters())
        targets = find(self.model, self.plan.layers) if self.plan.layers else []
        self.originals = {n: parameters[n].detach().clone() for n in [t.name for t in targets] or parameters}
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in self.originals)
        self.cache = self.new_cache(self.model, targets[0].layer if targets else 0)
        for splits in self.rows.values():
            for items in splits.values():
                self.cache.add([i.tokens for i in items])

    def as_set(self, model: Any, first_layer: int, place: str) -> PrefixCache | None:
        """Takes the place of `PrefixCache.as_set` in the product: the study's states, whatever the setting."""
        return self.new_cache(model, first_layer) if first_layer else None

    def new_cache(self, model: Any, first_layer: int) -> PrefixCache:
        """A cache over the study's states."""
        cache = PrefixCache(model, first_layer)
        cache._store = States(self.lab / "states")  # type: ignore[assignment]
        return cache

    @torch.no_grad()
    def warm(self, rows: Sequence[Tokens]) -> None:
        """Compute the rows' states now, so that nobody's seconds hold the lower layers."""
        if self.cache.first_layer:
            for row in rows:
                self.cache._row(row["input_ids"])

    @property
    def domains(self) -> list[str]:
        return [d for d in self.rows if d != OTHER]

    def split(self, domain: str, name: str) -> list[Tokens]:
        return [i.tokens for i in self.rows[domain][name]]

    def expert_items(self, domain: str, seed: int) -> list[Item]:
        """What a seed's expert was trained on."""
        return random.Random(f"{domain} {seed}").sample(self.rows[domain]["train"], self.plan.expert_rows)

    def learning_items(self, domain: str, seed: int, count: int) -> list[Item]:
        """Rows for learning a merge, which the expert did not see; the first of a longer list for a larger count."""
        seen = {id(i) for i in self.expert_items(domain, seed)}
        fresh = [i for i in self.rows[domain]["train"] if id(i) not in seen]
        random.Random(f"f{domain}{seed}").shuffle(fresh)
        if len(fresh) < count:
            raise SystemExit(f"{domain}: {len(fresh)} rows are left to learn from, {count} are needed")
        return fresh[:count]

    @contextmanager
    def using(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The model with other values in its learnt tensors, and its own again afterwards."""
        self.put(weights)
        try:
            yield
        finally:
            self.put(self.originals)

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        for name, value in weights.items():
            parameters[name].copy_(value)

    def losses(self, domain: str, split: str) -> Any:
        """(rows, 2) losses of the model as it is."""
        with self.cache.use():
            return row_losses(self.model, self.split(domain, split))

    def measure(
        self, name: str, weights: Mapping[str, Tensor] | None = None, domains: Sequence[str] = (), **facts: Any
    ) -> None:
        """Test losses of all domains (the fourth too), or some, as a cell."""
        with self.using(weights or {}):
            found = {d: self.losses(d, "test") for d in domains or self.rows}
        test = {d: [round(float(s), 3) for s in v[:, 0]] for d, v in found.items()}
        self.cells.add(name, facts=facts, test=test)
        if "tokens" not in self.cells:
            self.cells.add("tokens", **{d: [int(n) for n in v[:, 1]] for d, v in found.items()})
        print(name, {d: round(mean(v), 4) for d, v in found.items()}, facts, flush=True)


# -- rows -------------------------------------------------------------------------------------------------------------


def read_rows(sources: Mapping[str, str], tokenizer: Any, plan: Plan) -> dict[str, dict[str, list[Item]]]:
    """domain -> split -> items of at most `max_length` tokens. sources: files, or "stdlib" (Python functions)."""
    found: dict[str, dict[str, list[Item]]] = {}
    sizes = {"train": plan.pool, "validation": plan.validation, "test": plan.skipped + plan.test}
    for domain, source in sources.items():
        if source == "stdlib":
            raw: dict[str, Any] = dict(python_splits({"train": 1000, "validation": 150, "test": 250}, seed=0))
        else:
            rows = data.load_rows(source)
            raw = {"test": rows[-HELD_OUT:], "validation": rows[-2 * HELD_OUT : -HELD_OUT]}
            raw["train"] = rows[: -2 * HELD_OUT]
        found[domain] = {s: _short(raw[s], tokenizer, plan.max_length, n, f"{domain} {s}") for s, n in sizes.items()}
        found[domain]["test"] = found[domain]["test"][plan.skipped :]
    other = _short(list(documentation()), tokenizer, plan.max_length, plan.other, OTHER)
    return found | {OTHER: {"test": other}}


def claimed_rows(folder: Path, tokenizer: Any, plan: Plan) -> dict[str, dict[str, list[Item]]]:
    """As `read_rows`, for the experts of research/claim: none of these rows trained them.

    A merge learns from the rows that validated the experts; the rest are from those that tested them.
    """
    from research.claim.common import DOMAINS
    from research.claim.common import read_rows as read_claimed

    found: dict[str, dict[str, list[Item]]] = {}
    for domain, name in CLAIMED.items():
        splits = read_claimed(DOMAINS[name], folder, tokenizer)
        validation, test = ([Item(row, dict(tokens)) for row, tokens in splits[s]] for s in ("validation", "test"))
        parts = {"test": test[: plan.test], "validation": test[plan.test : plan.test + plan.validation]}
        found[domain] = {"train": validation, **parts}
    return found | {OTHER: {"test": _short(list(documentation()), tokenizer, plan.max_length, plan.other, OTHER)}}


def _short(rows: Sequence[Any], tokenizer: Any, longest: int, count: int, what: str) -> list[Item]:
    found: list[Item] = []
    for row in rows:
        try:
            tokens = data.tokenize([row], tokenizer, longest + 1)[0]
        except BadInput:
            continue  # no answer within so many tokens
        if len(tokens["input_ids"]) <= longest:
            found.append(Item(row, tokens))
        if len(found) == count:
            return found
    raise SystemExit(f"{what}: {len(found)} rows of at most {longest} tokens, {count} are needed")


def documentation() -> Iterator[dict[str, str]]:
    """Paragraphs of prose from the descriptions that installed packages carry, a few of each package."""
    for package in PACKAGES:
        body = str(importlib.metadata.distribution(package).metadata.json.get("description", ""))
        plain = [p.strip() for p in body.split("\n\n")]
        prose = [p for p in plain if len(p) > 200 and p[0].isalpha() and p.count(" ") > len(p) / 9]
        for text in prose[:8]:
            yield {"text": text[:400]}


def write_rows(path: Path, items: Sequence[Item]) -> str:
    """A JSONL file of rows, for the product to read; gives its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(i.row) + "\n" for i in items), encoding="utf-8")
    return str(path)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every program of the study is given: where its lab and the base are, and the rows of each domain.

    `domain` of what it parses is a list of pairs: name, file.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("lab", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--domain", action="append", default=[], type=_named, help="NAME=FILE.jsonl or NAME=stdlib")
    return parser


def _named(text: str) -> tuple[str, str]:
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE")
    return name, file


def opened(lab: Path, source: str, read: Callable[[Any, Plan], dict[str, dict[str, list[Item]]]], plan: Plan) -> Bench:
    """The bench in `lab`, with the model that lies in `source`. read: gives the rows for a tokenizer and the plan."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    model.config.use_cache = False
    lab.mkdir(parents=True, exist_ok=True)
    bench = Bench(plan, model, tokenizer, read(tokenizer, plan), lab, source, Cells(lab / "cells.jsonl"))
    if "study" not in bench.cells:
        bench.cells.add("study", plan=vars(plan), domains=bench.domains, model=Path(source).name)
    return bench

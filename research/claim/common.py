"""What the study shares: rows by domain and split, the model, passes that compute what all rows share once."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, logging

from mftmerge import data
from mftmerge.evaluate import decoding
from mftmerge.files import replacing
from mftmerge.loss import padded, token_losses
from mftmerge.quickstart.domains import python_splits

Row = dict[str, Any]
Tokens = dict[str, Any]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Domain:
    """How one domain is fine-tuned. rows: for training, and as many "new" ones that the base does not see, where there
    are so many; longer rows than `longest` tokens are left out.

    exact: the rule that marks answers; executed: whether queries are run as well, and marked by what they select.
    """

    name: str
    steps: int
    batch: int
    longest: int
    new_tokens: int
    exact: str
    rows: int
    validation: int
    test: int
    executed: bool = False


DOMAINS = {
    "wikisql": Domain("wikisql", 80, 16, 96, 48, "text", rows=1200, validation=300, test=1500, executed=True),
    "gsm8k": Domain("gsm8k", 48, 8, 176, 160, "number", rows=1000, validation=200, test=600),
    "python": Domain("python", 48, 8, 128, 96, "text", rows=1000, validation=150, test=180),
}


def load(path: str | Path) -> tuple[Any, Any]:
    """The model in float32 and its tokenizer."""
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path)


def read_rows(
    domain: Domain, folder: Path, tokenizer: Any, splits: Sequence[str] = SPLITS
) -> dict[str, list[tuple[Row, Tokens]]]:
    """split -> (row, its tokens) of at most `longest` tokens. No question stands in two splits.

    splits: those wanted, the last ones of SPLITS: a split leaves out the questions of those that come after it.
    """
    sizes = {"train": 2 * domain.rows, "validation": domain.validation, "test": domain.test}
    if domain.name == "python":
        raw = python_splits({"train": 2300, "validation": 400, "test": 550}, seed=0)
    else:
        rows = data.load_rows(str(folder / domain.name / "train.jsonl"))
        random.Random(f"claim {domain.name}").shuffle(rows)
        raw = {"test": rows[-2800:], "validation": rows[-3800:-2800], "train": rows[:-3800]}
    seen: set[str] = set()
    found: dict[str, list[tuple[Row, Tokens]]] = {}
    for split in reversed(splits):
        found[split] = []
        for row in raw[split]:
            if len(found[split]) == sizes[split]:
                break
            if row["prompt"] in seen:
                continue
            seen.add(row["prompt"])
            tokens = data.tokenize([row], tokenizer, 4096)[0]
            if len(tokens["input_ids"]) <= domain.longest:
                found[split].append((row, tokens))
    if "train" in found:
        found["new"] = found["train"][domain.rows :]
        found["train"] = found["train"][: domain.rows]
    return found


# -- passes -----------------------------------------------------------------------------------------------------------


def shared_start(rows: Sequence[Tokens]) -> list[int]:
    """The ids that all rows begin with (the chat template's and the instruction's), before any label."""
    common = decoding.shared_start([r["input_ids"] for r in rows])
    labels = min(next(i for i, label in enumerate(r["labels"]) if label != data.IGNORE) for r in rows)
    return common[: max(0, min(len(common), labels) - 1)]


def losses(model: Any, rows: Sequence[Tokens], start: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`loss.token_losses` of a batch; what its rows share runs once, with gradients, and not once a row."""
    rest = [{k: v[len(start) :] for k, v in r.items()} for r in rows]
    ids, labels, _ = padded(rest)
    if not start:
        return token_losses(model, ids, labels)
    cache = DynamicCache(config=model.config)
    model.model(input_ids=torch.tensor([list(start)]), past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(rows))
    return token_losses(model, ids, labels, past_key_values=cache)


@torch.no_grad()
def row_losses(model: Any, rows: Sequence[Tokens], start: Sequence[int], batch: int = 32) -> Tensor:
    """Sum of each row's token losses and how many there are, (rows, 2)."""
    out = torch.zeros(len(rows), 2, dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    for first in range(0, len(rows), batch):
        places = torch.tensor(order[first : first + batch])
        found, wanted = losses(model, [rows[i] for i in places.tolist()], start)
        at = places[wanted.nonzero()[:, 0]]
        out[:, 0].index_add_(0, at, found.double())
        out[:, 1].index_add_(0, at, torch.ones_like(found, dtype=torch.float64))
    return out


def batches(rows: Sequence[Tokens], size: int, seed: str) -> Iterator[list[Tokens]]:
    """Endless batches of rows of like length: every epoch in another order, that `seed` gives again."""
    for epoch in range(10_000):
        draw = random.Random(f"{seed} {epoch}")
        order = draw.sample(range(len(rows)), len(rows))
        groups = []
        for first in range(0, len(order), size * 8):
            pool = sorted(order[first : first + size * 8], key=lambda i: len(rows[i]["input_ids"]))
            groups += [pool[i : i + size] for i in range(0, len(pool), size)]
        draw.shuffle(groups)
        for group in groups:
            if len(group) == size:
                yield [rows[i] for i in group]


# -- what was found ---------------------------------------------------------------------------------------------------


def write_json(path: Path, record: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")

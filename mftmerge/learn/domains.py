"""The rows of each expert's domain, and what they ask of the merge: the expert's own distribution, or the answers.

On the prompts they ask for the base's distribution: nothing is to be learnt there, and what a merge changes of it, it
changes elsewhere too (docs/learnt-merges.md).

Agreement with an expert is the Kullback-Leibler divergence of the merge's next-token distribution from the expert's, at
the labelled tokens. Of the expert's distribution the most likely tokens are told apart, the rest counts as one event: a
lower bound of the whole divergence, and with the vocabulary's size the whole of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mftmerge import rowshapes
from mftmerge.data import IGNORE, Tokens
from mftmerge.errors import BadInput
from mftmerge.evaluate.generation import generate, questions
from mftmerge.learn.settings import LearnSettings
from mftmerge.loss import PIECE, Losses, evaluating, labelled_logits, length_batches, losses_of, padded
from mftmerge.recipe.locate import local
from mftmerge.recipe.schema import Learn
from mftmerge.rowfiles import raw_rows
from mftmerge.train.inputs import held_out, is_tokenised, tokens_of

SMALLEST = 2 * torch.finfo(torch.float32).eps  # of what is left of a distribution: its logarithm must be finite
DIVERGENCE, ANSWERS = 0, 1  # columns of `measure`
BATCH_TOKENS = 4096  # padded tokens of a forward pass without gradients


@dataclass
class Told:
    """What a model says at the labelled tokens of one row: log-probabilities (tokens, top) of its most likely tokens
    (tokens, top), float32 and int32."""

    likely: Tensor
    logs: Tensor


@dataclass
class Domain:
    """An expert's rows. name: the expert's, for messages. told, told_valid: by row; empty where answers are learnt.

    prompts: what the base says of each training row's prompt; empty where nothing holds the merge to it.
    measured: what `measure` says of the validation rows, under "base" and "expert" before anything is merged. scales:
    what the domain's loss is the sum of, columns of `measure`, each with what it is divided by; so that the base has
    about 1 more than the expert.
    """

    name: str
    train: list[Tokens]
    valid: list[Tokens]
    told: list[Told] = field(default_factory=list)
    told_valid: list[Told] = field(default_factory=list)
    prompts: list[Told] = field(default_factory=list)
    measured: dict[str, Losses] = field(default_factory=dict)
    scales: dict[int, float] = field(default_factory=dict)


def read_domain(
    name: str, learn: Learn, given: object, folder: Path, tokenizer: PreTrainedTokenizerBase, settings: LearnSettings
) -> Domain:
    """The rows for one expert, tokenised, and those held out of them.

    given: rows in the place of those that the recipe names (anything that `load_rows` takes, or tokenised).
    Raises BadInput where there are too few, or fewer than were asked for.
    """
    source = given if given is not None else _located(learn.data, folder)
    rows = _tokens(source, tokenizer, settings)
    if learn.rows is not None:
        if len(rows) < learn.rows:
            raise BadInput(f"{name}: rows: {learn.rows} are asked for, its data has {len(rows)}")
        rows = held_out(rows, learn.rows, settings.seed)[1]
    if len(rows) < 2:
        raise BadInput(f"{name}: one row is too few to learn a mask from; give at least two")
    if learn.eval_data is not None:
        valid = _tokens(_located(learn.eval_data, folder), tokenizer, settings)[: settings.eval_rows]
        return Domain(name, rows, valid)
    # Two rows say little, but more than none; of very few rows none can be spared.
    held = 0 if not settings.eval_share or len(rows) < 6 else max(2, int(len(rows) * settings.eval_share))
    return Domain(name, *held_out(rows, min(held, settings.eval_rows), settings.seed))


def _located(data: str | tuple[str, ...], folder: Path) -> list[str]:
    """Paths of row files, which stand beside the recipe or in the current directory; other names as they are."""
    found = []
    for text in [data] if isinstance(data, str) else data:
        plain, sign, part = text.partition("[") if text.endswith("]") else (text, "", "")
        path = local(plain, folder)
        found.append(f"{path}{sign}{part}" if path else text)
    return found


def _tokens(source: object, tokenizer: PreTrainedTokenizerBase, settings: LearnSettings) -> list[Tokens]:
    """Tokenised rows; of a row that ends with its question the prompt alone, without labels."""
    rows = [] if is_tokenised(source) else [row for _, row in raw_rows(source)]
    asked = [isinstance(row, Mapping) and is_question(row) for row in rows]
    if not any(asked):
        return tokens_of(source, tokenizer, settings)
    if settings.asks_answers:
        raise BadInput("a row has no answer to learn from; give answers, or --teacher expert")
    rest = [row for row, alone in zip(rows, asked, strict=True) if not alone]
    answered = tokens_of(rest, tokenizer, settings) if rest else []
    found = questions([_with_answer(row) for row, alone in zip(rows, asked, strict=True) if alone], tokenizer)
    return [*answered, *({"input_ids": q.prompt, "labels": []} for q in found if len(q.prompt) < settings.max_length)]


def is_question(row: Mapping[str, object]) -> bool:
    """Whether a row has a prompt and no answer."""
    if isinstance(turns := row.get("messages"), list) and turns and isinstance(turns[-1], Mapping):
        return turns[-1].get("role") == "user"
    return "prompt" in row and not {*rowshapes.ANSWERS, "messages", "text", "chosen"} & row.keys()


def _with_answer(row: Mapping[str, Any]) -> dict[str, object]:
    """The row with something in the place of its answer, which only the expert will give."""
    said = {"role": "assistant", "content": "-"}
    if "messages" in row:
        return {**row, "messages": [*row["messages"], said]}
    return {**row, "completion": "-" if isinstance(row["prompt"], str) else [said]}


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Tokens], settings: LearnSettings
) -> None:
    """Let the model, which holds an expert's weights, write the answers of rows that have none, in place. Greedy."""
    bare = [i for i, row in enumerate(rows) if not row["labels"]]
    prompts = [rows[i]["input_ids"] for i in bare]
    length = settings.answer_tokens
    answers = generate(model, tokenizer, prompts, max_new_tokens=length, option="--answer-tokens")
    for i, said in zip(bare, answers, strict=True):
        ids = [*rows[i]["input_ids"], *said]
        labels = [*[IGNORE] * len(rows[i]["input_ids"]), *said]
        rows[i] = {"input_ids": ids[: settings.max_length], "labels": labels[: settings.max_length]}


# -- what an expert says ----------------------------------------------------------------------------------------------


@torch.no_grad()
def listen(model: PreTrainedModel, rows: Sequence[Tokens], top: int) -> list[Told]:
    """What the model, which holds an expert's or the base's weights, says of each row.

    One row at a time, so that it is the same whatever other rows there are.
    """
    found = []
    with evaluating(model):
        for row in rows:
            if all(label == IGNORE for label in row["labels"][1:]):
                found.append(Told(torch.empty(0, dtype=torch.int32), torch.empty(0)))
                continue
            ids, labels, attention = padded([row], model.device)
            logits, _, _ = labelled_logits(model, ids, labels, attention_mask=attention)
            logs = torch.log_softmax(logits.float(), -1)
            best = logs.topk(min(top, logs.shape[-1]), dim=-1)
            found.append(Told(best.indices.int().cpu(), best.values.cpu()))
    return found


def prompt_of(row: Tokens) -> Tokens:
    """The row with its prompt labelled, all tokens before the first label, in the place of its answer."""
    labels = row["labels"]
    first = next((i for i, label in enumerate(labels) if label != IGNORE), len(labels))
    return {"input_ids": row["input_ids"], "labels": [*row["input_ids"][:first], *[IGNORE] * (len(labels) - first)]}


def answers_and_prompts(
    model: PreTrainedModel, ids: Tensor, labels: Tensor, prompts: Tensor | None, **more: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of one pass where labelled tokens are to be predicted, these tokens, and logits at prompts' tokens.

    labels, prompts: (batch, length), of rows and of what `prompt_of` makes of them; without prompts there are no logits
    of theirs. more: what `labelled_logits` takes besides.
    """
    asked = labels if prompts is None else torch.where(labels == IGNORE, prompts, labels)
    logits, targets, wanted = labelled_logits(model, ids, asked, **more)
    answered = pad(labels[:, 1:], (0, 1), value=IGNORE)[wanted] != IGNORE
    return logits[answered], targets[answered], logits[~answered]


def disagreement(logits: Tensor, likely: Tensor, logs: Tensor) -> Tensor:
    """Divergence from what an expert told, at each position, nats: float32 (positions,).

    logits: (positions, vocabulary); likely, logs: (positions, top), as in `Told`.
    """
    found = []
    for z, index, expert in zip(logits.split(PIECE), likely.split(PIECE), logs.split(PIECE), strict=True):
        z = z.float()
        own = z.gather(1, index.long()) - z.logsumexp(1, keepdim=True)  # (positions, top) log-probabilities
        share = expert.exp()
        total = (share * (expert - own)).sum(1)
        if index.shape[1] < z.shape[1]:
            rest, left = (1 - share.sum(1)).clamp(min=0), (1 - own.exp().sum(1)).clamp(min=SMALLEST)
            total = total + rest * (rest.clamp(min=SMALLEST).log() - left.log())
        found.append(total)
    return torch.cat(found)


@torch.no_grad()
def measure(model: PreTrainedModel, rows: Sequence[Tokens], told: Sequence[Told]) -> Losses:
    """Of each row float64 (rows, 3): its divergence from what was told (0 where nothing was), the loss of its labelled
    tokens, both sums in nats, and the number of these tokens."""
    out = np.zeros((len(rows), 3))
    lengths = [len(r["input_ids"]) for r in rows]
    with evaluating(model):
        for batch in length_batches(lengths, BATCH_TOKENS):
            ids, labels, attention = padded([rows[i] for i in batch], model.device)
            logits, targets, wanted = labelled_logits(model, ids, labels, attention_mask=attention)
            columns = [losses_of(logits, targets)]
            columns.insert(0, disagreement(logits, *stacked(told, batch, model.device)) if told else 0 * columns[0])
            place = torch.as_tensor(batch, device=ids.device)[wanted.nonzero()[:, 0]].cpu().numpy()
            for i, column in enumerate(columns):
                out[:, i] += np.bincount(place, column.double().cpu().numpy(), len(rows))
            out[:, 2] += np.bincount(place, minlength=len(rows))
    return out


def stacked(told: Sequence[Told], batch: Sequence[int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """What was told of some rows, one after another: (tokens, top) tokens and log-probabilities.

    Rows of which nothing was told, shape (0,), add nothing.
    """
    return torch.cat([told[i].likely for i in batch]).to(device), torch.cat([told[i].logs for i in batch]).to(device)


# -- in a batch -------------------------------------------------------------------------------------------------------


class Rounds(Sequence[tuple[int, ...]]):
    """What a step takes: one row of each domain. As many as the largest domain has; smaller ones begin again."""

    def __init__(self, domains: Sequence[Domain]) -> None:
        self.sizes = [len(d.train) for d in domains]

    def __len__(self) -> int:
        return max(self.sizes)

    def __getitem__(self, number: Any) -> Any:
        if number >= len(self):
            raise IndexError(number)
        return tuple(number % size for size in self.sizes)


def batch_of(domains: Sequence[Domain], rounds: Sequence[tuple[int, ...]], fill: int) -> list[dict[str, Tensor]]:
    """For each domain, its rows of these rounds: input_ids and labels (rows, length), and likely and logs if told.

    Where the merge is held to the base also its base_likely and base_logs, and the labels of the prompts.
    """
    found = []
    for number, domain in enumerate(domains):
        chosen = [r[number] for r in rounds]
        ids, labels, _ = padded([domain.train[i] for i in chosen], fill=fill)
        batch = {"input_ids": ids, "labels": labels}
        if domain.told:
            batch["likely"], batch["logs"] = stacked(domain.told, chosen)
        if domain.prompts:
            batch["prompts"] = padded([prompt_of(domain.train[i]) for i in chosen], fill=fill)[1]
            batch["base_likely"], batch["base_logs"] = stacked(domain.prompts, chosen)
        found.append(batch)
    return found

"""Answers that a model writes (greedy, in batches), and how they are marked: exact match, or tests that run."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np
import torch

from mftmerge.data import Row
from mftmerge.errors import BadInput
from mftmerge.evaluate import sandbox
from mftmerge.evaluate.pairing import Values
from mftmerge.loss import length_batches

EXACT, PASS_AT_1 = "exact", "pass@1"
FENCE = re.compile(r"```(?:[Pp]ython3?|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.S)


@dataclass(frozen=True)
class Question:
    """What the model reads (token ids), what the row's own answer is, and tests for it if the row carries them."""

    prompt: list[int]
    reference: str
    tests: str | None = None


@dataclass(frozen=True)
class Marks:
    """Metric -> array (rows, 2) of 0 or 1 and the weight 1; the answers themselves, by row; remarks on the marking."""

    metrics: dict[str, Values]
    answers: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def questions(rows: Sequence[Row], tokenizer: Any) -> list[Question]:
    """The prompt before each row's last answer, as the chat template (or plain joining) gives it in training.

    Raises BadInput for rows of plain `text`, which have no question, and rows that do not end with the assistant.
    """
    return [_question(row, tokenizer, f"row {number}") for number, row in enumerate(rows, 1)]


def _question(row: Row, tokenizer: Any, where: str) -> Question:
    if "messages" in row:
        turns = list(row["messages"])
    elif "prompt" not in row:
        raise BadInput(f"{where}: a row of plain text has no question to answer; give prompt/completion or messages")
    elif not isinstance(row["prompt"], str):
        turns = [*row["prompt"], *row["completion"]]
    else:
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        if not getattr(tokenizer, "chat_template", None):
            ids = list(tokenizer(row["prompt"])["input_ids"])
            if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
                ids.pop()
            return Question(ids, row["completion"], _tests(row, where))
    if turns[-1]["role"] != "assistant":
        raise BadInput(f"{where}: the last message is not the assistant's, so there is no answer to compare with")
    text = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return Question(ids, turns[-1]["content"], _tests(row, where))


def _tests(row: Row, where: str) -> str | None:
    tests = row.get("tests")
    if isinstance(tests, Sequence) and not isinstance(tests, str) and all(isinstance(t, str) for t in tests):
        tests = "\n".join(tests)
    if tests is not None and not isinstance(tests, str):
        raise BadInput(f"{where}: tests must be a string of Python or a list of strings")
    return tests or None


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 256, batch_tokens: int = 8192
) -> list[str]:
    """Greedy continuation of each prompt, without the prompt and special tokens; one text a prompt, in order.

    Prompts are padded on the left and go in batches of like length of at most `batch_tokens` tokens, new ones counted.
    Sampling and repetition penalties of the model's own generation settings are switched off.
    """
    from transformers import GenerationConfig

    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts), default=0)
    if room and longest + max_new_tokens > room:
        raise BadInput(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones pass the model's {room} positions; "
            "lower --max-new-tokens or drop the longest rows"
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    settings = GenerationConfig(
        **{"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0},
        max_new_tokens=max_new_tokens,
        eos_token_id=_ends(model, tokenizer) or None,
        pad_token_id=pad,
    )
    texts = [""] * len(prompts)
    training = model.training
    model.eval()
    try:
        for batch in length_batches([len(p) + max_new_tokens for p in prompts], batch_tokens):
            width = max(len(prompts[i]) for i in batch)
            ids = torch.full((len(batch), width), pad, dtype=torch.long)
            attention = torch.zeros_like(ids)
            for place, i in enumerate(batch):
                ids[place, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                attention[place, width - len(prompts[i]) :] = 1
            written = model.generate(
                ids.to(model.device), attention_mask=attention.to(model.device), generation_config=settings
            )
            decoded = tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
            for i, text in zip(batch, decoded, strict=True):
                texts[i] = text
    finally:
        model.train(training)
    return texts


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's and those of the model's generation settings."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    return sorted(e for e in ends if e is not None)


def number(text: str) -> str | None:
    """The number after the last `####` of a worked answer, without commas and currency; None where there is none."""
    found = re.findall(r"####\s*([^\n]*)", text)
    digits = re.search(r"[-+]?(?:\d[\d,]*)?\.?\d+", found[-1]) if found else None
    try:
        return str(Decimal(digits[0].replace(",", "")).normalize()) if digits else None
    except InvalidOperation:
        return None


def normalised(text: str) -> str:
    """Text without differences of case, compatible Unicode forms, white space, and a last full stop or semicolon."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".; ")


def rule(name: str) -> Callable[[str], str | None]:
    """What of an answer must be equal: "number" (after ####), "text" (normalised), or "re:PATTERN".

    A pattern takes its last match: the first group, or the whole match. Raises BadInput for anything else.
    """
    if name in ("number", "text"):
        return number if name == "number" else normalised
    if not name.startswith("re:"):
        raise BadInput(f"exact match {name!r}: give number, text or re:PATTERN")
    try:
        pattern = re.compile(name.removeprefix("re:"))
    except re.error as e:
        raise BadInput(f"exact match {name!r}: not a regular expression ({e})") from None

    def last(text: str) -> str | None:
        matches = list(pattern.finditer(text))
        return (matches[-1][1] if pattern.groups else matches[-1][0]) if matches else None

    return last


def code(answer: str) -> str:
    """The program in an answer: the first fenced block, or all of it when there is none."""
    block = FENCE.search(answer)
    return block[1] if block else answer


def marker(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    exact: str | None = None,
    run_tests: bool = False,
    max_new_tokens: int = 256,
    batch_tokens: int = 8192,
    limits: sandbox.Limits | None = None,
    trusted: bool = False,
) -> Callable[[Any], Marks]:
    """A function of the model that lets it answer every row once and marks the answers.

    exact: rule for exact match (see `rule`). run_tests: pass@1 over the rows that carry `tests`; this runs code
    that the model wrote; `trusted`: even where nothing holds it (see `sandbox`). Raises BadInput at once where the
    rows' own answers cannot be marked so.
    """
    asked = questions(rows, tokenizer)
    extract = rule(exact) if exact else None
    if extract:
        for i, question in enumerate(asked, 1):
            if not extract(question.reference):
                raise BadInput(f"row {i}: the row's own answer holds nothing for exact match by {exact!r}")
    tested = [i for i, question in enumerate(asked) if question.tests] if run_tests else []
    if run_tests and not tested:
        raise BadInput('no row carries "tests" (a string of Python, or a list of strings) to run')
    remarks: list[str] = []
    if tested:
        sandbox.require(trusted)
        own = _passes([code(asked[i].reference) for i in tested], asked, tested, limits, trusted)
        remarks.append(f"own answers of the rows pass {int(own[:, 0].sum())} of {len(own)} tests")
        remarks.append(f"tests run with {sandbox.describe()}")

    def mark(model: Any) -> Marks:
        prompts = [question.prompt for question in asked]
        answers = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens)
        metrics: dict[str, Values] = {}
        if extract:
            pairs = zip(answers, asked, strict=True)
            metrics[EXACT] = np.array([[extract(a) == extract(q.reference), 1.0] for a, q in pairs])
        if tested:
            metrics[PASS_AT_1] = _passes([code(answers[i]) for i in tested], asked, tested, limits, trusted)
        return Marks(metrics, answers, remarks)

    return mark


def _passes(
    programs: list[str],
    asked: Sequence[Question],
    tested: Sequence[int],
    limits: sandbox.Limits | None,
    trusted: bool,
) -> Values:
    jobs = [(program, asked[i].tests or "") for program, i in zip(programs, tested, strict=True)]
    outcomes = sandbox.run_all(jobs, limits, trusted=trusted)
    return np.array([[float(outcome.passed), 1.0] for outcome in outcomes])

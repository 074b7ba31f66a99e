"""Answers that a model writes (greedy, in batches), and how they are marked: exact match, or tests that run."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING

import numpy as np

from mftmerge.chat import Chat, prompt_ids
from mftmerge.data import IGNORE, Row, Tokens
from mftmerge.errors import BadInput
from mftmerge.evaluate import decoding, sandbox, sql
from mftmerge.evaluate.journal import Journal
from mftmerge.evaluate.pairing import Values
from mftmerge.loading import ends
from mftmerge.loss import evaluating, positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


EXACT, PASS_AT_1 = "exact", "pass@1"
FENCE = re.compile(r"```(?:[Pp]ython3?|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.S)


@dataclass(frozen=True)
class Question:
    """What the model reads (token ids), what the row's own answer is, and what the row carries to judge answers by:
    tests, or a script that makes the tables of a query."""

    prompt: list[int]
    reference: str
    tests: str | None = None
    tables: str | None = None


@dataclass(frozen=True)
class Marks:
    """Metric -> array (rows, 2) of 0 or 1 and the weight 1; the answers themselves, by row; remarks on the marking."""

    metrics: dict[str, Values]
    answers: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def questions(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """The prompt before each row's last answer, as the chat template (or plain joining) gives it in training.

    rows: as read, or as `data.tokenize` made them (then without tests).
    Raises BadInput for rows of plain `text` and empty prompts, which are no question, and rows that do not end with
    the assistant.
    """
    return [question(row, tokenizer, f"row {number}") for number, row in enumerate(rows, 1)]


def question(row: Row, tokenizer: PreTrainedTokenizerBase, where: str) -> Question:
    """The question of one row, as `questions` gives it. where: the row's place, for messages."""
    found = _question(row, tokenizer, where)
    if not found.prompt:
        raise BadInput(
            f"{where}: nothing stands before its answer, so there is no question (is it plain text?); "
            "give prompt/completion or messages"
        )
    return found


def _question(row: Row, tokenizer: PreTrainedTokenizerBase, where: str) -> Question:
    if "input_ids" in row:
        return _of_tokens(row, tokenizer)
    if "messages" in row:
        turns = list(row["messages"])
    elif "completion" not in row:
        raise BadInput(f"{where}: a row of plain text has no question to answer; give prompt/completion or messages")
    elif not isinstance(row["prompt"], str):
        turns = [*row["prompt"], *row["completion"]]
    else:
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        if not getattr(tokenizer, "chat_template", None):
            ids = prompt_ids(tokenizer, row["prompt"], special=True)
            return Question(ids, row["completion"], _tests(row, where), row.get("tables"))
    if turns[-1]["role"] != "assistant":
        raise BadInput(f"{where}: the last message is not the assistant's, so there is no answer to compare with")
    chat, answer = Chat(tokenizer, where, row.get("tools"), row.get("chat_template_kwargs")), turns[-1].get("content")
    tests, tables = _tests(row, where), row.get("tables")
    if not isinstance(answer, str):  # parts, or calls of tools alone: what the template makes of them
        found = _of_tokens(chat.tokens(turns, len(turns) - 1), tokenizer)
        return Question(found.prompt, found.reference, tests, tables)
    ids = prompt_ids(tokenizer, chat.prompt(turns[:-1]), special=False)
    return Question(ids, answer, tests, tables)


def _of_tokens(row: Tokens, tokenizer: PreTrainedTokenizerBase) -> Question:
    """The question of a tokenised row: what stands before its last answer, which is its last labelled stretch.

    Empty where that is only what the tokenizer begins every text with.
    """
    ids, labels = row["input_ids"], row["labels"]
    end = max(i for i, label in enumerate(labels) if label != IGNORE) + 1
    start = end
    while start and labels[start - 1] != IGNORE:
        start -= 1
    prompt = list(ids[:start])
    if prompt == list(tokenizer("")["input_ids"])[:start]:
        prompt = []
    return Question(prompt, str(tokenizer.decode(ids[start:end], skip_special_tokens=True)))


def _tests(row: Row, where: str) -> str | None:
    tests = row.get("tests")
    if isinstance(tests, Sequence) and not isinstance(tests, str) and all(isinstance(t, str) for t in tests):
        tests = "\n".join(tests)
    if tests is not None and not isinstance(tests, str):
        raise BadInput(f"{where}: tests must be a string of Python or a list of strings")
    return tests or None


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 256,
    batch_tokens: int = 8192,
    drafts: Sequence[Sequence[int]] | None = None,
    done: Callable[[int, list[int]], None] | None = None,
    option: str = "--max-new-tokens",
) -> list[list[int]]:
    """Greedy answers, token ids with the end token, one list a prompt, in order; see `decoding.greedy`.

    Sampling and repetition penalties of the model's own generation settings do not count. option: what max_new_tokens
    is called where it was given.
    Raises BadInput where an answer might not fit into the model's positions.
    """
    room = positions(model)
    longest = max(map(len, prompts), default=0)
    if room and longest + max_new_tokens > room:
        raise BadInput(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones pass the model's {room} positions; "
            f"lower {option} or drop the longest rows"
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    limits = decoding.Limits(ends(model, tokenizer), max_new_tokens, pad, batch_tokens)
    with evaluating(model):
        return decoding.greedy(model, prompts, limits, drafts=drafts, done=done)


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
    """What of an answer must be equal: "number" (after ####), "text" (normalised), or "re:PATTERN"; "sql": the whole
    answer, which `agree` runs.

    A pattern takes its last match: the first group, or the whole match. Raises BadInput for anything else.
    """
    if name in ("number", "text", "sql"):
        return number if name == "number" else normalised
    if not name.startswith("re:"):
        raise BadInput(f"exact match {name!r}: give number, text, sql or re:PATTERN")
    try:
        pattern = re.compile(name.removeprefix("re:"))
    except re.error as e:
        raise BadInput(f"exact match {name!r}: not a regular expression ({e})") from None

    def last(text: str) -> str | None:
        matches = list(pattern.finditer(text))
        return (matches[-1][1] if pattern.groups else matches[-1][0]) if matches else None

    return last


def agree(name: str, answer: str, question: Question) -> bool:
    """Whether an answer is right by a rule."""
    if name == "sql":
        return sql.same(answer, question.reference, question.tables)
    extract = rule(name)
    return extract(answer) == extract(question.reference)


def code(answer: str) -> str:
    """The program in an answer: the first fenced block, or all of it when there is none."""
    block = FENCE.search(answer)
    return block[1] if block else answer


class Marker:
    """Lets a model answer every row once and marks the answers. Call it with the model: it gives `Marks`.

    exact: rule for exact match (see `rule`). run_tests: pass@1 over the rows that carry `tests`; this runs code
    that the model wrote; `trusted`: even where nothing holds it (see `sandbox`). Raises BadInput at once where the
    rows' own answers cannot be marked so.

    The answers of one model are the drafts of the next one: masks over one model agree on most rows, and checking an
    answer takes one pass.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        *,
        exact: str | None = None,
        run_tests: bool = False,
        max_new_tokens: int = 256,
        batch_tokens: int = 8192,
        limits: sandbox.Limits | None = None,
        trusted: bool = False,
    ) -> None:
        self.asked = questions(rows, tokenizer)
        self.tokenizer, self.limits, self.trusted = tokenizer, limits, trusted
        self.max_new_tokens, self.batch_tokens = max_new_tokens, batch_tokens
        self.exact = exact
        self.ids: list[list[int]] | None = None  # the answers that were written last
        self.remarks: list[str] = []
        if exact:
            extract = rule(exact)
            for i, question in enumerate(self.asked, 1):
                if not extract(question.reference):
                    raise BadInput(f"row {i}: the row's own answer holds nothing for exact match by {exact!r}")
                if exact == "sql":
                    sql.require(question.reference, question.tables, f"row {i}")
        self.tested = [i for i, question in enumerate(self.asked) if question.tests] if run_tests else []
        if run_tests and not self.tested:
            raise BadInput('no row carries "tests" (a string of Python, or a list of strings) to run')
        if self.tested:
            sandbox.require(trusted)
            own = self._passes([code(self.asked[i].reference) for i in self.tested])
            self.remarks.append(f"own answers of the rows pass {int(own[:, 0].sum())} of {len(own)} tests")
            self.remarks.append(f"tests run with {sandbox.describe()}")

    def __call__(self, model: PreTrainedModel, journal: Journal | None = None) -> Marks:
        """journal: answers that are known already, and where new ones go."""
        answers = self.answers(model, journal)
        metrics: dict[str, Values] = {}
        if self.exact:
            pairs = zip(answers, self.asked, strict=True)
            metrics[EXACT] = np.array([[agree(self.exact, a, q), 1.0] for a, q in pairs])
        if self.tested:
            metrics[PASS_AT_1] = self._passes([code(answers[i]) for i in self.tested])
        return Marks(metrics, answers, self.remarks)

    def answers(self, model: PreTrainedModel, journal: Journal | None = None) -> list[str]:
        """What the model answers, as text."""
        prompts = [question.prompt for question in self.asked]
        known = dict(journal.answers) if journal else {}
        open_ = [i for i in range(len(prompts)) if i not in known]
        found = generate(
            model,
            self.tokenizer,
            [prompts[i] for i in open_],
            max_new_tokens=self.max_new_tokens,
            batch_tokens=self.batch_tokens,
            drafts=[self.ids[i] for i in open_] if self.ids else None,
            done=(lambda i, answer: journal.add(open_[i], answer)) if journal else None,
        )
        known |= dict(zip(open_, found, strict=True))
        self.ids = [known[i] for i in range(len(prompts))]
        return [str(text) for text in self.tokenizer.batch_decode(self.ids, skip_special_tokens=True)]

    @property
    def facts(self) -> list[object]:
        """What decides the answers beside the model: their length, and the prompts."""
        return [self.max_new_tokens, [question.prompt for question in self.asked]]

    @property
    def drafts(self) -> list[Tokens]:
        """The prompts with the answers that were written last, as rows: what the next model will be checked on."""
        pairs = zip(self.asked, self.ids or [], strict=bool(self.ids))
        return [{"input_ids": [*q.prompt, *ids], "labels": []} for q, ids in pairs]

    def _passes(self, programs: list[str]) -> Values:
        jobs = [(program, self.asked[i].tests or "") for program, i in zip(programs, self.tested, strict=True)]
        outcomes = sandbox.run_all(jobs, self.limits, trusted=self.trusted)
        return np.array([[float(outcome.passed), 1.0] for outcome in outcomes])

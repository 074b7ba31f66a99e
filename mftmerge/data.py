"""Rows of text and their tokens with labels: the same for training and for evaluation.

A row is one of three shapes, the ones that TRL reads:

- `{"messages": [{"role": ..., "content": ...}, ...]}`: a conversation; the loss is on the assistant's turns;
- `{"prompt": ..., "completion": ...}`: strings, or lists of messages; the loss is on the completion. Two strings become
  a user's and an assistant's turn when the tokenizer has a chat template, and are joined as they are when it has none;
- `{"text": ...}`: the loss is on every token.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mftmerge.chat import IGNORE, Chat, Tokens, coded, labelled
from mftmerge.errors import BadInput
from mftmerge.rowfiles import raw_rows
from mftmerge.rowshapes import Row, known_shape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    *("IGNORE", "Row", "Tokens", "digest", "load_rows", "mix", "require_disjoint", "row_digest", "tokenize"),
    *("tokenize_one", "usable"),
]

log = logging.getLogger(__name__)


class _Placed(dict[str, Any]):
    """A row that was read, with its place for messages."""

    where: str


def load_rows(
    source: object, *, split: str | None = None, skip_bad: bool = False, columns: Mapping[str, str] | None = None
) -> list[Row]:
    """Read and check rows.

    source: a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow; texts also as .gz), a directory or glob of them, one
    that `save_to_disk` wrote, a range of any of these (`rows.jsonl[0:100]`), a dataset's id on the hub, a dataset or
    data frame in memory, a list of rows, or a list of any of these (joined in order). split: of what has several,
    "train" by default. skip_bad: leave out rows that cannot be used, with one warning that counts them. columns: the
    source's name of a field where it is another (`{"prompt": "question", "completion": "answer"}`).

    Raises BadInput for a missing file, an unreadable line, or a row with no assistant text, naming file and line.
    """
    rows, bad = list[Row](), list[str]()
    for where, raw in raw_rows(source, split):
        try:
            row = _Placed(_checked(_renamed(raw, columns or {}, where), where, columns or {}))
            row.where = where
            rows.append(row)
        except BadInput as e:
            if not skip_bad:
                raise
            bad.append(str(e))
    _say_skipped(bad, len(bad) + len(rows))
    if not rows:
        raise BadInput(f"{source if isinstance(source, str | Path) else 'the data'}: no rows to use in it")
    return rows


def _say_skipped(bad: Sequence[str], count: int) -> None:
    if bad:
        log.warning("%d of %d rows are skipped; the first: %s", len(bad), count, bad[0])


def _renamed(row: object, columns: Mapping[str, str], where: str) -> object:
    """The row with its columns under the names that are expected here."""
    if not isinstance(row, Mapping) or not columns:
        return row
    if absent := [theirs for theirs in columns.values() if theirs not in row]:
        raise BadInput(f"{where}: there is no column {absent[0]!r}; this row has {', '.join(map(str, row))}")
    rest = {k: v for k, v in row.items() if k not in columns and k not in columns.values()}
    return rest | {ours: row[theirs] for ours, theirs in columns.items()}


def _checked(row: object, where: str, named: Collection[str]) -> Row:
    """The row in one of the three shapes, if it can be brought into one and has something to learn from.

    named: fields that the user gave columns for.
    """
    if isinstance(row, BadInput):  # what could not be read as a row
        raise row
    if not isinstance(row, Mapping):
        raise BadInput(f"{where}: a row must be an object with messages, prompt and completion, or text")
    row = known_shape(dict(row), where, named)
    row |= _for_template(row, where)
    if "messages" in row:
        _check_messages(row["messages"], where)
        said = list(row["messages"])
    elif "prompt" in row and "completion" in row:
        for key in ("prompt", "completion"):
            if not isinstance(row[key], str):
                _check_messages(row[key], f"{where}: {key}")
        if isinstance(row["prompt"], str) != isinstance(row["completion"], str):
            raise BadInput(f"{where}: prompt and completion must both be strings or both be lists of messages")
        said = row["completion"]
        said = [{"role": "assistant", "content": said}] if isinstance(said, str) else list(said)
    elif "text" in row:
        said = [{"role": "assistant", "content": row["text"]}]
    else:
        raise BadInput(
            f"{where}: a row needs messages, prompt and completion, or text; this one has {sorted(row)} "
            "(other names: --columns prompt=NAME --columns completion=NAME)"
        )
    if not any(_says_something(m) for m in said if m["role"] == "assistant" and m.get("weight", 1) != 0):
        raise BadInput(f"{where}: no assistant text to learn from; fill it in or remove the row")
    return row


def _for_template(row: Row, where: str) -> Row:
    """What of a row goes to the chat template as it is, read where a table holds it as JSON text."""
    found = {k: row[k] for k in ("tools", "chat_template_kwargs") if row.get(k) is not None}
    for key, value in found.items():
        try:
            found[key] = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            raise BadInput(f"{where}: {key} is neither a list or object nor JSON text of one") from None
    tools, options = found.get("tools"), found.get("chat_template_kwargs")
    if tools is not None and not (
        isinstance(tools, list | tuple) and all(isinstance(t, Mapping) or callable(t) for t in tools)
    ):
        raise BadInput(f"{where}: tools must be a list of objects")
    if options is not None and not (isinstance(options, Mapping) and all(isinstance(k, str) for k in options)):
        raise BadInput(f"{where}: chat_template_kwargs must be an object of names and values")
    return found


def _says_something(message: Mapping[str, object]) -> bool:
    """Whether an assistant's message has a text or a call to learn."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [p.get("text") for p in parts if isinstance(p, Mapping)]
    return bool(message.get("tool_calls")) or any(isinstance(t, str) and t.strip() for t in texts)


def _check_messages(messages: Any, where: str) -> None:
    """Raise BadInput unless it is a list of messages: role, and text (or parts of it) unless tools are called."""
    listed = isinstance(messages, Sequence) and not isinstance(messages, str)
    if not listed or not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages):
        raise BadInput(f"{where}: messages must be a list of objects with role and content")
    for number, message in enumerate(messages, 1):
        content, calls = message.get("content"), message.get("tool_calls")
        if calls and not (isinstance(calls, list) and all(isinstance(c, Mapping) for c in calls)):
            raise BadInput(f"{where}: message {number}: tool_calls must be a list of objects")
        if any(not isinstance(c.get("function") or {}, Mapping) for c in calls or ()):
            raise BadInput(f"{where}: message {number}: the function of a tool call must be an object")
        if not isinstance(message.get("weight"), int | float | None):  # tables have every field in every turn
            raise BadInput(f"{where}: message {number}: weight must be a number")
        if content is None and (message.get("tool_calls") or message["role"] != "user"):
            continue
        if not isinstance(content, str) and not (
            isinstance(content, list) and all(isinstance(p, Mapping) for p in content)
        ):
            raise BadInput(f"{where}: message {number}: content must be text or a list of parts")


def tokenize(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, *, skip_bad: bool = False
) -> list[Tokens]:
    """Token ids and labels of rows, cut on the right to `max_length` tokens; -100 outside the assistant's part.

    The end-of-turn token after the assistant's text is learnt too. Rows in which nothing to learn is left after cutting
    are left out, with one warning. skip_bad: also those that the chat template refuses. Raises BadInput when no row is
    left or a chat template is needed and missing.
    """
    out, bad = list[Tokens](), list[str]()
    for number, row in enumerate(rows, 1):
        try:
            tokens = tokenize_one(row, tokenizer, _place(row, number))
        except BadInput as e:
            if not skip_bad:
                raise
            bad.append(str(e))
            continue
        ids, labels = tokens["input_ids"][:max_length], tokens["labels"][:max_length]
        # Position 0 predicts nothing: its label is never used, by any causal language model's loss.
        if any(label != IGNORE for label in labels[1:]):
            out.append({"input_ids": ids, "labels": labels})
    _say_skipped(bad, len(rows))
    if not out and bad:
        raise BadInput(f"no row can be used; {bad[0]}")
    if len(out) + len(bad) < len(rows):
        left = len(rows) - len(out) - len(bad)
        log.warning("%d of %d rows left out: no assistant token within %d tokens", left, len(rows), max_length)
    if not out:
        raise BadInput(
            f"no row has an assistant token within max length {max_length}; raise --max-length or check the rows"
        )
    return out


def usable(rows: Sequence[Row], take: Callable[[Row, str], object]) -> list[Row]:
    """The rows that `take`, which gets a row and its place, does not refuse; one warning counts the others.

    Raises BadInput when no row is left.
    """
    out, bad = list[Row](), list[str]()
    for number, row in enumerate(rows, 1):
        try:
            take(row, _place(row, number))
            out.append(row)
        except BadInput as e:
            bad.append(str(e))
    _say_skipped(bad, len(rows))
    if bad and not out:
        raise BadInput(f"no row can be used; {bad[0]}")
    return out


def _place(row: Row, number: int) -> str:
    return str(getattr(row, "where", f"row {number}"))


def tokenize_one(row: Row, tokenizer: PreTrainedTokenizerBase, where: str) -> Tokens:
    """Token ids and labels of one row, uncut. where: its place, for messages.

    Raises BadInput where the chat template refuses it, or there is none and one is needed.
    """
    chat = Chat(tokenizer, where, row.get("tools"), row.get("chat_template_kwargs"))
    if "messages" in row:
        return chat.tokens(row["messages"])
    if "completion" not in row:
        return _joined("", row["text"], tokenizer)
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, str):
        return chat.tokens([*prompt, *completion], len(prompt))
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return chat.tokens(turns, 1)
    return _joined(prompt, completion, tokenizer)


def _joined(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Plain text: special tokens as the tokenizer adds them, the end token at the end, loss on the completion."""
    ids, places = coded(tokenizer, prompt + completion)
    labels = labelled(ids, places, [(len(prompt), len(prompt) + len(completion))])
    end = tokenizer.eos_token_id
    if end is not None and (not ids or ids[-1] != end):
        ids.append(end)
        labels.append(end)
    elif end is not None:
        labels[-1] = end
    return {"input_ids": ids, "labels": labels}


def digest(tokens: Sequence[Tokens]) -> str:
    """Hash of tokenised rows, in order: which data a mask was trained on."""
    h = hashlib.blake2b(digest_size=16)
    for row in tokens:
        h.update(json.dumps([row["input_ids"], row["labels"]], separators=(",", ":")).encode())
    return h.hexdigest()


def mix(parts: Sequence[Sequence[Row]], weights: Sequence[float] | None, seed: int) -> list[Row]:
    """One list of rows from several: joined without weights, else drawn in proportion until each part was seen once."""
    if weights is not None and (len(weights) != len(parts) or min(weights) <= 0):
        raise BadInput(f"data weights: {len(parts)} sources need {len(parts)} positive weights, got {list(weights)}")
    if weights is None or len(parts) == 1:
        return [row for part in parts for row in part]
    from datasets import Dataset, interleave_datasets

    share = [w / sum(weights) for w in weights]
    places = [Dataset.from_list([{"part": p, "row": r} for r in range(len(part))]) for p, part in enumerate(parts)]
    drawn = interleave_datasets(places, probabilities=share, seed=seed, stopping_strategy="all_exhausted")
    return [parts[at["part"]][at["row"]] for at in drawn]


def row_digest(row: Row) -> str:
    """Hash of what a row says, whatever its shape, other fields and white space."""
    if "messages" in row:
        said = [_said(m) for m in row["messages"]]
    elif "completion" in row:
        parts = (row["prompt"], row["completion"])
        said = [_said(m) for p in parts for m in ([p] if isinstance(p, str) else p)]
    else:
        said = [row["text"]]
    text = "\0".join(" ".join(s.split()) for s in said)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _said(message: str | Mapping[str, Any]) -> str:
    """What a message says: its text, or that of its parts, and the calls it makes."""
    if isinstance(message, str):
        return message
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(str(p.get("text", p)) for p in content)
    calls = [c.get("function") or c for c in message.get("tool_calls") or ()]
    return content + "".join(json.dumps(c, sort_keys=True, default=str) for c in calls)


def require_disjoint(parts: Mapping[str, Sequence[Row]]) -> None:
    """Raise BadInput when two parts, such as validation and test, share a row. Test domains may overlap each other."""
    digests = {name: [row_digest(row) for row in rows] for name, rows in parts.items()}
    for (a, first), (b, second) in itertools.combinations(digests.items(), 2):
        shared = set(first) & set(second)
        if shared and not (a.startswith("test ") and b.startswith("test ")):
            where = next(i for i, d in enumerate(second, 1) if d in shared)
            raise BadInput(
                f"{a} and {b} share rows ({len(shared)}; the first is row {where} of {b}); remove them from one"
            )

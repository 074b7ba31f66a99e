"""Rows as published data sets have them, brought into one of the three shapes that `data` describes.

Only answers are learnt. So what holds the question too (Alpaca's `text`, a preference's whole conversation) is not
taken as the answer, and a row that can be read in two ways is refused with the names to give. Read are:

- `messages`, and ShareGPT's `conversations`, with the `system` prompt beside them;
- pairs of texts (`PAIRS`), with what the question is about (`input`, `context`), `system`, earlier turns (`history`);
- the `chosen` side of preferences: a text, a turn or a conversation, with or without the question before it, and
  hh-rlhf's transcripts ("\\n\\nHuman: ...\\n\\nAssistant: ...");
- rows of KTO (`prompt`, `completion`, `label`), where the label is true;
- `text`, where nothing beside it says that only a part of it is the answer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mftmerge.errors import BadInput

Row = dict[str, Any]
Turns = list[dict[str, Any]]

SHAPES = ("messages", "prompt", "completion", "text")
CARRIED = ("tools", "chat_template_kwargs", "tests", "tables")  # what goes with a row whatever its shape
TALKS = ("conversations", "conversation")
# Question and answer by name, the first pair of texts that a row has. Alpaca's come before `prompt`, which in some of
# its copies holds the answer too; `solution` before `answer`, which is its last line where a row has both.
PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("query", "answer"),
    ("problem", "solution"),
    ("prompt", "response"),
    ("prompt", "code"),
    ("input", "output"),
)
QUESTIONS = ("prompt", *dict.fromkeys(q for q, _ in PAIRS if q != "prompt"))
ANSWERS = ("completion", *dict.fromkeys(a for _, a in PAIRS), "answers", "summary")
SUBJECTS = ("input", "context")  # what a question is about
CHOICES = ("choices", "options")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}
ROLES |= {"system": "system", "tool": "tool", "function_call": "assistant", "observation": "tool"}
SPOKEN = re.compile(r"\n\n(Human|Assistant):")


def known_shape(row: Row, where: str, named: Collection[str] = ()) -> Row:
    """The row in one of the three shapes, without the fields of the others; as it is where nothing in it is known.

    where: the row's place, for messages. named: fields that the user gave columns for; these decide where the row has
    others too. Raises BadInput for a row that can be read in two ways, or only without its question.
    """
    has = {k: v for k, v in row.items() if v is not None}
    for key in ("messages", "text"):
        if key in named and key in has:
            return _only(has, key)
    if {"prompt", "completion"} & {*named}:
        has = {k: v for k, v in has.items() if k not in ("messages", *TALKS)}
    if "messages" in has:
        return _only(has, "messages") | {"messages": _spoken(has["messages"], where)}
    if "prompt" in has and "completion" in has:
        if has.get("label") is False:
            raise BadInput(f"{where}: label is false, so that its completion is one to avoid; remove the row")
        return _only(has, "prompt", "completion")
    carried = {k: has[k] for k in CARRIED if k in has}
    if isinstance(has.get("chosen"), str | Sequence | Mapping):
        return carried | _preferred(has, where)
    if talk := _talk(has, where):
        return carried | {"messages": [*_system(has, talk), *talk]}
    for question, answer in PAIRS:
        if isinstance(has.get(question), str) and isinstance(has.get(answer), str):
            return carried | _paired(has, question, has[answer], where)
    if "text" in has:
        _require_whole(has, where)
        return _only(has, "text")
    return row


def _only(has: Row, *keys: str) -> Row:
    return {k: v for k, v in has.items() if k in keys or k not in SHAPES}


# -- conversations ----------------------------------------------------------------------------------------------------


def _spoken(messages: Any, where: str) -> Any:
    """Messages, in ShareGPT's form too; what is no list of objects as it is, for whoever checks it."""
    listed = isinstance(messages, list) and all(isinstance(m, Mapping) for m in messages)
    return _turns(messages, where) if listed and any("from" in m and "role" not in m for m in messages) else messages


def _turns(talk: Sequence[Any], where: str) -> Turns:
    """Turns with role and content; ShareGPT's have `from` and `value`. Raises BadInput for an unknown speaker."""
    found: Turns = []
    for turn in talk:
        who = turn.get("from", turn.get("role")) if isinstance(turn, Mapping) else None
        if not isinstance(who, str) or ("from" in turn and who not in ROLES):
            raise BadInput(f"{where}: conversations need turns with from and value; {str(who)[:40]!r} is no speaker")
        said = {"role": ROLES.get(who, who), "content": turn.get("value", turn.get("content"))}
        found.append(said | {k: v for k, v in turn.items() if k not in ("from", "value", *said) and v is not None})
    return found


def _talk(has: Row, where: str) -> Turns:
    """The turns of ShareGPT's rows; none in others."""
    return next((_turns(has[k], where) for k in TALKS if isinstance(has.get(k), list)), [])


def _system(has: Row, turns: Sequence[Mapping[str, Any]]) -> Turns:
    """The system prompt that stands beside turns which have none."""
    text = next((has[k] for k in ("system", "system_prompt") if isinstance(has.get(k), str) and has[k].strip()), None)
    own = bool(turns) and turns[0].get("role") == "system"
    return [] if text is None or own else [{"role": "system", "content": text}]


def _transcript(text: str, where: str) -> Turns | None:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ...", None for another text.

    Raises BadInput for one that does not end with the assistant.
    """
    before, *rest = SPOKEN.split("\n\n" + text.lstrip())
    if before or not rest or rest[0] != "Human":
        return None
    if rest[-2] != "Assistant":
        raise BadInput(f"{where}: the transcript does not end with the assistant; remove the row")
    said = zip(rest[::2], rest[1::2], strict=True)
    return [{"role": "user" if who == "Human" else "assistant", "content": text.strip()} for who, text in said]


# -- questions and answers --------------------------------------------------------------------------------------------


def _paired(has: Row, question: str, answer: str, where: str) -> Row:
    """A question and an answer that are texts: as texts, or as turns where others stand before them."""
    if found := next((k for k in CHOICES if isinstance(has.get(k), list | Mapping)), None):
        raise BadInput(f"{where}: {found} would not be read; put them into the question's text")
    asked, before = _asked(has, question), _history(has, where)
    before = [*_system(has, before), *before]
    if not before:
        return {"prompt": asked, "completion": answer}
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"prompt": [*before, turns[0]], "completion": turns[1:]}


def _asked(has: Row, question: str) -> str:
    """The question with what it is about, unless its text has that already."""
    asked = has[question] if has[question].strip() else ""
    for key in SUBJECTS:
        more = has.get(key)
        if key != question and isinstance(more, str) and more.strip() and more not in asked:
            asked = f"{asked}\n\n{more}" if asked else more
    return str(asked)


def _history(has: Row, where: str) -> Turns:
    """Earlier questions and answers, as Alpaca's rows with several turns have them."""
    pairs = has.get("history") or []
    if not isinstance(pairs, list) or not all(
        isinstance(p, Sequence) and len(p) == 2 and all(isinstance(t, str) for t in p) for p in pairs
    ):
        raise BadInput(f"{where}: history must be a list of pairs, question and answer")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def _preferred(has: Row, where: str) -> Row:
    """The chosen side of a preference: the question as prompt, what comes after it as completion."""
    chosen = has["chosen"]
    question = next((k for k in QUESTIONS if isinstance(has.get(k), str)), None)
    before = _turns(has["prompt"], where) if isinstance(has.get("prompt"), list) else _talk(has, where)
    said = _transcript(chosen, where) if isinstance(chosen, str) else None
    transcript = said is not None
    if isinstance(chosen, str) and said is None:
        if question and not before:
            return _paired(has, question, chosen, where)
        said = [{"role": "assistant", "content": chosen}]
    if said is None:
        said = _turns([chosen] if isinstance(chosen, Mapping) else chosen, where)
    whole = any(m["role"] == "user" for m in said)
    if not whole and not before and question:
        before = [*_history(has, where), {"role": "user", "content": _asked(has, question)}]
    if not whole and not before:
        raise BadInput(
            f"{where}: chosen has no question before it; say which column has it (--columns prompt=NAME), "
            f"or --columns {'text' if isinstance(chosen, str) else 'messages'}=chosen to learn it alone"
        )
    if not whole:
        return {"prompt": [*_system(has, before), *before], "completion": said}
    if not before and not question:
        turns = [*_system(has, said), *said]
        return {"prompt": turns[:-1], "completion": turns[-1:]} if transcript else {"messages": turns}
    end = _end(said, before) if before else _end_of(said, has[question or "prompt"], where)
    if end is None:
        raise BadInput(
            f"{where}: chosen is a whole conversation, which does not begin with the question beside it; "
            "--columns messages=chosen reads it alone"
        )
    first = [m for m in before if m["role"] == "system"] if said[0]["role"] != "system" else []
    asked = [*first, *said[:end]]
    return {"prompt": [*_system(has, asked), *asked], "completion": said[end:]}


def _end(said: Turns, before: Turns) -> int | None:
    """How many of a conversation's turns are the question, which it begins with; either may lack the system's."""
    skipped = sum(m["role"] == "system" for m in said[:1])
    asked = [_says(m) for m in before if m["role"] != "system"]
    end = skipped + len(asked)
    return end if [_says(m) for m in said[skipped:end]] == asked else None


def _end_of(said: Turns, question: str, where: str) -> int | None:
    """The same where the question is a text: that of a user's turn, the last such, or a transcript up to the answer."""
    opened = re.sub(r"\n\nAssistant:\s*\Z", "", question)
    if opened != question and (turns := _transcript(f"{opened}\n\nAssistant:", where)):
        return _end(said, turns[:-1])
    return next((i for i in range(len(said), 0, -1) if _says(said[i - 1]) == ("user", question.strip())), None)


def _says(message: Mapping[str, Any]) -> tuple[str, Any]:
    content = message.get("content")
    return message["role"], content.strip() if isinstance(content, str) else content


def _require_whole(has: Row, where: str) -> None:
    """Raise BadInput where something beside `text` says that it is a question, an answer, or holds both."""
    if isinstance(has.get("role"), str):
        raise BadInput(
            f"{where}: text with a role is one message of a conversation; put conversations together as messages"
        )
    for key in (*QUESTIONS, *ANSWERS):
        if isinstance(has.get(key), str | list | Mapping):
            question, answer = (key, "text") if key in QUESTIONS else ("text", key)
            raise BadInput(
                f"{where}: has text and {key}; --columns text=text learns all of the text, "
                f"--columns prompt={question} --columns completion={answer} the answer alone"
            )

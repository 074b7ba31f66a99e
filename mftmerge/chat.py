"""Conversations through a tokenizer's chat template: their tokens, and which of them the assistant has to learn.

Where a template shows every turn as it showed it before the next one came, an assistant's turn is what lies between the
generation prompt and the end of the turn. Many templates do not: they remove old reasoning, open a `<think>` block in
the generation prompt, or end the last turn with another token. There the turn is found by what changes in the text when
another content is put in its place. Offsets of the tokenizer turn characters into tokens.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mftmerge.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # the label of a token that takes no part in the loss, as everywhere in transformers

Message = dict[str, Any]  # role, content, and what else the template may use: tool_calls, name, reasoning_content ...
Tokens = dict[str, list[int]]  # {"input_ids": [...], "labels": [...]}
Span = tuple[int, int]  # characters [start, stop) that are learnt

# Stands in for a content: no template trims, splits or escapes it.
SENTINEL = "mftmerge7b1f content 3c5e9a"
MARK = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")  # a special token as templates write them: <|end|>, </s>, [/INST]


class Chat:
    """A tokenizer's template, with what a conversation brings of its own.

    tools: descriptions of functions for the template. options: further arguments of it (`enable_thinking`, ...).
    where: the row, for messages.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        where: str,
        tools: Sequence[Mapping[str, object]] | None = None,
        options: Mapping[str, object] | None = None,
    ) -> None:
        self.tokenizer, self.where = tokenizer, where
        self.more: dict[str, Any] = dict(options or {}) | ({"tools": list(tools)} if tools else {})

    def tokens(self, messages: Sequence[Mapping[str, object]], first: int = 0) -> Tokens:
        """Ids and labels: learnt are the assistant's turns from message `first` on, but for those of weight 0.

        Raises BadInput, naming the row, for what the template refuses and for a turn that cannot be found in its text.
        """
        template = getattr(self.tokenizer, "chat_template", None)
        if not template:
            raise BadInput(
                f"{self.where}: messages need a chat template and the tokenizer has none; "
                "use prompt/completion or text rows"
            )
        plain = self._called([self._plain(m) for m in messages])
        learnt = [
            i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first and m.get("weight", 1) != 0
        ]
        text = self._render(plain)
        spans = [self._between(text, plain, i) for i in learnt]
        if any(span is None for span in spans):
            every = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
            if learnt == every and re.search(r"{%-?\s*generation", str(template)):
                return self._by_marks(plain)
            spans = [span or self._by_change(text, plain, i) for span, i in zip(spans, learnt, strict=True)]
        # Where the template ends a turn by the next one's role alone, the last one's end has to be taught.
        unended = learnt[-1:] == [len(plain) - 1] and self._open(plain)
        text = text.rstrip() if unended else text
        ids, places = coded(self.tokenizer, text, add_special_tokens=False)
        labels = labelled(ids, places, [span for span in spans if span is not None])
        end = self.tokenizer.eos_token_id
        if unended and isinstance(end, int) and ids[-1:] != [end]:
            ids, labels = [*ids, end], [*labels, end]
        return {"input_ids": ids, "labels": labels}

    def prompt(self, messages: Sequence[Mapping[str, object]]) -> str:
        """The text before an answer to the messages. Raises BadInput, naming the row, for what the template refuses."""
        return self._render(self._called([self._plain(m) for m in messages]), add_generation_prompt=True)

    # -- the ways to find a turn --------------------------------------------------------------------------------------

    def _between(self, text: str, messages: Sequence[Message], i: int) -> Span | None:
        """Turn `i` between the generation prompt and its end, where the text begins with both."""
        if not i:
            return None
        before = self._part(messages[:i], add_generation_prompt=True)
        through = self._part(messages[: i + 1]).rstrip()  # a line break after the end of turn is not learnt
        if not (before and text.startswith(before) and text.startswith(through) and len(before) <= len(through)):
            return None
        if self._open(messages[: i + 1], through):  # the turn ends where the next role begins: that token says stop
            return len(before), len(text) if through == text.rstrip() else _after_mark(text, len(through))
        if through == text.rstrip() and before == self._part(messages[:i]):
            return len(before), _closed(before, through, messages[i]["content"])
        return len(before), len(through)

    def _by_change(self, text: str, messages: Sequence[Message], i: int) -> Span:
        """Turn `i` as what differs when another content stands in its place, and the end of turn after it."""
        other = self._render([*messages[:i], self._other(messages[i]), *messages[i + 1 :]])
        head, found, tail = other.partition(SENTINEL)
        content = len(head), len(text) - len(tail)
        if not found or content[1] < content[0] or not (text.startswith(head) and text.endswith(tail)):
            span = self._by_agreement(text, messages, i) if messages[i].get("tool_calls") else None
            if span is not None:
                return span
            raise BadInput(
                f"{self.where}: the chat template rewrites earlier turns so that message {i + 1} cannot be found in "
                "its text; add {% generation %} marks to the template, or give that answer as a row of its own"
            )
        # What lies between the generation prompt and the content is the assistant's to write, such as an empty block
        # for reasoning. A prompt that goes on otherwise than the text, such as one that opens that block, says nothing.
        prompt = self._part(messages[:i], add_generation_prompt=True) if i else ""
        start = len(prompt) if prompt and len(prompt) <= content[0] and text.startswith(prompt) else content[0]
        alone = self._part([*messages[:i], self._other(messages[i])]).partition(SENTINEL)[2].rstrip()
        if alone and text.startswith(alone, content[1]):
            return start, content[1] + len(alone)
        return start, _after_mark(text, content[1])  # the token that follows ends the turn

    def _by_agreement(self, text: str, messages: Sequence[Message], i: int) -> Span | None:
        """Turn `i`, whose calls and their results are one turn in the text, up to where the results begin."""
        before = self._part(messages[:i], add_generation_prompt=True)
        end = _agreement(text, self._part(messages[: i + 1]))
        end = next((m.start() for m in MARK.finditer(text) if m.start() < end < m.end()), end)
        names = [str((c.get("function") or c).get("name")) for c in messages[i]["tool_calls"]]
        if not before or not text.startswith(before) or not all(n in text[len(before) : end] for n in names):
            return None
        return len(before), _after_mark(text, end)  # the token that opens the results says stop

    def _by_marks(self, messages: Sequence[Message]) -> Tokens:
        """By the marks of the template itself: `{% generation %}`."""
        wanted: Any = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        marked: Any = self.tokenizer.apply_chat_template(list(messages), **wanted, **self.more)
        ids = list(marked["input_ids"])
        masks = marked["assistant_masks"]
        return {"input_ids": ids, "labels": [t if m else IGNORE for t, m in zip(ids, masks, strict=True)]}

    # -- parts --------------------------------------------------------------------------------------------------------

    def _render(self, messages: Sequence[Message], **more: Any) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **more, **self.more))
        except Exception as e:  # templates raise what they like, and jinja2 its own
            reason = " ".join(str(e).split()) or type(e).__name__
            raise BadInput(f"{self.where}: the chat template refuses it: {reason[:200]}") from None

    def _part(self, messages: Sequence[Message], **more: object) -> str:
        """The text of a part of the conversation, "" where the template takes the whole only."""
        try:
            return self._render(messages, **more)
        except BadInput:
            return ""

    def _called(self, messages: list[Message]) -> list[Message]:
        """Messages with tool calls in the form that the template takes: arguments as an object or as its JSON text.

        Raises BadInput where the template shows no calls at all: nothing would be learnt of them.
        """
        calls = [i for i, m in enumerate(messages) if m.get("tool_calls")]
        if not calls:
            return messages
        refused: BadInput | None = None
        forms = (_as_it_is, _parsed, json.dumps)
        for form, empty in itertools.product(forms, ("", [{"type": "text", "text": ""}])):
            changed = [_with_arguments(m, form, empty) for m in messages]
            try:
                text = self._render(changed)
            except BadInput as e:
                refused = refused or e
                continue
            bare = [{k: v for k, v in m.items() if k != "tool_calls"} for m in changed]
            try:
                shown = text != self._render(bare)
            except BadInput:  # it misses the calls
                shown = True
            if not shown:
                raise BadInput(f"{self.where}: the chat template does not show tool calls; use one that does")
            return changed
        assert refused is not None
        raise refused

    def _plain(self, message: Mapping[str, object]) -> Message:
        """A message as templates expect it: with a content, which is text where it has nothing but text."""
        plain = {k: v for k, v in message.items() if k != "weight" and v is not None}
        content = plain.get("content", "")
        parts = content if isinstance(content, list) else []
        texts = [p["text"] for p in parts if isinstance(p, Mapping) and isinstance(p.get("text"), str)]
        if parts and len(texts) == len(parts):
            content = "".join(texts)
        if isinstance(content, str) and self._wants_parts():
            content = [{"type": "text", "text": content}]
        return plain | {"content": content}

    def _wants_parts(self) -> bool:
        """Whether the template shows a content only where it is a list of parts (vision-language models)."""
        known = _FORMS.get(key := str(self.tokenizer.chat_template))
        if known is None:
            known = _FORMS[key] = False
            turn = {"role": "user", "content": SENTINEL}
            listed = {"role": "user", "content": [{"type": "text", "text": SENTINEL}]}
            known = _FORMS[key] = not self._shows(turn) and self._shows(listed)
        return known

    def _shows(self, message: Message) -> bool:
        try:
            return SENTINEL in str(self.tokenizer.apply_chat_template([message], tokenize=False))
        except Exception:
            return False

    def _open(self, messages: Sequence[Message], through: str = "") -> bool:
        """Whether the template writes nothing after the last turn's content: the next role ends it.

        through: the text up to the turn's end; calls may leave a turn open that a content would have ended.
        """
        rendered = self._part([*messages[:-1], self._other(messages[-1])])
        closing = rendered.rpartition(SENTINEL)[2].strip() if SENTINEL in rendered else "?"
        left = bool(through and messages[-1].get("tool_calls")) and closing != "?" and not through.endswith(closing)
        return not closing or left

    @staticmethod
    def _other(message: Message) -> Message:
        """The message with the sentinel as its only content."""
        bare = {k: v for k, v in message.items() if k not in ("tool_calls", "reasoning_content", "thinking")}
        listed = isinstance(message.get("content"), list)
        return bare | {"content": [{"type": "text", "text": SENTINEL}] if listed else SENTINEL}


_FORMS: dict[str, bool] = {}  # template -> whether it wants parts


def _after_mark(text: str, at: int) -> int:
    """Where the special token ends that begins at `at`, or the first character there."""
    match = MARK.match(text, at)
    return match.end() if match else min(at + 1, len(text))


def _closed(before: str, through: str, content: object) -> int:
    """Where a last turn ends: before the generation prompt where the template writes one in any case.

    before: the text up to the turn, with that prompt if so. through: the text with the turn, at its end.
    """
    said = content.strip() if isinstance(content, str) else ""
    at = through.find(said, len(before))
    if not said or at < 0 or through[len(before) : at].strip():
        return len(through)  # a role stands between: there was no prompt
    at += len(said)
    tail, old = through[at:], before.rstrip()
    cut = len(tail) - _agreement(tail[::-1], old[::-1])
    cut = next((m.end() for m in MARK.finditer(tail) if m.start() < cut < m.end()), cut)  # not inside a token
    kept = tail[:cut].rstrip()
    if kept:
        return at + len(kept)
    mark = MARK.search(tail)  # turns of users end alike
    return at + mark.end() if mark else len(through)


def _agreement(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _as_it_is(arguments: object) -> object:
    return arguments


def _parsed(arguments: Any) -> object:
    try:
        return json.loads(arguments)
    except (TypeError, ValueError):
        return arguments


def _with_arguments(message: Message, form: Callable[[object], object], empty: object) -> Message:
    """The message with another form of its calls' arguments, and of a content that says nothing."""
    if not message.get("tool_calls"):
        return message
    message = message if message["content"] else {**message, "content": empty}
    calls = []
    for call in message["tool_calls"]:
        function = dict(call.get("function") or {})
        if "arguments" in function:
            function["arguments"] = form(function["arguments"])
        calls.append({**call, "function": function} if "function" in call else call)
    return {**message, "tool_calls": calls}


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    """What a model reads before it answers a text, which may be no token at all.

    special: with what the tokenizer begins a text with; what some end every text with is left out, for the answer
    follows. Raises BadInput for a text that is none.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput("the text holds half a character (a lone surrogate), or bytes that are not UTF-8") from None
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    if special and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def coded(tokenizer: PreTrainedTokenizerBase, text: str, **more: object) -> tuple[list[int], list[Span]]:
    """A text's token ids, and where in it each stands. Raises BadInput for a tokenizer that cannot say that."""
    try:
        found = tokenizer(text, return_offsets_mapping=True, **more)
    except NotImplementedError:
        kind = type(tokenizer).__name__
        raise BadInput(f"{kind} cannot say where its tokens stand in a text; use a fast tokenizer") from None
    return list(found["input_ids"]), list(found["offset_mapping"])


def labelled(ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """Labels from character offsets: a token counts when it starts inside a span (and is not empty)."""
    return [
        token if any(lo <= start < hi for lo, hi in spans) and start < end else IGNORE
        for token, (start, end) in zip(ids, offsets, strict=True)
    ]

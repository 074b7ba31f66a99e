"""Conversations through a tokenizer's chat template: their tokens, and which of them the assistant has to learn.

Where a template shows every turn as it showed it before the next one came, an assistant's turn is what lies between the
generation prompt and the end of the turn. Many templates do not: they remove old reasoning, open a `<think>` block in
the generation prompt, or end the last turn with another token. There the turn is found by what changes in the text when
another content is put in its place. Offsets of the tokenizer turn characters into tokens.
"""

from __future__ import annotations

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
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer, self.where = tokenizer, where
        self.more: dict[str, Any] = dict(options or {}) | ({"tools": list(tools)} if tools else {})

    def tokens(self, messages: Sequence[Mapping[str, Any]], first: int = 0) -> Tokens:
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
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, places = list(coded["input_ids"]), list(coded["offset_mapping"])
        found = [span for span in spans if span is not None]
        labels = labelled(ids, places, found)
        end = self.tokenizer.eos_token_id
        if found and found[-1][1] == len(text) and isinstance(end, int) and ids[-1:] != [end] and self._open(plain):
            ids, labels = [*ids, end], [*labels, end]  # the template ends a turn by the next one's role: teach to stop
        return {"input_ids": ids, "labels": labels}

    # -- the two ways to find a turn ----------------------------------------------------------------------------------

    def _between(self, text: str, messages: Sequence[Message], i: int) -> Span | None:
        """Turn `i` between the generation prompt and its end, where the text begins with both."""
        if not i:
            return None
        before = self._render(messages[:i], add_generation_prompt=True)
        through = self._render(messages[: i + 1]).rstrip()  # a line break after the end of turn is not learnt
        if not (text.startswith(before) and text.startswith(through) and len(before) <= len(through)):
            return None
        if through == text.rstrip() and self._open(messages[: i + 1]):
            return len(before), len(text)
        if self._open(messages[: i + 1]):  # the turn ends where the next role begins: that token says stop
            return len(before), _after_mark(text, len(through))
        return len(before), len(through)

    def _by_change(self, text: str, messages: Sequence[Message], i: int) -> Span:
        """Turn `i` as what differs when another content stands in its place, and the end of turn after it."""
        other = self._render([*messages[:i], self._other(messages[i]), *messages[i + 1 :]])
        head, found, tail = other.partition(SENTINEL)
        content = len(head), len(text) - len(tail)
        if not found or content[1] < content[0] or not (text.startswith(head) and text.endswith(tail)):
            raise BadInput(
                f"{self.where}: the chat template rewrites earlier turns so that message {i + 1} cannot be found in "
                "its text; add {% generation %} marks to the template, or give that answer as a row of its own"
            )
        # What lies between the generation prompt and the content is the assistant's to write, such as an empty block
        # for reasoning. A prompt that goes on otherwise than the text, such as one that opens that block, says nothing.
        prompt = self._render(messages[:i], add_generation_prompt=True) if i else ""
        start = len(prompt) if prompt and len(prompt) <= content[0] and text.startswith(prompt) else content[0]
        alone = self._render([*messages[:i], self._other(messages[i])]).partition(SENTINEL)[2].rstrip()
        if alone and text.startswith(alone, content[1]):
            return start, content[1] + len(alone)
        return start, _after_mark(text, content[1])  # the token that follows ends the turn

    def _by_marks(self, messages: Sequence[Message]) -> Tokens:
        """By the marks of the template itself: `{% generation %}`."""
        wanted: Any = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        coded: Any = self.tokenizer.apply_chat_template(list(messages), **wanted, **self.more)
        ids = list(coded["input_ids"])
        masks = coded["assistant_masks"]
        return {"input_ids": ids, "labels": [t if m else IGNORE for t, m in zip(ids, masks, strict=True)]}

    # -- parts --------------------------------------------------------------------------------------------------------

    def _render(self, messages: Sequence[Message], **more: Any) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **more, **self.more))
        except Exception as e:  # templates raise what they like, and jinja2 its own
            reason = " ".join(str(e).split()) or type(e).__name__
            raise BadInput(f"{self.where}: the chat template refuses it: {reason[:200]}") from None

    def _called(self, messages: list[Message]) -> list[Message]:
        """Messages with the arguments of tool calls in the form that the template takes: an object, or its JSON text.

        Raises BadInput where the template shows no calls at all: nothing would be learnt of them.
        """
        calls = [i for i, m in enumerate(messages) if m.get("tool_calls")]
        if not calls:
            return messages
        refused: BadInput | None = None
        for form in (_as_it_is, _parsed, json.dumps):
            changed = [_with_arguments(m, form) for m in messages]
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

    def _plain(self, message: Mapping[str, Any]) -> Message:
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

    def _open(self, messages: Sequence[Message]) -> bool:
        """Whether the template writes nothing after the last turn's content: the next role ends it."""
        rendered = self._render([*messages[:-1], self._other(messages[-1])])
        return rendered.rstrip().endswith(SENTINEL)

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


def _as_it_is(arguments: Any) -> Any:
    return arguments


def _parsed(arguments: Any) -> Any:
    try:
        return json.loads(arguments)
    except (TypeError, ValueError):
        return arguments


def _with_arguments(message: Message, form: Callable[[Any], Any]) -> Message:
    """The message with another form of its calls' arguments."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call.get("function") or {})
        if "arguments" in function:
            function["arguments"] = form(function["arguments"])
        calls.append({**call, "function": function} if "function" in call else call)
    return {**message, "tool_calls": calls}


def labelled(ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """Labels from character offsets: a token counts when it starts inside a span (and is not empty)."""
    return [
        token if any(lo <= start < hi for lo, hi in spans) and start < end else IGNORE
        for token, (start, end) in zip(ids, offsets, strict=True)
    ]

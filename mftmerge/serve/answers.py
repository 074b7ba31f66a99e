"""The engine's events as OpenAI's answers: whole, or in pieces for server-sent events."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from mftmerge.serve.engine import Event
from mftmerge.serve.requests import Asked
from mftmerge.serve.sampling import Chosen


@dataclass
class Answers:
    """The answers to one request while they come in. Choice p * count + i is answer i to prompt p."""

    asked: Asked
    tokenizer: PreTrainedTokenizerBase
    texts: dict[int, list[str]] = field(default_factory=dict)
    tokens: dict[int, list[Chosen]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    written: int = 0

    def __post_init__(self) -> None:
        kind = "chatcmpl" if self.asked.chat else "cmpl"
        self.head = {"id": f"{kind}-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.asked.model}

    @property
    def choices(self) -> int:
        return len(self.asked.prompts) * self.asked.count

    @property
    def done(self) -> bool:
        return len(self.reasons) == self.choices

    def take(self, event: Event) -> None:
        """Take up an event that is no error; its index is that of the choice."""
        self.texts.setdefault(event.index, []).append(event.text)
        self.tokens.setdefault(event.index, []).extend(event.tokens)
        self.written += len(event.tokens)
        if event.reason is not None:
            self.reasons[event.index] = event.reason

    @property
    def usage(self) -> dict[str, int]:
        read = sum(map(len, self.asked.prompts))
        return {"prompt_tokens": read, "completion_tokens": self.written, "total_tokens": read + self.written}

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is complete."""
        choices = []
        for index in range(self.choices):
            text = "".join(self.texts.get(index, ()))
            content = {"message": {"role": "assistant", "content": text}} if self.asked.chat else {"text": text}
            logprobs = self._logprobs(self.tokens.get(index, []))
            choices.append({"index": index, **content, "logprobs": logprobs, "finish_reason": self.reasons[index]})
        kind = "chat.completion" if self.asked.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, "usage": self.usage}

    def piece(self, event: Event) -> dict[str, Any]:
        """The chunk for an event of a stream."""
        if self.asked.chat:
            content: dict[str, object] = {"delta": {"content": event.text} if event.text else {}}
        else:
            content = {"text": event.text}
        return self._chunk([self._choice(event.index, content, self._logprobs(event.tokens), event.reason)])

    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk of a chat answer: who speaks."""
        return self._chunk([self._choice(index, {"delta": {"role": "assistant", "content": ""}}, None, None)])

    def closing(self) -> dict[str, Any]:
        """The chunk with the usage, after all others."""
        return {**self._chunk([]), "usage": self.usage}

    def _chunk(self, choices: list[dict[str, object]]) -> dict[str, object]:
        kind = "chat.completion.chunk" if self.asked.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices}

    @staticmethod
    def _choice(index: int, content: dict[str, object], logprobs: object, reason: str | None) -> dict[str, object]:
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: list[Chosen] | tuple[Chosen, ...]) -> dict[str, object] | None:
        if self.asked.sampling.logprobs is None:
            return None
        if self.asked.chat:
            return {"content": [self._entry(t.token, t.logprob) | {"top_logprobs": self._top(t)} for t in tokens]}
        # Of several tokens that look the same (parts of characters) the likeliest counts, which comes first.
        top = [{self._shown(token): value for token, value in reversed(t.top)} for t in tokens]
        texts = [self._shown(t.token) for t in tokens]
        return {"tokens": texts, "token_logprobs": [t.logprob for t in tokens], "top_logprobs": top, "text_offset": []}

    def _top(self, chosen: Chosen) -> list[dict[str, object]]:
        return [self._entry(token, value) for token, value in chosen.top]

    def _entry(self, token: int, logprob: float | None) -> dict[str, object]:
        text = self._shown(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _shown(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))

"""Tokens as text while they come: only whole characters go out, and nothing that may become a stop string."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

WINDOW = 8  # tokens decoded before the new ones, for tokenizers whose text depends on what stood before


class Transcript:
    """The text of one answer. stop: strings that end it and are not part of it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens: list[int] = []
        self._read = 0  # tokens whose text is in `text`
        self.text = ""
        self.sent = 0
        self.stopped = False

    def add(self, token: int) -> str:
        """Take up a token; returns the text that is certain by now and was not returned before."""
        self._tokens.append(token)
        return self._advance(held=max((len(s) for s in self._stop), default=1) - 1, last=False)

    def finish(self) -> str:
        """The rest, when no token comes any more."""
        return "" if self.stopped else self._advance(held=0, last=True)

    def _advance(self, held: int, last: bool) -> str:
        start = max(0, self._read - WINDOW)
        before, now = self._decode(start, self._read), self._decode(start, len(self._tokens))
        if last or not now.endswith("\ufffd"):  # else the bytes of a character are not all there
            self.text += now[len(before) :]
            self._read = len(self._tokens)
        found = [at for s in self._stop if (at := self.text.find(s, max(0, self.sent - len(s)))) >= 0]
        if found:
            self.text, self.stopped, held = self.text[: min(found)], True, 0
        end = max(self.sent, len(self.text) - held)
        new, self.sent = self.text[self.sent : end], end
        return new

    def _decode(self, start: int, stop: int) -> str:
        decoded = self._tokenizer.decode(
            self._tokens[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(decoded)

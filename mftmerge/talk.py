"""One prompt, the answers of a model and of its masks beside each other: masks are switched in memory, words stream."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer

from mftmerge.chat import Chat
from mftmerge.errors import BadInput
from mftmerge.live import attach
from mftmerge.mask import Mask

BASE = "base"


class Talk:
    """A conversation for each of several masks over one model, and one for the model itself (`base`).

    Every mask sees its own answers of before. `shown` are those that answer the next prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        masks: Mapping[str, Mask | str | Path],
        *,
        max_new_tokens: int = 200,
        base: str | None = None,
    ) -> None:
        if BASE in masks:
            raise BadInput(f"a mask is called {BASE!r}, as the model itself is; name it otherwise (NAME=FILE)")
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.switcher = attach(model, masks, base=base) if masks else None
        self.names = (BASE, *masks)
        self.shown: tuple[str, ...] = self.names
        self.said: dict[str, list[dict[str, str]]] = {name: [] for name in self.names}

    def show(self, names: Sequence[str]) -> None:
        """Let only these answer from now on; none means all. Raises BadInput for a name that there is not."""
        for name in names:
            if name not in self.names:
                raise BadInput(f"there is no {name!r}; there are {', '.join(self.names)}")
        self.shown = tuple(names) or self.names

    def forget(self) -> None:
        """Begin new conversations."""
        self.said = {name: [] for name in self.names}

    def answers(self, prompt: str) -> Iterator[tuple[str, str]]:
        """(mask, next piece of its answer), one mask after the other, as the words come; greedy decoding."""
        for name in self.shown:
            chat = [*self.said[name], {"role": "user", "content": prompt}]
            whole = ""
            for piece in self._stream(name, chat):
                whole += piece
                yield name, piece
            self.said[name] = [*chat, {"role": "assistant", "content": whole.strip()}]

    def _stream(self, name: str, chat: list[dict[str, str]]) -> Iterator[str]:
        tokens = self._tokens(chat).to(self.model.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        if self.switcher is not None:
            self.switcher.switch(None if name == BASE else name)
        failed: list[BaseException] = []
        generate: Any = self.model.generate  # torch's modules have attributes of any kind

        def work() -> None:
            try:
                generate(
                    **tokens,
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    streamer=streamer,
                    pad_token_id=self.tokenizer.eos_token_id,
                )
            except BaseException as e:  # said in the thread that listens
                failed.append(e)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        yield from streamer
        thread.join()
        if failed:
            raise failed[0]

    def _tokens(self, chat: list[dict[str, str]]) -> BatchEncoding:
        if self.tokenizer.chat_template is None:  # no chat model: the words alone
            text = "\n".join(message["content"] for message in chat)
            return self.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        text = Chat(self.tokenizer, "the prompt").prompt(chat)
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)

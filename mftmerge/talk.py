"""One prompt, the answers of a model and of its masks beside each other: masks are switched in memory, words stream."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer

from mftmerge.chat import Chat, prompt_ids
from mftmerge.errors import BadInput
from mftmerge.live import attach
from mftmerge.loading import GREEDY, ends
from mftmerge.loss import positions
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
        """(mask, next piece of its answer), one mask after the other, as the words come; greedy decoding.

        An answer ends where `eval` and `serve` end it, and at the last of the model's positions. Raises BadInput for a
        prompt that is empty, no text, or longer than the model's positions.
        """
        for name in self.shown:
            chat = [*self.said[name], {"role": "user", "content": prompt}]
            whole = ""
            for piece in self._stream(name, chat):
                whole += piece
                yield name, piece
            self.said[name] = [*chat, {"role": "assistant", "content": whole.strip()}]

    def _stream(self, name: str, chat: list[dict[str, str]]) -> Iterator[str]:
        ids = self._ids(chat)
        room = positions(self.model)
        most = self.max_new_tokens if room is None else min(self.max_new_tokens, room - len(ids))
        if most < 1:
            raise BadInput(f"{len(ids)} tokens fill the model's {room} positions; ask for less, or begin anew (/new)")
        tokens = torch.tensor([ids], device=self.model.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        if self.switcher is not None:
            self.switcher.switch(None if name == BASE else name)
        failed: list[BaseException] = []
        generate: Any = self.model.generate  # torch's modules have attributes of any kind

        def work() -> None:
            try:
                generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=most,
                    **GREEDY,
                    eos_token_id=ends(self.model, self.tokenizer) or None,
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

    def _ids(self, chat: list[dict[str, str]]) -> list[int]:
        """What the model reads. Raises BadInput where that is nothing, or no text."""
        if self.tokenizer.chat_template is None:  # no chat model: the words alone
            text = "\n".join(message["content"] for message in chat)
            ids = prompt_ids(self.tokenizer, text, special=True)
        else:
            ids = prompt_ids(self.tokenizer, Chat(self.tokenizer, "the prompt").prompt(chat), special=False)
        if not ids:
            raise BadInput("the prompt is empty; say something")
        return ids

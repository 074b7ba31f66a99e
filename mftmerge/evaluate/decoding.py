"""Greedy answers to many prompts at once, as fast as a CPU allows, and the same ones as one at a time.

Rows of like length go together; what all prompts of a batch begin with (a chat template, an instruction) runs once;
rows that have ended leave the batch, and a batch that grew beyond the budget is split. Where somebody knows what the
answer will probably be (another mask's answer, the one of the validation before), a single pass over this *draft*
checks it: it is the answer as far as every token is the most likely one, and only the rest is written token by token.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mftmerge.data import IGNORE
from mftmerge.loading import GREEDY
from mftmerge.loss import LOGITS, length_batches, logits_at, padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Ids = list[int]
GUESS = 32  # tokens of an answer, before any is known
LEAVING = 8  # ended rows leave once they are an eighth of a batch: taking them out copies the cache


@dataclass(frozen=True)
class Limits:
    """ends: tokens that end an answer (and belong to it). new_tokens: of an answer at most. pad: any token.

    batch_tokens: of all rows of a batch together, prompts and what has been written so far.
    """

    ends: Collection[int]
    new_tokens: int = 256
    pad: int = 0
    batch_tokens: int = 8192


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    *,
    drafts: Sequence[Sequence[int]] | None = None,
    done: Callable[[int, Ids], None] | None = None,
) -> list[Ids]:
    """The most likely next token, again and again: the answer's ids for each prompt, the end token included.

    model: a causal language model in evaluation mode. drafts: probable answers, which save time where they are right
    and change nothing where they are not (but for ties that rounding decides). done: called with the number of a
    prompt and its answer, as soon as it is known.
    """
    answers: list[Ids] = [[] for _ in prompts]
    if drafts is not None:
        checked = _confirmed(model, prompts, drafts, limits)
        answers = [list(a) for a in checked]
    waiting = []
    for i, answer in enumerate(answers):
        if _ended(answer, limits):
            if done:
                done(i, answer)
        else:
            waiting.append(i)
    own = bool(waiting) and _steps_itself(model, prompts)
    guess = min(GUESS, limits.new_tokens)
    finished = 0
    while waiting:
        lengths = [len(prompts[i]) + len(answers[i]) for i in waiting]
        batch = [waiting[i] for i in next(length_batches([n + guess for n in lengths], limits.batch_tokens))]
        if own:
            _write(model, prompts, answers, batch, limits)
        else:
            _write_with_transformers(model, prompts, answers, batch, limits)
        ended = [i for i in batch if _ended(answers[i], limits)]
        for i in ended:
            if done:
                done(i, answers[i])
        finished += len(ended)
        total = sum(len(a) for a in answers if _ended(a, limits))
        guess = max(1, total // finished) if finished else guess
        gone = set(ended)
        waiting = [i for i in waiting if i not in gone]
    return answers


def _ended(answer: Sequence[int], limits: Limits) -> bool:
    return len(answer) >= limits.new_tokens or (bool(answer) and answer[-1] in limits.ends)


def shared_start(texts: Sequence[Sequence[int]]) -> Ids:
    """The tokens that all texts begin with."""
    columns = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*texts, strict=False))
    return [tokens[0] for tokens in columns]


# -- token by token ---------------------------------------------------------------------------------------------------


def _steps_itself(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> bool:
    """Whether the model takes positions and keeps keys and values of the plain kind, which can be cut by rows."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    cache = getattr(
        model(input_ids=torch.tensor([list(prompts[0][:1])], device=model.device), use_cache=True),
        "past_key_values",
        None,
    )
    return type(cache) is DynamicCache and all(
        type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in cache.layers
    )


def _write(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], answers: list[Ids], batch: list[int], limits: Limits
) -> None:
    """Write a batch's answers until all have ended, or until it must be split: then some have not, and come again."""
    texts = [[*prompts[i], *answers[i]] for i in batch]
    width, start = max(map(len, texts)), shared_start(texts)[: min(map(len, texts)) - 1] if len(texts) > 1 else []
    # On the left, so that the last column holds every row's last token: (rows, longest text).
    ids = torch.full((len(texts), width), limits.pad)
    seen = torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, width - len(text) :] = torch.tensor(text)
        seen[row, width - len(text) :] = 1
    ids, seen = ids.to(model.device), seen.to(model.device)
    cache = _shared(model, start, [width - len(text) for text in texts]) if start else None
    ids = ids[:, len(start) :]
    here = list(batch)
    while True:
        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        wanted = torch.zeros_like(ids, dtype=torch.bool)
        wanted[:, -1] = True
        with logits_at(model, wanted):
            out = model(
                input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True
            )
        cache = out.past_key_values
        logits = out.logits[0] if out.logits.shape[0] == 1 and len(here) > 1 else out.logits[:, -1]
        best = logits.argmax(-1)  # (rows,)
        live = []
        for row, token in enumerate(best.tolist()):
            if not _ended(answers[here[row]], limits):
                answers[here[row]].append(token)
                if not _ended(answers[here[row]], limits):
                    live.append(row)
        if not live:
            return
        if len(live) > 1 and len(live) * (seen.shape[1] + 1) > limits.batch_tokens:
            live = live[: len(live) // 2]  # the others wait: their keys and values would stay in memory
        if len(here) - len(live) >= max(1, len(here) // LEAVING):
            at = torch.tensor(live, device=model.device)
            cache.batch_select_indices(at)
            best, seen, here = best[at], seen[at], [here[row] for row in live]
        ids = best[:, None]
        seen = torch.cat([seen, torch.ones_like(ids)], 1)


def _shared(model: PreTrainedModel, start: Ids, pads: Sequence[int]) -> DynamicCache:
    """The keys and values of the first `len(start)` columns of rows that begin with so many pads and then with `start`.

    A row's pads push the end of `start` out of these columns: those tokens run again, where pads would run otherwise.
    With the pads behind `start` instead, nothing would run twice, but they would take up places in a sliding window,
    which counts columns.
    """
    length = len(start)
    ids = torch.tensor([start], device=model.device)
    # All keys are kept, where the model's own kind of cache would drop those that have left the window already.
    cache = DynamicCache()
    with logits_at(model, torch.arange(length, device=model.device)[None] == length - 1):
        model(input_ids=ids, past_key_values=cache, use_cache=True)

    def moved(x: Tensor) -> Tensor:
        """(1, heads, length, size) -> (rows, heads, length, size), a row's behind its pads."""
        rows = x.new_empty(len(pads), *x.shape[1:])
        for row, pad in zip(rows, pads, strict=True):
            row[:, :pad] = 0
            row[:, pad:] = x[0, :, : max(0, length - pad)]
        return rows

    windows = DynamicCache(config=model.config)
    for number, layer in enumerate(cast("list[DynamicLayer]", cache.layers)):
        if layer.keys is None or layer.values is None:
            continue  # it shares those of another layer
        layer.keys, layer.values = moved(layer.keys), moved(layer.values)
        if any(windows.is_sliding):
            windows.update(layer.keys, layer.values, number)
    return windows if any(windows.is_sliding) else cache


def _write_with_transformers(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], answers: list[Ids], batch: list[int], limits: Limits
) -> None:
    """The same with `generate`, for models whose state is not plain keys and values."""
    texts = [[*prompts[i], *answers[i]] for i in batch]
    width = max(map(len, texts))
    ids = torch.full((len(batch), width), limits.pad)
    seen = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, width - len(text) :] = torch.tensor(text)
        seen[row, width - len(text) :] = 1
    settings = GenerationConfig(
        **GREEDY,
        max_new_tokens=limits.new_tokens,
        eos_token_id=sorted(limits.ends) or None,
        pad_token_id=limits.pad,
    )
    generate = cast("Callable[..., torch.Tensor]", model.generate)  # mixed in, so that its type is not known
    written = generate(ids.to(model.device), attention_mask=seen.to(model.device), generation_config=settings)
    for i, row in zip(batch, written[:, width:].tolist(), strict=True):
        for token in row:
            if not _ended(answers[i], limits):
                answers[i].append(token)


# -- drafts -----------------------------------------------------------------------------------------------------------


def _confirmed(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], drafts: Sequence[Sequence[int]], limits: Limits
) -> list[Ids]:
    """Of each draft what the model would have written too, and its next token where it would have gone on otherwise."""
    drafts = [list(d)[: limits.new_tokens] for d in drafts]
    rows = [{"input_ids": [*p, *d], "labels": [*[IGNORE] * len(p), *d]} for p, d in zip(prompts, drafts, strict=True)]
    found: list[Ids] = [[] for _ in rows]
    vocabulary = model.config.get_text_config().vocab_size
    lengths = [len(row["input_ids"]) for row in rows]
    some = [i for i in range(len(rows)) if drafts[i]]
    for batch in length_batches(
        [lengths[i] for i in some], limits.batch_tokens, [len(drafts[i]) for i in some], LOGITS // vocabulary
    ):
        places = [some[i] for i in batch]
        ids, labels, seen = padded([rows[i] for i in places], model.device)
        wanted = torch.zeros_like(labels, dtype=torch.bool)
        wanted[:, :-1] = labels[:, 1:] != IGNORE
        with logits_at(model, wanted):
            logits: Tensor = model(input_ids=ids, attention_mask=seen, use_cache=False).logits
        best = (logits[wanted] if logits.shape[:2] == ids.shape else logits[0]).argmax(-1)
        for i, own in zip(places, best.split([len(drafts[i]) for i in places]), strict=True):
            for token, draft in zip(own.tolist(), drafts[i], strict=True):
                found[i].append(token)
                if token != draft or token in limits.ends:
                    break
    return found

"""Tokenised rows in batches: padded, or packed one after the other, and whether a model keeps packed rows apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from transformers import PreTrainedModel

from mftmerge.data import IGNORE, Tokens
from mftmerge.loss import length_batches, padded, token_losses

Batch = dict[str, Any]  # input_ids and labels, (rows, length), and what else the model's forward takes
Pack = dict[str, list[int]]  # as Tokens, of several rows, with their seq_lengths
# Padded tokens of a pass on a CPU, which products of a few hundred rows keep busy. A GPU wants whole batches; and where
# parameters are sharded all ranks must run as many passes.
PASS_TOKENS = 512
# What attention with variable lengths and recurrent layers need to know, besides positions, of where rows begin.
_BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def pack(rows: Sequence[Tokens], length: int) -> list[Pack]:
    """Rows put together into sequences of at most `length` tokens, best fit first, none cut in two."""
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    return list(pack_dataset(Dataset.from_list([dict(r) for r in rows]), length, "bfd"))


def loader(
    model: PreTrainedModel,
    rows: Sequence[Tokens] | Sequence[Pack],
    size: int,
    fill: int,
    pass_tokens: int | None = None,
) -> DataLoader[Any]:
    """Batches of `size` rows or packs, in an order that the seed decides, each as a list of the passes it is run in.

    pass_tokens: rows of like length go through the model together, at most so many padded tokens at a time; the step
    takes the same rows, and what is left of padding is a few per cent of their tokens. None: one pass a batch.
    """

    def collate(batch: list[Any]) -> list[Batch]:
        if "seq_lengths" in batch[0]:
            return [joined(model, batch, fill)]
        if pass_tokens is None:
            return [_padded(batch, fill)]
        parts = length_batches([len(row["input_ids"]) for row in batch], pass_tokens)
        return [_padded([batch[i] for i in part], fill) for part in parts]

    return shuffled(rows, size, collate)


def shuffled(rows: Sequence[object], size: int, collate: Callable[[list[Any]], object]) -> DataLoader[Any]:
    """Batches of `size` items in an order that the seed decides."""
    known = cast("Dataset[Any]", rows)  # whatever has a length and items will do
    return DataLoader(known, size, sampler=RandomSampler(rows), collate_fn=collate)


def _padded(rows: list[Tokens], fill: int) -> Batch:
    ids, labels, _ = padded(rows, fill=fill)  # padding is on the right: a causal model never looks there
    return {"input_ids": ids, "labels": labels}


def joined(model: PreTrainedModel, packs: list[Pack], fill: int) -> Batch:
    """Packs as one sequence, with where each row begins in all the ways that the model can be told."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    whole = DataCollatorForLanguageModeling(fill, padding_free=True)(packs)
    known = inspect.signature(model.forward).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in known.values())
    names = ("input_ids", "labels", "position_ids", *(n for n in _BORDERS if anything or n in known))
    return {n: whole[n] for n in names if n in whole}


def row_numbers(batch: Batch) -> Tensor:
    """For each position of a batch the number of its row: (rows, length)."""
    if "position_ids" in batch:
        return (batch["position_ids"] == 0).cumsum(1)
    ids: Tensor = batch["input_ids"]
    return torch.arange(len(ids), device=ids.device)[:, None].expand(ids.shape)


def labelled_rows(batch: Batch) -> Tensor:
    """How many rows of a batch have a label that a loss sees."""
    wanted = batch["labels"][:, 1:] != IGNORE
    return torch.tensor(row_numbers(batch)[:, 1:][wanted].unique().numel(), device=wanted.device)


def row_shares(rows: Tensor) -> Tensor:
    """For each labelled token, given the number of its row, what it counts when every row counts 1."""
    return 1.0 / rows.bincount()[rows]


def leak(model: PreTrainedModel, packs: Sequence[Pack], fill: int) -> str:
    """Why rows must not be packed for this model: packed, their tokens have other losses than apart. "" where not.

    Tried on the first pack of several rows. State that goes from row to row, or attention across them, shows in the
    gradient: the last row's loss must not depend on the tokens before it, and then that is exactly 0 in any type of
    numbers. Other positions show in the losses.
    """
    several = next((p for p in packs if len(p["seq_lengths"]) > 1), None)
    if several is None:
        return ""
    training = model.training
    model.eval()
    try:
        return _reaches(model, several, fill) or _differs(model, several, fill)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # whatever a model's own code raises for inputs that it does not know
        return (str(e).splitlines() or [type(e).__name__])[0]
    finally:
        model.train(training)


def _packed(model: PreTrainedModel, several: Pack, fill: int) -> tuple[Tensor, Tensor]:
    """The token losses of a pack, and the numbers of their rows."""
    given = joined(model, [several], fill)
    batch: dict[str, Any] = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in given.items()}
    numbers = row_numbers(batch)
    losses, wanted = token_losses(model, batch.pop("input_ids"), batch.pop("labels"), **batch)
    return losses, numbers[wanted]


def _reaches(model: PreTrainedModel, several: Pack, fill: int) -> str:
    """Whether the last row's loss depends on the rows before it, by the gradient of their embeddings."""
    seen: list[Tensor] = []

    def watch(_: torch.nn.Module, __: object, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    hook = model.get_input_embeddings().register_forward_hook(watch)
    try:
        with torch.enable_grad():
            losses, numbers = _packed(model, several, fill)
            (gradient,) = torch.autograd.grad(losses[numbers == numbers.max()].sum(), seen[:1], allow_unused=True)
    finally:
        hook.remove()
    before = gradient[:, : -several["seq_lengths"][-1]] if gradient is not None else torch.zeros(1)
    return "the loss of a row depends on the rows before it" if bool(before.abs().max() > 0) else ""


@torch.no_grad()
def _differs(model: PreTrainedModel, several: Pack, fill: int) -> str:
    """Whether packed rows have other losses than apart, beyond rounding."""
    together, _ = _packed(model, several, fill)
    apart, at = [], 0
    for length in several["seq_lengths"]:
        ids, labels = (several[k][at : at + length] for k in ("input_ids", "labels"))
        apart.append(token_losses(model, *(torch.tensor([x], device=model.device) for x in (ids, labels)))[0])
        at += length
    separate = torch.cat(apart)
    difference = (together - separate).abs()
    exact = model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)
    same = bool(difference.max() <= 1e-4) if exact else bool(difference.mean() <= 0.05)
    return "" if same else f"loss {float(together.mean()):.4f} packed, {float(separate.mean()):.4f} apart"

"""Held-out loss of a model, row by row, so that every comparison can be a paired one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from mftmerge.data import IGNORE, Tokens
from mftmerge.errors import MftmergeError
from mftmerge.evaluate.pairing import Values
from mftmerge.prefix import logits_at

LOGITS = 1 << 26  # logits that exist at one time (256 MB in float32); a batch has at least one row
PIECE = 256  # positions whose float32 softmax exists at one time


@torch.no_grad()
def row_losses(model: Any, rows: Sequence[Tokens], *, batch_tokens: int = 4096) -> Values:
    """Loss of each row: float64 array of shape (rows, 2), the sum of its token losses in nats and its labelled tokens.

    rows: as `data.tokenize` gives them, `{"input_ids": [...], "labels": [...]}` with -100 where there is no loss.
    batch_tokens: padded tokens in one forward pass; rows go through longest first, so that padding is short and a
    lack of memory shows at once.

    Logits are computed only where there is a label, and the softmax in float32 whatever the model's dtype.
    """
    result = np.zeros((len(rows), 2))
    lengths, labelled = [len(row["input_ids"]) for row in rows], [_labelled(row) for row in rows]
    vocabulary = model.get_output_embeddings().weight.shape[0]
    with _evaluating(model):
        for batch in length_batches(lengths, batch_tokens, labelled, LOGITS // vocabulary):
            ids, attention, labels = _padded([rows[i] for i in batch], model.device)
            wanted = labels != IGNORE
            with logits_at(model, wanted):
                logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[0]
            pieces = zip(logits.split(PIECE), labels[wanted].split(PIECE), strict=True)
            losses = torch.cat([cross_entropy(x.float(), target, reduction="none") for x, target in pieces])
            place = torch.as_tensor(batch, device=ids.device)[wanted.nonzero()[:, 0]].cpu().numpy()
            result[:, 0] += np.bincount(place, losses.double().cpu().numpy(), len(rows))
            result[:, 1] += np.bincount(place, minlength=len(rows))
    if not np.isfinite(result).all():
        raise MftmergeError(
            f"the loss of row {int(np.argmin(np.isfinite(result[:, 0]))) + 1} is not finite; "
            "check the model's weights, or load it in float32"
        )
    return result


def length_batches(
    lengths: Sequence[int], batch_tokens: int, costs: Sequence[int] | None = None, most: int = 0
) -> Iterator[list[int]]:
    """Indices of rows, longest first, in batches of at most `batch_tokens` padded tokens (at least one row).

    costs, most: a second limit, on the sum of the rows' costs.
    """
    batch: list[int] = []
    cost = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        more = costs[i] if costs else 0
        if batch and ((len(batch) + 1) * lengths[batch[0]] > batch_tokens or cost + more > most):
            yield batch
            batch, cost = [], 0
        batch.append(i)
        cost += more
    if batch:
        yield batch


def _labelled(row: Tokens) -> int:
    return sum(label != IGNORE for label in row["labels"][1:])


def _padded(rows: Sequence[Tokens], device: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask and next-token labels (label i is the token after position i), padded on the right."""
    width = max(len(r["input_ids"]) for r in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    attention, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        ids[i, :n] = torch.tensor(row["input_ids"])
        attention[i, :n] = 1
        labels[i, : n - 1] = torch.tensor(row["labels"][1:], dtype=torch.long)
    return ids.to(device), attention.to(device), labels.to(device)


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode (no dropout) inside, the mode from before afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

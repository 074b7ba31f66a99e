"""The loss of a model on rows, in one place: training, validation, evaluation and Taylor evidence all use it.

A token's loss is the cross entropy in nats of the token that follows a position. Logits are computed only where there
is a label, and the softmax in float32 whatever the model's dtype.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from mftmerge.data import IGNORE, Tokens
from mftmerge.errors import BadInput, MftmergeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Losses = npt.NDArray[np.float64]  # (rows, 2): the sum of a row's token losses, and how many there are
Told = Callable[[int], None]

LOGITS = 1 << 26  # logits that exist at one time (256 MB in float32); a batch has at least one row
PIECE = 256  # positions whose float32 softmax exists at one time


@contextlib.contextmanager
def logits_at(model: PreTrainedModel, wanted: Tensor) -> Iterator[None]:
    """Inside the block the model's head sees only the positions where `wanted` (batch, length) is True.

    `model(...).logits` then has shape (1, number wanted, vocabulary), in row-major order, with whatever the model does
    after its head (scaling, soft capping). The head is the largest product of a small model, and most positions of a
    chat have no label.
    """

    def select(_: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        if args[0].shape[:-1] != wanted.shape:
            return None  # a head that sees something else beside the positions (ProphetNet's streams): all of it
        return (args[0][wanted][None],)  # (batch, length, hidden) -> (1, number wanted, hidden)

    head = model.get_output_embeddings()
    if head is None:
        yield  # all logits are computed
        return
    hook = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


def token_losses(
    model: PreTrainedModel, ids: Tensor, labels: Tensor, *, call: torch.nn.Module | None = None, **inputs: object
) -> tuple[Tensor, Tensor]:
    """The loss of every labelled token, float32 (number labelled,), and their positions, booleans (batch, length).

    Arguments as for `labelled_logits`.
    """
    logits, targets, wanted = labelled_logits(model, ids, labels, call=call, **inputs)
    return losses_of(logits, targets), wanted


def losses_of(logits: Tensor, targets: Tensor) -> Tensor:
    """The losses of `labelled_logits`, float32 (number labelled,)."""
    # In pieces, so that never more than a few hundred positions' logits exist in float32 without a gradient to carry.
    pieces = zip(logits.split(PIECE), targets.split(PIECE), strict=True)
    return torch.cat([cross_entropy(x.float(), target, reduction="none") for x, target in pieces])


def labelled_logits(
    model: PreTrainedModel, ids: Tensor, labels: Tensor, *, call: torch.nn.Module | None = None, **inputs: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (number labelled, vocabulary) where a labelled token is to be predicted, these tokens, and the positions,
    booleans (batch, length), in row-major order.

    ids, labels: shape (batch, length); label i belongs to token i and is what position i - 1 is to predict, so that a
    label at position 0 takes no part. call: the wrapper to call (DDP) where it is not the model itself.
    inputs: what else the model's forward takes, such as `position_ids`.
    """
    following = pad(labels[:, 1:], (0, 1), value=IGNORE)
    wanted = following != IGNORE
    with logits_at(model, wanted):
        logits = (call or model)(input_ids=ids, use_cache=False, **inputs).logits
    # The last position has no label, so that the two shapes are never the same.
    return logits[wanted] if logits.shape[:2] == ids.shape else logits[0], following[wanted], wanted


@torch.no_grad()
def row_losses(
    model: PreTrainedModel, rows: Sequence[Tokens], *, batch_tokens: int = 4096, told: Told | None = None
) -> Losses:
    """Loss of each row: float64 array of shape (rows, 2), the sum of its token losses in nats and its labelled tokens.

    rows: as `data.tokenize` gives them, `{"input_ids": [...], "labels": [...]}` with -100 where there is no loss.
    batch_tokens: padded tokens in one forward pass; rows go through longest first, so that padding is short and a
    lack of memory shows at once. told: called with the number of rows that are done, after each pass.
    Raises MftmergeError, with the row, where a loss is not finite.
    """
    result = np.zeros((len(rows), 2))
    lengths = [len(row["input_ids"]) for row in rows]
    labelled = [sum(label != IGNORE for label in row["labels"][1:]) for row in rows]
    vocabulary = model.config.get_text_config().vocab_size
    done = 0
    with evaluating(model):
        for batch in length_batches(lengths, batch_tokens, labelled, LOGITS // vocabulary):
            ids, labels, attention = padded([rows[i] for i in batch], model.device)
            losses, wanted = token_losses(model, ids, labels, attention_mask=attention)
            place = torch.as_tensor(batch, device=ids.device)[wanted.nonzero()[:, 0]].cpu().numpy()
            result[:, 0] += np.bincount(place, losses.double().cpu().numpy(), len(rows))
            result[:, 1] += np.bincount(place, minlength=len(rows))
            done += len(batch)
            if told:
                told(done)
    if not np.isfinite(result).all():
        raise MftmergeError(
            f"the loss of row {int(np.argmin(np.isfinite(result[:, 0]))) + 1} is not finite; "
            "check the model's weights, or load it in float32"
        )
    return result


def fitted(rows: Sequence[Tokens], model: PreTrainedModel) -> tuple[list[Tokens], int]:
    """Rows cut to the positions that the model has, and how many were longer.

    Raises BadInput for a token that its embeddings do not have: on a GPU that would end the process.
    """
    weight = getattr(model.get_input_embeddings(), "weight", None)
    size = math.inf if weight is None else weight.shape[0]
    for number, row in enumerate(rows, 1):
        if max(row["input_ids"]) >= size:
            raise BadInput(
                f"row {number}: token number {max(row['input_ids'])} is not in the model, whose embeddings have {size} "
                "tokens; "
                "use the model's own tokenizer, or enlarge the model (resize_token_embeddings)"
            )
    room = positions(model)
    kept = rows if room is None else [{k: v[:room] for k, v in row.items()} for row in rows]
    kept = [row for row in kept if any(label != IGNORE for label in row["labels"][1:])]
    longer = 0 if room is None else sum(len(row["input_ids"]) > room for row in rows)
    if rows and not kept:
        raise BadInput(f"no row has an assistant token within the model's {room} positions; check the rows")
    return list(kept), longer


def positions(model: PreTrainedModel) -> int | None:
    """How many positions a model was made for; None where nothing limits them."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def mean_loss(losses: Losses) -> float:
    """Nats a token over all rows."""
    return float(losses[:, 0].sum() / losses[:, 1].sum())


def padded(rows: Sequence[Tokens], device: torch.device | str = "cpu", fill: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels (-100 in the padding) and attention mask of rows, each (rows, longest), padded on the right."""
    width = max(len(r["input_ids"]) for r in rows)
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    labels, attention = torch.full_like(ids, IGNORE), torch.zeros_like(ids)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        ids[i, :n] = torch.tensor(row["input_ids"])
        labels[i, :n] = torch.tensor(row["labels"])
        attention[i, :n] = 1
    return ids.to(device), labels.to(device), attention.to(device)


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


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside, the mode from before afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

"""Held-out loss of a model under several masks: per row, so that every comparison can be a paired one."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from mftmerge.data import IGNORE, Tokens, digest
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.evaluate.pairing import PairedDifference, Values, bootstrap, mean, paired
from mftmerge.evaluate.results import LOSS, GridResult
from mftmerge.masks.mask import Mask
from mftmerge.models.layers import decoder_layers
from mftmerge.models.live import attach
from mftmerge.prefix import PrefixCache, logits_at

if TYPE_CHECKING:
    from mftmerge.evaluate.generation import Marks

__all__ = ["GridResult", "PairedDifference", "Scorer", "bootstrap", "grid", "mean", "paired", "row_losses"]

LOGITS = 1 << 26  # logits that exist at one time (256 MB in float32); a batch has at least one row
PIECE = 256  # positions whose float32 softmax exists at one time

# What else is measured of the (masked) model on the rows of one domain, higher is better; see `generation.marker`.
Scorer = Callable[[Any], "Marks"]


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


def grid(
    model: Any,
    masks: Mapping[str, Mask],
    domains: Mapping[str, Sequence[Tokens]],
    *,
    reference: str | None = None,
    name: str = "base",
    scorers: Mapping[str, Scorer] | None = None,
    others: Mapping[str, Callable[[Any], Any]] | None = None,
    batch_tokens: int = 4096,
    prefix: bool | None = None,
    progress: Callable[[str], None] | None = None,
) -> GridResult:
    """Measure a model without mask and under each mask on every domain.

    model: a loaded transformers model; masks are switched in memory and it is left as it was.
    masks: name -> mask, one row of the table each, after the row `name` of the model itself.
    domains: name -> tokenised rows. reference: the row that differences are taken against, the model itself by default.
    scorers: domain -> function of the model that gives `generation.Marks`, for what is not a loss.
    others: name -> function of the model; what it gives for each row is kept in the result's `extra[name][row]`.
    prefix: run the layers below the first masked one only once a data row (see `mftmerge.prefix`). By default on a CPU:
    rows then go through these layers one at a time, which a GPU does not like.
    progress: called with "row, domain" before each measurement.

    Raises BadInput for an unknown reference, two rows of one name, or a mask that does not fit the model.
    """
    if name in masks:
        raise BadInput(f"two rows are called {name!r}; name the mask otherwise (NAME=FILE)")
    if reference not in (None, name, *masks):
        raise BadInput(f"reference {reference!r} is not one of the rows {[name, *masks]}")
    if not domains:
        raise BadInput("nothing to evaluate on: no domain given")
    base = model_facts(model)
    result = GridResult(
        models={name: base} | {row: base | mask_facts(mask) for row, mask in masks.items()},
        domains={d: {"rows": len(rows), "digest": digest(rows)} for d, rows in domains.items()},
        cells={},
        reference=reference or name,
        versions=versions(),
    )
    once = model.device.type == "cpu" if prefix is None else prefix
    shared = _shared_layers(model, masks, domains) if once and masks else contextlib.nullcontext()
    with _switches(model, masks) as use, shared:
        for row in result.models:
            with use(row):
                for domain, rows in domains.items():
                    if progress:
                        progress(f"{row}, {domain}")
                    result.cells[row, domain, LOSS] = row_losses(model, rows, batch_tokens=batch_tokens)
                    if scorers and domain in scorers:
                        _keep_marks(result, row, domain, scorers[domain](model))
                for what, measure in (others or {}).items():
                    result.extra.setdefault(what, {})[row] = measure(model)
    return result


def _keep_marks(result: GridResult, row: str, domain: str, marks: Marks) -> None:
    result.cells |= {(row, domain, metric): values for metric, values in marks.metrics.items()}
    result.extra.setdefault("answers", {}).setdefault(row, {})[domain] = marks.answers
    result.domains[domain]["remarks"] = marks.remarks


@contextlib.contextmanager
def _switches(model: Any, masks: Mapping[str, Mask]) -> Iterator[Callable[[str], AbstractContextManager[Any]]]:
    """Gives a function: row of the table -> context in which the model has that row's mask, or none."""
    if not masks:
        yield lambda row: contextlib.nullcontext()
        return
    switcher = attach(model, masks)
    try:
        yield lambda row: switcher.use(row if row in masks else None)
    finally:
        switcher.detach()


def _shared_layers(
    model: Any, masks: Mapping[str, Mask], domains: Mapping[str, Sequence[Tokens]]
) -> AbstractContextManager[Any]:
    cache = PrefixCache(model, first_masked_layer(model, masks))
    for rows in domains.values():
        cache.add(rows)
    return cache.use()


def first_masked_layer(model: Any, masks: Mapping[str, Mask]) -> int:
    """The lowest decoder layer that a mask covers; 0 as soon as one covers anything outside of the layers."""
    stack = decoder_layers(model)[0].rpartition(".")[2]
    found = [re.search(rf"(?:^|\.){re.escape(stack)}\.(\d+)\.", n) for mask in masks.values() for n in mask.names]
    return min((int(match[1]) if match else 0 for match in found), default=0)


def model_facts(model: Any) -> dict[str, Any]:
    """What identifies a row of the table: the model's reference, dtype, and a hash of its weights as loaded."""
    h = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(model.named_parameters()):
        h.update(f"{name}\0{tuple(parameter.shape)}\0{parameter.dtype}\0".encode())
        h.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    path = getattr(getattr(model, "config", None), "_name_or_path", "") or None
    return {"model": path, "dtype": str(model.dtype).removeprefix("torch."), "weights": h.hexdigest(), "mask": None}


def mask_facts(mask: Mask) -> dict[str, Any]:
    """A mask's digest and density, and where it says it came from."""
    return {"mask": mask.digest, "density": mask.density(), "operation": mask.info.operation}


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("mftmerge", "torch", "transformers", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found

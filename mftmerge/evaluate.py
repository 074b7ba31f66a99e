"""Held-out loss of a model under several masks: per row, so that every comparison can be a paired one."""

from __future__ import annotations

import contextlib
import hashlib
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from mftmerge.data import IGNORE, Tokens, digest
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.mask import Mask
from mftmerge.pairing import PairedDifference, Values, bootstrap, mean, paired
from mftmerge.results import Cell, GridResult

__all__ = ["GridResult", "PairedDifference", "Scorer", "bootstrap", "grid", "mean", "paired", "row_losses"]

PIECE = 256  # positions whose logits exist at one time: 50 MB of float32 for a vocabulary of 49152

# A further measurement of the (masked) model on the rows of one domain: shape (rows, 2), higher is better.
Scorer = Callable[[Any], Values]


@torch.no_grad()
def row_losses(model: Any, rows: Sequence[Tokens], *, batch_tokens: int = 4096) -> Values:
    """Loss of each row: float64 array of shape (rows, 2), the sum of its token losses in nats and its labelled tokens.

    rows: as `data.tokenize` gives them, `{"input_ids": [...], "labels": [...]}` with -100 where there is no loss.
    batch_tokens: padded tokens in one forward pass; rows go through longest first, so that padding is short and a
    lack of memory shows at once.

    Logits are computed only where there is a label, and the softmax in float32 whatever the model's dtype.
    """
    head = _Head(model, rows)
    result = np.zeros((len(rows), 2))
    with _evaluating(model):
        for batch in _batches(rows, batch_tokens):
            ids, attention, labels = _padded([rows[i] for i in batch], model.device)
            wanted = labels != IGNORE
            row, _ = wanted.nonzero(as_tuple=True)
            losses = head.losses(ids, attention, wanted, labels[wanted])
            place = torch.as_tensor(batch, device=row.device)[row].cpu().numpy()
            result[:, 0] += np.bincount(place, losses.double().cpu().numpy(), len(rows))
            result[:, 1] += np.bincount(place, minlength=len(rows))
    if not np.isfinite(result).all():
        raise MftmergeError(
            f"the loss of row {int(np.argmin(np.isfinite(result[:, 0]))) + 1} is not finite; "
            "check the model's weights, or load it in float32"
        )
    return result


def _batches(rows: Sequence[Tokens], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rows, longest first, in batches of at most `batch_tokens` padded tokens (at least one row)."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // max(1, len(rows[order[start]]["input_ids"])))
        yield order[start : start + count]
        start += count


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


class _Head:
    """From a batch to the losses at chosen positions.

    Most models are a body, one linear head and perhaps a soft cap. For these the head runs only where it is needed;
    first it is compared, on a few tokens, with the model's own logits. A model that does something else keeps its own
    forward.
    """

    def __init__(self, model: Any, rows: Sequence[Tokens]) -> None:
        self.model = model
        self.body = getattr(model, "base_model", None)
        self.output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.cap = getattr(text, "final_logit_softcapping", None)
        self.known = self.body is not None and self.body is not model and self.output is not None
        if self.known and rows:
            with _evaluating(model):
                self.known = self._agrees(rows[0]["input_ids"][:16])

    def _agrees(self, ids: Sequence[int]) -> bool:
        batch = torch.tensor([ids], device=self.model.device)
        everywhere = torch.ones_like(batch)
        expected = self.model(input_ids=batch, attention_mask=everywhere, use_cache=False).logits[0].float()
        try:
            found = self._logits(self._hidden(batch, everywhere)[0])
        except (AttributeError, RuntimeError, TypeError):
            return False
        rounding = 8 * torch.finfo(self.model.dtype).eps * expected.abs().max()
        return found.shape == expected.shape and bool((found - expected).abs().max() <= rounding)

    def _hidden(self, ids: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        assert self.body is not None
        return self.body(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.output is not None
        logits = self.output(hidden)
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits.float()

    def losses(
        self, ids: torch.Tensor, attention: torch.Tensor, wanted: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Loss at each wanted position, in row-major order: shape (number wanted,)."""
        if not self.known:
            logits = self.model(input_ids=ids, attention_mask=attention, use_cache=False).logits[wanted]
            pieces = [cross_entropy(x.float(), t, reduction="none") for x, t in _pieces(logits, targets)]
        else:
            hidden = self._hidden(ids, attention)[wanted]
            pieces = [cross_entropy(self._logits(x), t, reduction="none") for x, t in _pieces(hidden, targets)]
        return torch.cat(pieces)


def _pieces(values: torch.Tensor, targets: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(values.split(PIECE), targets.split(PIECE), strict=True)


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode (no dropout) inside, the mode from before afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def _masked(model: Any, mask: Mask) -> Iterator[None]:
    """The model under a mask; the weights come back bit for bit from a copy."""
    from mftmerge import naming

    parameters = dict(model.named_parameters())
    kept = naming.to_parameters(model, {n: torch.from_numpy(mask.kept(n).copy()) for n in mask.names}, fill=True)
    originals: dict[str, torch.Tensor] = {}
    try:
        with torch.no_grad():
            for name, bits in kept.items():
                weight = parameters[name].data
                originals[name] = weight.clone()
                weight.masked_fill_(~bits.to(weight.device), 0)
        yield
    finally:
        for name, original in originals.items():
            parameters[name].data.copy_(original)


def grid(
    model: Any,
    masks: Mapping[str, Mask],
    domains: Mapping[str, Sequence[Tokens]],
    *,
    reference: str = "base",
    name: str = "base",
    scorers: Mapping[str, Mapping[str, Scorer]] | None = None,
    batch_tokens: int = 4096,
    progress: Callable[[str], None] | None = None,
) -> GridResult:
    """Measure a model without mask and under each mask on every domain.

    model: a loaded transformers model; masks are switched in memory and it is left as it was.
    masks: name -> mask, one row of the table each, after the row `name` of the model itself.
    domains: name -> tokenised rows. reference: name of the row that differences are taken against.
    scorers: domain -> metric -> function of the model, for what is not a loss (see `generation`).
    progress: called with "row, domain" before each measurement.

    Raises BadInput for an unknown reference, two rows of one name, or a mask that does not fit the model.
    """
    if name in masks:
        raise BadInput(f"two rows are called {name!r}; name the mask otherwise (NAME=FILE)")
    if reference != name and reference not in masks:
        raise BadInput(f"reference {reference!r} is not one of the rows {[name, *masks]}")
    if not domains:
        raise BadInput("nothing to evaluate on: no domain given")
    described = {name: model_facts(model)}
    cells: dict[Cell, Values] = {}
    for row, mask in [(name, None), *masks.items()]:
        if mask is not None:
            described[row] = described[name] | mask_facts(mask)
        with _masked(model, mask) if mask is not None else contextlib.nullcontext():
            for domain, rows in domains.items():
                if progress:
                    progress(f"{row}, {domain}")
                cells[row, domain, "loss"] = row_losses(model, rows, batch_tokens=batch_tokens)
                for metric, score in ((scorers or {}).get(domain) or {}).items():
                    cells[row, domain, metric] = score(model)
    facts = {d: {"rows": len(rows), "digest": digest(rows)} for d, rows in domains.items()}
    return GridResult(models=described, domains=facts, cells=cells, reference=reference, versions=versions())


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

"""A model under several masks on the rows of several domains: the table of `mftmerge eval`."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mftmerge.contents import Contents
from mftmerge.data import Tokens, digest
from mftmerge.errors import BadInput
from mftmerge.evaluate.generation import Marker, Marks, ends
from mftmerge.evaluate.journal import Journal
from mftmerge.evaluate.pairing import Values
from mftmerge.evaluate.results import LOSS, GridResult
from mftmerge.live import attach
from mftmerge.loss import row_losses
from mftmerge.mask import Mask
from mftmerge.matching import delta_base
from mftmerge.naming import decoder_layers
from mftmerge.prefix import PrefixCache
from mftmerge.progress import Progress, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def grid(
    model: PreTrainedModel,
    masks: Mapping[str, Mask],
    domains: Mapping[str, Sequence[Tokens]],
    *,
    reference: str | None = None,
    name: str = "base",
    scorers: Mapping[str, Marker] | None = None,
    journal: Path | None = None,
    others: Mapping[str, Callable[[object], object]] | None = None,
    batch_tokens: int = 4096,
    prefix: bool | None = None,
    base: str | Path | None = None,
    known: Mapping[tuple[str, str, str], Values] | None = None,
    progress: Progress | None = None,
) -> GridResult:
    """Measure a model without mask and under each mask on every domain.

    model: a loaded transformers model; masks are switched in memory and it is left as it was.
    masks: name -> mask, one row of the table each, after the row `name` of the model itself.
    domains: name -> tokenised rows. reference: the row that differences are taken against, the model itself by default.
    scorers: domain -> what lets the model answer and marks the answers, for what is not a loss. journal: file that
    keeps the answers while the work goes on, and from which they are taken when it is done again.
    others: name -> function of the model; what it gives for each row is kept in the result's `extra[name][row]`.
    prefix: run the layers below the first masked one only once a data row (see `mftmerge.prefix`). By default on a CPU:
    rows then go through these layers one at a time, which a GPU does not like.
    base: model whose values dropped weights take, whatever the masks' headers say (see `live.attach`).
    known: (row, domain, metric) -> what was measured before; a row's domain that is in it is not measured again.
    progress: called as rows of data are done, and before each measurement.

    Raises BadInput for an unknown reference, two rows of one name, or a mask that does not fit the model.
    """
    if name in masks:
        raise BadInput(f"two rows are called {name!r}; name the mask otherwise (NAME=FILE)")
    if reference not in (None, name, *masks):
        raise BadInput(f"reference {reference!r} is not one of the rows {[name, *masks]}")
    if not domains:
        raise BadInput("nothing to evaluate on: no domain given")
    facts = model_facts(model)
    result = GridResult(
        models={name: facts} | {row: facts | mask_facts(mask) for row, mask in masks.items()},
        domains={d: {"rows": len(rows), "digest": digest(rows)} for d, rows in domains.items()},
        cells={},
        reference=reference or name,
        versions=versions(),
    )
    once = model.device.type == "cpu" if prefix is None else prefix
    cache = shared_layers(model, masks, domains) if once and masks else None
    contents = Contents()
    counted = _counter(f"evaluating {name}", len(result.models) * sum(map(len, domains.values())), progress)
    with _switches(model, masks, base) as use, cache.use() if cache else contextlib.nullcontext():
        for row in result.models:
            with use(row):
                for domain, rows in domains.items():
                    told = counted(len(rows), f"{row}, {domain}")
                    if found := {k: v for k, v in (known or {}).items() if k[:2] == (row, domain)}:
                        result.cells |= found
                        continue
                    result.cells[row, domain, LOSS] = row_losses(model, rows, batch_tokens=batch_tokens, told=told)
                    if scorer := (scorers or {}).get(domain):
                        answers = None
                        if journal:
                            to = dropped_facts(masks[row], base, contents) if row in masks else {}
                            stops = ends(model, scorer.tokenizer)
                            answers = Journal(journal, [result.models[row], to, stops, scorer.facts])
                        _keep_marks(result, row, domain, scorer(model, answers))
                        if cache:
                            cache.add(scorer.drafts)
                for what, measure in (others or {}).items():
                    result.extra.setdefault(what, {})[row] = measure(model)
    return result


def _counter(what: str, total: int, progress: Progress | None) -> Callable[[int, str], Callable[[int], None]]:
    """Gives a function: rows of the next measurement, its name -> what is called with those of them that are done."""
    before = 0

    def begin(rows: int, detail: str) -> Callable[[int], None]:
        nonlocal before
        start, before = before, before + rows

        def told(done: int) -> None:
            if progress:
                progress(Step(what, start + done, total, "rows", detail=detail))

        told(0)
        return told

    return begin


def _keep_marks(result: GridResult, row: str, domain: str, marks: Marks) -> None:
    result.cells |= {(row, domain, metric): values for metric, values in marks.metrics.items()}
    result.extra.setdefault("answers", {}).setdefault(row, {})[domain] = marks.answers
    result.domains[domain]["remarks"] = marks.remarks


@contextlib.contextmanager
def _switches(
    model: PreTrainedModel, masks: Mapping[str, Mask], base: str | Path | None
) -> Iterator[Callable[[str], AbstractContextManager[object]]]:
    """Gives a function: row of the table -> context in which the model has that row's mask, or none."""
    if not masks:
        yield lambda row: contextlib.nullcontext()
        return
    switcher = attach(model, masks, base=base)
    try:
        yield lambda row: switcher.use(row if row in masks else None)
    finally:
        switcher.detach()


def shared_layers(
    model: PreTrainedModel, masks: Mapping[str, Mask], domains: Mapping[str, Sequence[Tokens]]
) -> PrefixCache:
    """Hidden states below the first masked layer, for the rows of these domains."""
    cache = PrefixCache(model, first_masked_layer(model, masks))
    for rows in domains.values():
        cache.add(rows)
    return cache


def first_masked_layer(model: PreTrainedModel, masks: Mapping[str, Mask]) -> int:
    """The lowest decoder layer that a mask covers; 0 as soon as one covers anything outside of the layers."""
    stack = decoder_layers(model)[0].rpartition(".")[2]
    found = [re.search(rf"(?:^|\.){re.escape(stack)}\.(\d+)\.", n) for mask in masks.values() for n in mask.names]
    return min((int(match[1]) if match else 0 for match in found), default=0)


def model_facts(model: PreTrainedModel) -> dict[str, Any]:
    """What identifies a row of the table: the model's reference, dtype, and a hash of its weights as loaded."""
    h = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(model.named_parameters()):
        h.update(f"{name}\0{tuple(parameter.shape)}\0{parameter.dtype}\0".encode())
        h.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    path = getattr(getattr(model, "config", None), "_name_or_path", "") or None
    return {"model": path, "dtype": str(model.dtype).removeprefix("torch."), "weights": h.hexdigest(), "mask": None}


def mask_facts(mask: Mask) -> dict[str, Any]:
    """A mask's digest and density, and where it says it came from."""
    facts = {"mask": mask.digest, "density": mask.density(), "operation": mask.info.operation}
    return facts | ({"on": "delta", "delta_base": mask.info.delta_base} if mask.info.on == "delta" else {})


def dropped_facts(mask: Mask, base: str | Path | None, contents: Contents) -> dict[str, object]:
    """What identifies the values that dropped weights take, where these are not 0: digests of the model's files."""
    return contents.of_inputs(delta_base(mask, base, None))


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("mftmerge", "torch", "transformers", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found

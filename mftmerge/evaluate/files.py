"""Evaluate checkpoints and mask files on data files: what `mftmerge eval` does. Each model is loaded once."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mftmerge import data as rows_of
from mftmerge import matching
from mftmerge.checkpoint import Checkpoint
from mftmerge.errors import BadInput
from mftmerge.evaluate import generation, harness, sandbox
from mftmerge.evaluate import grid as grids
from mftmerge.evaluate.measures import Measures
from mftmerge.evaluate.results import GridResult
from mftmerge.loading import load_model, load_tokenizer, parts
from mftmerge.loss import fitted, positions
from mftmerge.mask import Mask
from mftmerge.progress import Progress, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate_files(
    models: Mapping[str, str | Path],
    masks: Mapping[str, Mask | str | Path],
    data: Mapping[str, object],
    *,
    reference: str | None = None,
    measures: Measures | None = None,
    max_length: int = 1024,
    limit: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    journal: Path | None = None,
    progress: Progress | None = None,
) -> GridResult:
    """Measure every model, without a mask and under each mask, on every domain.

    models, masks: name -> checkpoint (directory or hub id), mask or .mask file. With one model the table's rows are its
    name and the masks' names; with several, `model` and `model+mask`. data: domain -> what `data.load_rows` reads.
    reference: name of the row that differences are taken against, the first model without mask by default.
    limit: first rows of each domain. dtype: "auto" (as stored; see `loading.chosen_dtype`), "float32" or "bfloat16".
    journal: file that keeps the answers while the work goes on; a run that was stopped goes on from it.

    Raises BadInput before anything is loaded for unreadable masks, rows or rules.
    """
    measures = measures or Measures()
    _check(models, data, measures)
    names = _row_names(models, masks)
    reference = reference or next(iter(models))
    if reference not in (every := [n for rows in names.values() for n in rows]):
        raise BadInput(f"reference {reference!r} is not one of the rows {every}")
    opened = {name: Mask.of(mask) for name, mask in masks.items()}
    require_delta_bases(opened, measures.base)  # what cannot be had is said before a model is loaded
    domains = {
        name: rows_of.load_rows(source, columns=measures.columns, skip_bad=measures.skip_bad_rows)[:limit]
        for name, source in data.items()
    }
    if measures.skip_bad_rows:
        tokenizers = [load_tokenizer(parts(path)[0]) for path in models.values()]
        domains = usable(domains, tokenizers, [d for d, rows in domains.items() if _answered(d, rows, measures)])
    results = []
    for name, path in models.items():
        own = dict(zip(names[name][1:], opened.values(), strict=True))
        results.append(_one_model(name, path, own, domains, measures, max_length, dtype, device, journal, progress))
    whole = results[0]
    for more in results[1:]:
        whole = whole.merged(more)
    for name, source in data.items():
        whole.domains[name]["source"] = str(source) if isinstance(source, str | Path) else None
    whole.reference, whole.resamples = reference, measures.resamples
    return whole


def _check(models: Mapping[str, object], data: Mapping[str, object], measures: Measures) -> None:
    if not models or not data:
        raise BadInput("nothing to evaluate: give at least one model and one domain of data")
    for domain, name in measures.exact.items():
        if domain not in data:
            raise BadInput(f"exact match for {domain!r}: there is no such domain; there are {', '.join(data)}")
        generation.rule(name)
    if measures.run_tests:
        sandbox.require(measures.trusted)
    if measures.lm_eval:
        harness.require()


def _row_names(models: Mapping[str, object], masks: Mapping[str, object]) -> dict[str, list[str]]:
    """Model -> names of its rows: itself, then one a mask."""
    if len(models) > 1:
        return {m: [m, *(f"{m}+{k}" for k in masks)] for m in models}
    only = next(iter(models))
    if only in masks:
        raise BadInput(f"two rows are called {only!r}; give the model or the mask another name (NAME=PATH)")
    return {only: [only, *masks]}


def _one_model(
    name: str,
    path: str | Path,
    masks: Mapping[str, Mask],
    domains: Mapping[str, list[rows_of.Row]],
    measures: Measures,
    max_length: int,
    dtype: str,
    device: str | None,
    journal: Path | None,
    progress: Progress | None,
) -> GridResult:
    if progress:
        progress(Step(f"loading {name}", 0, 0))
    remarks = {row: base_remark(mask, path) for row, mask in masks.items()}
    model, tokenizer = load_model(path, dtype=dtype, device=device)
    tokens = tokenised(domains, model, tokenizer, max_length)
    scorers = {d: _scorer(d, rows, tokenizer, measures) for d, rows in domains.items()}
    others: dict[str, Callable[[Any], object]] = {}
    if measures.lm_eval:
        others[harness.EXTRA] = lambda m: harness.run(m, tokenizer, measures.lm_eval, limit=measures.lm_eval_limit)
    result = grids.grid(
        model,
        masks,
        tokens,
        reference=name,
        name=name,
        scorers={d: s for d, s in scorers.items() if s},
        others=others,
        batch_tokens=measures.batch_tokens,
        base=measures.base,
        journal=journal,
        progress=progress,
    )
    for row, remark in remarks.items():
        result.models[row]["base"] = remark
        result.models[row]["dropped"] = dropped_remark(masks[row], measures.base)
    del model
    gc.collect()
    return result


def usable(
    domains: Mapping[str, list[rows_of.Row]],
    tokenizers: Sequence[PreTrainedTokenizerBase],
    answered: Collection[str],
) -> dict[str, list[rows_of.Row]]:
    """Each domain's rows that no model's chat template refuses, so that all are measured on the same ones.

    answered: domains whose questions are asked too. Raises BadInput for a domain with no such row.
    """

    def take(domain: str, row: rows_of.Row, where: str) -> None:
        for tokenizer in tokenizers:
            rows_of.tokenize_one(row, tokenizer, where)
            if domain in answered:
                generation.question(row, tokenizer, where)

    found = {}
    for domain, rows in domains.items():
        try:
            found[domain] = rows_of.usable(rows, partial(take, domain))
        except BadInput as e:
            raise BadInput(f"domain {domain!r}: {e}") from None
    return found


def tokenised(
    domains: Mapping[str, list[rows_of.Row]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> dict[str, list[rows_of.Tokens]]:
    """Each domain's rows as tokens, cut off at `max_length` or at what the model has positions for."""
    length = min(max_length, positions(model) or max_length)
    return {d: fitted(rows_of.tokenize(rows, tokenizer, length), model)[0] for d, rows in domains.items()}


def _answered(domain: str, rows: Sequence[rows_of.Row], measures: Measures) -> bool:
    """Whether the model answers a domain's rows."""
    return bool(measures.exact.get(domain)) or _tested(rows, measures)


def _tested(rows: Sequence[rows_of.Row], measures: Measures) -> bool:
    return measures.run_tests and any(row.get("tests") for row in rows)


def _scorer(
    domain: str, rows: list[rows_of.Row], tokenizer: PreTrainedTokenizerBase, measures: Measures
) -> generation.Marker | None:
    if not _answered(domain, rows, measures):
        return None
    try:
        return generation.Marker(
            rows[: measures.answers],
            tokenizer,
            exact=measures.exact.get(domain),
            run_tests=_tested(rows, measures),
            max_new_tokens=measures.max_new_tokens,
            batch_tokens=measures.batch_tokens,
            trusted=measures.trusted,
        )
    except BadInput as e:
        raise BadInput(f"domain {domain!r}: {e}") from None


def require_delta_bases(masks: Mapping[str, Mask], base: str | None) -> None:
    """Raise BadInput for a mask over a delta whose base is not known: what dropped weights become must be given."""
    for label, mask in masks.items():
        try:
            matching.delta_base(mask, base, None, "--base {base}")
        except BadInput as e:
            raise BadInput(f"{label}: {e}") from None


def dropped_remark(mask: Mask, base: str | None) -> str | None:
    """In words, what dropped weights became where that is not 0."""
    other = base or mask.info.delta_base
    return f"dropped weights have their values in {other}" if base or mask.info.on == "delta" else None


def base_remark(mask: Mask, model: str | Path) -> str | None:
    """In words, that the model is not the mask's own base; None where it is, or the mask does not say what that was.

    With an adapter (`model+adapter`) there is no checkpoint to compare with, and so nothing to say.
    """
    directory, adapter = parts(model)
    if adapter is not None:
        return None
    with contextlib.suppress(BadInput):  # what does not match here is reported when the mask meets the live model
        checkpoint = Checkpoint.open(directory)
        names = matching.match(mask, checkpoint, str(directory))
        difference = matching.base_difference(names, mask, checkpoint)
        return str(difference) if difference and difference.tensors else None
    return None

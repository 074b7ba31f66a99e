"""Combine masks in several ways, measure each on every domain, and choose the one that serves the worst-served best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mftmerge import notebook, plots
from mftmerge.contents import Contents
from mftmerge.data import Tokens, load_rows
from mftmerge.errors import BadInput, shown
from mftmerge.evaluate import files, prediction
from mftmerge.evaluate import grid as grids
from mftmerge.evaluate.candidates import Candidate, combined, defaults
from mftmerge.evaluate.generation import EXACT, Marker
from mftmerge.evaluate.results import BY_LAYER, LOSS, GridResult, finite, rich_table
from mftmerge.evaluate.search import SearchJournal, search
from mftmerge.evaluate.searchsettings import SearchSettings
from mftmerge.files import refuse_existing
from mftmerge.mask import Mask
from mftmerge.progress import Progress, Step

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console
    from transformers import PreTrainedModel

__all__ = ["Choice", "choose", "choose_combination"]

BASE = "base"
LEGEND = (
    "Share of the gain that a domain's own mask has over the base (100 % is all of it, below 0 is worse than the base) "
    "± one standard error; below it: loss minus the base's, nats per answer token (where answers choose: right answers "
    "minus the base's), ± one paired standard error. "
    "Chosen: the combination whose lowest share is highest."
)
WARNING = "These rows were used for choosing: report the result on other rows (mftmerge eval with test rows)."


@dataclass(frozen=True)
class Choice:
    """What was tried and chosen.

    grid: every row's losses; rows of the table are "base", "DOMAIN mask" for each own mask, and the candidates' names.
    candidates: name -> combined mask. judged: the domains whose own mask gains, beyond two paired standard errors; only
    they count. chosen: the candidate with the highest lowest share over them (the first of equal ones).
    notes: lines worth reading. command: the `mftmerge combine` command that gives the same mask. out: the file written.
    """

    grid: GridResult
    candidates: Mapping[str, Mask]
    judged: tuple[str, ...]
    chosen: str
    notes: list[str]
    command: str | None = None
    out: str | None = None

    def __repr__(self) -> str:
        """In one line: what was chosen; `show` gives the table."""
        return f"Choice({self.chosen!r}, of {len(self.candidates)} candidates, mask={self.mask!r})"

    @property
    def mask(self) -> Mask:
        """The chosen combination."""
        return self.candidates[self.chosen]

    @property
    def by_layer(self) -> Mapping[str, Mapping[str, float]]:
        """After a search that predictions led, domain -> layer -> predicted loss minus the own mask's (nats a token).

        That is if this layer of the own mask, and no other, were the chosen combination's.
        """
        found: Mapping[str, Mapping[str, float]] = self.grid.extra.get(BY_LAYER, {}).get(self.chosen, {})
        return found

    def share(self, row: str, domain: str) -> tuple[float, float]:
        """(loss of base - loss of row) / (loss of base - loss of own mask) on a domain, and its standard error.

        Where answers choose, shares of right answers stand in the place of losses.

        Both differences are sums over the same rows, so the share is a ratio of them and has that estimator's error
        by linearisation, see `pairing.paired`.
        """
        return _share(self.grid, row, domain)

    def lowest(self, row: str) -> float:
        """The lowest share over the judged domains."""
        return _lowest(self.grid, row, self.judged)

    def to_json(self) -> dict[str, Any]:
        """The choice as plain values."""
        return {
            "chosen": self.chosen,
            "lowest_share": self.lowest(self.chosen),
            "density": self.mask.density(),
            "mask": self.mask.digest,
            "out": self.out,
            "command": self.command,
            "domains": {d: facts | {"judged": d in self.judged} for d, facts in self.grid.domains.items()},
            "predicted_by_layer": self.by_layer,
            "table": {row: self._json_row(row) for row in self.grid.models},
            "notes": [*self.notes, WARNING],
            "versions": self.grid.versions,
        }

    def _json_row(self, row: str) -> dict[str, Any]:
        cells: dict[str, Any] = {}
        for domain in self.grid.domains:
            metric = _metric(self.grid, domain)
            difference = self.grid.difference(row, domain, metric)
            cell: dict[str, float | None] = {"loss": self.grid.mean(row, domain), "difference": difference.mean}
            if metric != LOSS:
                cell[metric] = self.grid.mean(row, domain, metric)
            cell["standard_error"] = finite(difference.standard_error)
            if domain in self.judged:
                share, error = self.share(row, domain)
                cell |= {"share": share, "share_standard_error": finite(error)}
            cells[domain] = cell
        facts = self.grid.models[row] | {"lowest_share": self.lowest(row), "domains": cells}
        return facts | ({"options": self.candidates[row].info.options} if row in self.candidates else {})

    def show(self, console: Console) -> None:
        """Print the table, the choice and the notes."""
        console.print(rich_table(*self._lines()))
        for text in (LEGEND, WARNING, *(f"note: {note}" for note in self.notes)):
            console.print(shown(text), markup=False, highlight=False)

    def _lines(self) -> tuple[list[str], list[list[str]]]:
        headings = ["combination", "density", *self.grid.domains, "lowest share"]
        return headings, [self._texts(row) for row in self.grid.models]

    def _repr_html_(self) -> str:
        """In a notebook: the table, the choice, the notes, and a picture of the shares."""
        title = f"chosen: {self.chosen}, density {self.mask.density():.4f}"
        table = notebook.table(*self._lines(), title, [LEGEND, WARNING, *self.notes])
        return table + (notebook.picture(self.plot()) if find_spec("matplotlib") else "")

    def plot(self) -> Figure:
        """A matplotlib figure: of each combination, the share of every domain's own gain that it keeps."""
        figure = plots.new_figure(7.0, 1.2 + 0.32 * len(self.candidates))
        axes = figure.subplots()
        names = list(self.candidates)[::-1]
        for number, domain in enumerate(self.judged):
            shares = [self.share(name, domain) for name in names]
            places = [i + 0.12 * (number - (len(self.judged) - 1) / 2) for i in range(len(names))]
            values, errors = [100 * s for s, _ in shares], [100 * e for _, e in shares]
            axes.errorbar(values, places, xerr=errors, fmt=plots.MARKERS[number % len(plots.MARKERS)], label=domain)
        axes.set_yticks(range(len(names)), [f"{n} (chosen)" if n == self.chosen else n for n in names])
        axes.axvline(100, color="#222222", linewidth=0.8, linestyle="--")
        axes.set_xlabel("share of the own mask's gain that is kept, % ± one standard error")
        axes.legend()
        return figure

    def _texts(self, row: str) -> list[str]:
        name = row.replace(",", ", ") if row in self.candidates else row  # a narrow terminal breaks lines at spaces
        density = self.grid.models[row].get("density")
        cells = [name, "" if density is None else f"{density:.3f}", *(self._text(row, d) for d in self.grid.domains)]
        lowest = _percent(self.lowest(row)) if row in self.candidates else ""
        return [*cells, lowest + ("\nchosen" if row == self.chosen else "")]

    def _text(self, row: str, domain: str) -> str:
        if row == BASE:
            metric = _metric(self.grid, domain)
            mean = self.grid.mean(row, domain, metric)
            return f"loss {mean:.4f}" if metric == LOSS else f"{mean:.1%} right"
        text = "no share"
        if domain in self.judged:
            share, error = self.share(row, domain)
            text = f"{_percent(share)} ± {_percent(error)}"
        return f"{text}\n{_signed(self.grid, row, domain)}"


def choose_combination(
    model: str | Path,
    masks: Mapping[str, Mask | str | Path],
    data: Mapping[str, Any],
    out: str | Path | None = None,
    *,
    candidates: Sequence[str] | None = None,
    archive: bool = False,
    overwrite: bool = False,
    limit: int | None = None,
    max_length: int = 1024,
    batch_tokens: int = 4096,
    dtype: str = "auto",
    device: str | None = None,
    base: str | None = None,
    exact: Mapping[str, str] | None = None,
    max_new_tokens: int = 256,
    columns: Mapping[str, str] | None = None,
    skip_bad_rows: bool = False,
    searching: SearchSettings | None = None,
    progress: Progress | None = None,
) -> Choice:
    """Choose the combination of masks whose worst-served domain keeps the largest share of its own mask's gain.

    model: checkpoint (directory or hub id) that the masks were learnt over, loaded once. masks: domain -> mask or file.
    data: domain -> rows as `data.load_rows` reads them, which should be validation rows. out: the mask file to write,
    whole or not at all. candidates: texts as `Candidate.parse` reads them in place of the default list. limit: first
    rows of each domain. base: model whose values dropped weights take, whatever the masks' headers say.
    exact: domain -> rule for right answers (see `generation.rule`), which then choose there instead of the loss.
    columns, skip_bad_rows: how rows are read, see `data.load_rows`.
    searching: also look for better ones (see `search.search`); what was measured is kept in `OUT.search` while that
    lasts, and the same call goes on from there.
    Memory beside the model: one bit a weight for each candidate, and the weights they drop.

    Raises BadInput before the model is loaded for masks and rows of different domains, candidates that cannot be made,
    and an output that may not be written; afterwards where no own mask gains on its rows.
    """
    paths = {domain: f"{domain}.mask" if isinstance(mask, Mask) else str(mask) for domain, mask in masks.items()}
    if out is not None:
        refuse_existing(out, overwrite, (model, list(paths.values()), data, base))
    _check(masks, data)
    if unknown := sorted({*(exact or {})} - {*data}):
        raise BadInput(f"exact match for {unknown[0]!r}: there is no such domain; there are {', '.join(data)}")
    opened = {domain: Mask.of(mask) for domain, mask in masks.items()}
    rows = {d: load_rows(data[d], columns=columns, skip_bad=skip_bad_rows)[:limit] for d in masks}
    labels = [Path(path).name for path in paths.values()]
    tried, notes = ([Candidate.parse(c) for c in candidates], []) if candidates else defaults(opened)
    made, same = combined(tried, list(opened.values()), labels, progress)
    files.require_delta_bases(opened, base)  # what cannot be had is said before the model is loaded
    if progress:
        progress(Step("loading the model", 0, 0))
    remarks = [(domain, files.base_remark(mask, model)) for domain, mask in opened.items()]
    remarks += [(domain, files.dropped_remark(mask, base)) for domain, mask in opened.items()]
    live, tokenizer = files.load_model(model, dtype=dtype, device=device)
    if skip_bad_rows:
        rows = files.usable(rows, [tokenizer], exact or {})
    tokens = files.tokenised(rows, live, tokenizer, max_length)
    scorers = {
        d: Marker(rows[d], tokenizer, exact=rule, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens)
        for d, rule in (exact or {}).items()
    }
    choice = choose(
        live, opened, tokens, made, batch_tokens=batch_tokens, base=base, scorers=scorers, progress=progress
    )
    journal = None if out is None or searching is None else Path(f"{out}.search")
    if searching is not None and searching.search:
        measuring = {"batch_tokens": batch_tokens, "base": base, "scorers": scorers}
        choice = _searched(choice, live, opened, tokens, searching, measuring, journal, progress)
        tried = [*tried, *(Candidate.parse(text) for text in choice.candidates if text not in made)]
    if out is not None:
        choice.mask.save(out, archive=archive, overwrite=overwrite)
        if journal is not None:
            journal.unlink(missing_ok=True)
    best = next(candidate for candidate in tried if candidate.text == choice.chosen)
    return replace(
        choice,
        notes=[*(f"{d}: {remark}" for d, remark in remarks if remark), *notes, *same, *choice.notes],
        command=best.command(list(paths.values()), str(out or "combined.mask"), archive=archive),
        out=None if out is None else str(out),
    )


def _searched(
    choice: Choice,
    model: PreTrainedModel,
    masks: Mapping[str, Mask],
    tokens: Mapping[str, Sequence[Tokens]],
    settings: SearchSettings,
    measuring: Mapping[str, Any],
    journal: Path | None,
    progress: Progress | None,
) -> Choice:
    """The choice among what was tried and what a search proposes beside it."""
    own = {d: masks[d] for d in choice.judged}
    facts: dict[str, Any] = {"settings": settings.model_dump(), "masks": [m.digest for m in masks.values()]}
    facts |= {"domains": choice.grid.domains, "weights": choice.grid.models[BASE]["weights"]}
    contents = Contents()
    facts["dropped"] = [grids.dropped_facts(m, measuring["base"], contents) for m in masks.values()]
    facts["answers"] = {d: [s.exact, s.facts, [q.reference for q in s.asked]] for d, s in measuring["scorers"].items()}
    record = SearchJournal(journal, facts)
    table, notes = choice.grid, list(choice.notes)
    cache = grids.shared_layers(model, masks, tokens)

    def measure(candidate: Candidate, kept: Mask) -> dict[str, float]:
        nonlocal table
        known = {(BASE, d, m): v for (row, d, m), v in choice.grid.cells.items() if row == BASE}
        known |= {(candidate.text, d, m): v for (d, m), v in record.known.get(kept.digest, {}).items()}
        one = grids.grid(model, {candidate.text: kept}, tokens, name=BASE, prefix=False, known=known, **measuring)
        if kept.digest not in record.known:
            record.add(kept, {(d, m): v for (row, d, m), v in one.cells.items() if row == candidate.text})
        table = table.merged(one.without(BASE))
        return {d: _share(table, candidate.text, d)[0] for d in choice.judged}

    with cache.use() if model.device.type == "cpu" else nullcontext():
        why = prediction.predictable(own) if settings.guided else None
        if why:
            notes.append(f"the search is not guided by predictions: {why}")
        rows = {d: tokens[d] for d in own}
        guided = settings.guided and not why
        predict = partial(prediction.predict, model, own, rows, progress=progress) if guided else None
        scores = all(m.has_scores for m in masks.values())
        made = search(masks, measure, settings, scores=scores, predict=predict, progress=progress)
        every = {**choice.candidates, **made}
        best = max(every, key=lambda name: _lowest(table, name, choice.judged))
        outlooks = predict([every[best]]) if predict else {}
    by_layer = {domain: outlook.layer_changes(0) for domain, outlook in outlooks.items()}
    notes.append(f"the search measured {len(made)} combinations beside the {len(choice.candidates)} usual ones")
    notes += [
        f"{d}: predicted loss on top of its own mask's if only one layer were the chosen combination's: "
        + ", ".join(f"layer {layer} {change:+.4f}" for layer, change in layers.items())
        for d, layers in by_layer.items()
    ]
    table = replace(table, extra=table.extra | ({BY_LAYER: {best: by_layer}} if by_layer else {}))
    return replace(choice, grid=table, candidates=every, chosen=best, notes=notes)


def _check(masks: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    if set(masks) != set(data):
        raise BadInput(
            f"masks are for {', '.join(sorted(masks)) or 'nothing'}, rows for {', '.join(sorted(data)) or 'nothing'}; "
            "give each mask the name of its rows, as in math=math.mask and math=math-val.jsonl"
        )
    if len(masks) < 2:
        raise BadInput("one mask is nothing to combine; give at least two, each with rows of its domain")


def choose(
    model: PreTrainedModel,
    masks: Mapping[str, Mask],
    domains: Mapping[str, Sequence[Tokens]],
    candidates: Mapping[str, Mask],
    *,
    batch_tokens: int = 4096,
    base: str | None = None,
    scorers: Mapping[str, Marker] | None = None,
    progress: Progress | None = None,
) -> Choice:
    """The same with a loaded model, masks in memory (domain -> mask), tokenised rows, and masks that are combined.

    scorers: domain -> what marks answers, where these choose instead of the loss.

    Raises BadInput where no own mask gains on its rows.
    """
    table = {_own(domain): mask for domain, mask in masks.items()} | dict(candidates)
    grid = grids.grid(
        model, table, domains, name=BASE, scorers=scorers, batch_tokens=batch_tokens, base=base, progress=progress
    )
    judged = tuple(d for d in domains if grid.verdict(_own(d), d, _metric(grid, d)) == "gain")
    if not judged:
        gains = "; ".join(f"{d} {_signed(grid, _own(d), d)}" for d in domains)
        raise BadInput(
            f"no mask gains on its own rows beyond noise ({gains}), so there is nothing to keep; "
            "train longer or give more rows"
        )
    best = max(candidates, key=lambda name: _lowest(grid, name, judged))
    notes = [
        f"{d} does not count for the choice: its own mask does not gain beyond noise ({_signed(grid, _own(d), d)})"
        for d in domains
        if d not in judged
    ]
    notes += [
        f"{best} is no better than the base on {d} ({_signed(grid, best, d)})"
        for d in domains
        if not _better(grid, best, d)
    ]
    return Choice(grid, candidates, judged, best, notes)


def _own(domain: str) -> str:
    """The row of the table of a domain's own mask; no candidate has a space in its name."""
    return f"{domain} mask"


def _metric(grid: GridResult, domain: str) -> str:
    """What chooses on a domain: right answers where they were marked, else the loss."""
    return EXACT if (BASE, domain, EXACT) in grid.cells else LOSS


def _better(grid: GridResult, row: str, domain: str) -> bool:
    """Whether a row is better than the base, be it by chance."""
    metric = _metric(grid, domain)
    difference = grid.difference(row, domain, metric).mean
    return difference < 0 if metric == LOSS else difference > 0


def _share(grid: GridResult, row: str, domain: str) -> tuple[float, float]:
    return grid.share(row, _own(domain), domain, _metric(grid, domain), reference=BASE)


def _lowest(grid: GridResult, row: str, judged: Sequence[str]) -> float:
    return min(_share(grid, row, domain)[0] for domain in judged)


def _percent(share: float) -> str:
    return f"{round(100 * share)} %"


def _signed(grid: GridResult, row: str, domain: str) -> str:
    metric = _metric(grid, domain)
    difference = grid.difference(row, domain, metric)
    if metric == LOSS:
        return f"{difference.mean:+.4f} ± {difference.standard_error:.4f}"
    return f"{100 * difference.mean:+.1f} ± {100 * difference.standard_error:.1f} points"

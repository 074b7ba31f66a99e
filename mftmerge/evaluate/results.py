"""`GridResult`: models by domains, with every row's measurement kept, as a table, Markdown, JSON and a heat map."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mftmerge import notebook, plots
from mftmerge.errors import BadInput, shown
from mftmerge.evaluate import pairing
from mftmerge.evaluate.pairing import PairedDifference, Values
from mftmerge.files import refuse_existing, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table

FORMAT = 1
LOSS = "loss"
BY_LAYER = "predicted by layer"  # in `extra`: row -> domain -> layer -> change, see `choosing.Choice.by_layer`
Cell = tuple[str, str, str]  # (row of the table, domain, metric)

LEGEND = (
    "loss: nats per assistant token, lower is better; other columns: share of rows, higher is better. "
    "In brackets: difference from the reference row ± one paired standard error. "
    "gain / worse: beyond two standard errors, for marks of answers by McNemar's exact test at 5 %; "
    "within noise: the wanted direction, but could be chance; no gain: not even that."
)


@dataclass
class GridResult:
    """Measurements of several models (rows) on several domains.

    models: row -> model, dtype, hash of the weights, mask digest and density. domains: domain -> rows, digest, source.
    cells: (row, domain, metric) -> array (rows, 2) of sums and weights, see `pairing`; metric "loss" is in nats.
    reference: the row that differences are taken against. resamples: with more than 0, paired bootstrap intervals
    (95 %, seed 0) stand beside the standard errors. extra: what else was measured (lm-evaluation-harness).
    """

    models: dict[str, dict[str, Any]]
    domains: dict[str, dict[str, Any]]
    cells: dict[Cell, Values]
    reference: str
    versions: dict[str, str] = field(default_factory=dict)
    resamples: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """In one line: how large the table is; `show` and `to_markdown` give it."""
        return f"GridResult({len(self.models)} models on {len(self.domains)} domains, against {self.reference!r})"

    @property
    def metrics(self) -> list[tuple[str, str]]:
        """The (domain, metric) pairs that were measured, in order: the columns of the table."""
        return list(dict.fromkeys((domain, metric) for _, domain, metric in self.cells))

    def values(self, row: str, domain: str, metric: str = LOSS) -> Values:
        """Per-row sums and weights, shape (rows, 2). Raises BadInput for what was not measured."""
        try:
            return self.cells[row, domain, metric]
        except KeyError:
            raise BadInput(f"no {metric} of {row!r} on {domain!r}; rows: {list(self.models)}") from None

    def mean(self, row: str, domain: str, metric: str = LOSS) -> float:
        """Loss per assistant token, or share of right answers."""
        return pairing.mean(self.values(row, domain, metric))

    def difference(
        self, row: str, domain: str, metric: str = LOSS, *, reference: str | None = None
    ) -> PairedDifference:
        """Paired difference of a row from the reference row (or from `reference`) on a domain."""
        return pairing.paired(
            self.values(row, domain, metric), self.values(reference or self.reference, domain, metric)
        )

    def verdict(self, row: str, domain: str, metric: str = LOSS) -> str:
        """ "gain", "within noise", "no gain", "worse" or "identical" against the reference row.

        Beyond noise is, for losses, beyond two standard errors; for marks of answers what McNemar's exact test finds at
        5 %, which holds for few rows too.
        """
        difference = self.difference(row, domain, metric)
        words = difference.verdict(lower_is_better=metric == LOSS)
        pair = self.values(row, domain, metric), self.values(self.reference, domain, metric)
        if metric == LOSS or words == "identical" or not pairing.are_marks(*pair):
            return words
        better = difference.mean > 0
        if pairing.mcnemar(*pair) < 0.05:
            return "gain" if better else "worse"
        return "within noise" if better else "no gain"

    def interval(self, row: str, domain: str, metric: str = LOSS) -> tuple[float, float] | None:
        """95 % interval of the difference from the reference row: from the bootstrap where `resamples` asks for it,
        and for marks of answers Newcombe's; else none."""
        pair = self.values(row, domain, metric), self.values(self.reference, domain, metric)
        if self.resamples:
            return pairing.bootstrap(*pair, resamples=self.resamples)
        return pairing.newcombe(*pair) if metric != LOSS and pairing.are_marks(*pair) else None

    def share(
        self, row: str, own: str, domain: str, metric: str = LOSS, *, reference: str | None = None
    ) -> tuple[float, float]:
        """The share of what `own` gains over the reference on a domain that `row` gains, and its standard error.

        Both gains are sums over the same rows, so the share is a ratio of them and has that estimator's error by
        linearisation, see `pairing.paired`. It is the same for what should fall and for what should rise.
        """
        base, best = (self.values(name, domain, metric)[:, 0] for name in (reference or self.reference, own))
        kept = np.stack([base - self.values(row, domain, metric)[:, 0], base - best], axis=1)
        return pairing.mean(kept), pairing.standard_error(kept)

    def words(self) -> list[str]:
        """One sentence for every place where a row did not clearly gain on the reference."""
        return [
            f"{row} on {domain}: {self.verdict(row, domain, metric)} ({metric} {_signed(self, row, domain, metric)})."
            for domain, metric in self.metrics
            for row in self.models
            if row != self.reference
            and (row, domain, metric) in self.cells
            and self.verdict(row, domain, metric) != "gain"
        ]

    def without(self, row: str) -> GridResult:
        """The result without one row."""
        models = {name: facts for name, facts in self.models.items() if name != row}
        cells = {key: values for key, values in self.cells.items() if key[0] != row}
        return dataclasses.replace(self, models=models, cells=cells)

    def merged(self, other: GridResult) -> GridResult:
        """The rows of both results; the domains must hold the same data, and the rows different names."""
        twice = set(self.models) & set(other.models)
        if twice:
            raise BadInput(f"two rows are called {min(twice)!r}; give the models or masks other names (NAME=PATH)")
        for domain, facts in other.domains.items():
            if facts.get("digest") != self.domains.get(domain, {}).get("digest"):
                raise BadInput(
                    f"domain {domain!r}: the two results are not of the same rows (another file, tokenizer or length)"
                )
        return dataclasses.replace(
            self,
            models=self.models | other.models,
            cells=self.cells | other.cells,
            extra={k: {**self.extra.get(k, {}), **other.extra.get(k, {})} for k in {**self.extra, **other.extra}},
        )

    def to_json(self, path: str | Path | None = None, *, overwrite: bool = False) -> str:
        """The whole result as JSON, with every row's measurement; written to `path` too when it is given."""
        cells = [self._json_cell(row, domain, metric) for row, domain, metric in self.cells]
        whole = {"format": FORMAT, "reference": self.reference, "models": self.models, "domains": self.domains}
        whole |= {"versions": self.versions, "resamples": self.resamples, "extra": self.extra, "cells": cells}
        return write_whole(json.dumps(whole, indent=1, allow_nan=False) + "\n", path, overwrite)

    def _json_cell(self, row: str, domain: str, metric: str) -> dict[str, object]:
        values, difference = self.values(row, domain, metric), self.difference(row, domain, metric)
        cell: dict[str, Any] = {"model": row, "domain": domain, "metric": metric, "mean": pairing.mean(values)}
        cell["standard_error"] = finite(pairing.standard_error(values))
        cell["difference"] = {"mean": difference.mean, "standard_error": finite(difference.standard_error)}
        if interval := self.interval(row, domain, metric):
            cell["difference"]["interval"] = [finite(x) for x in interval]
        if metric != LOSS and pairing.are_marks(values):
            cell["interval"] = list(pairing.wilson(values[:, 0].sum(), len(values)))
        cell["verdict"] = "reference" if row == self.reference else self.verdict(row, domain, metric)
        return cell | {"rows": [[float(s), int(w)] for s, w in values]}

    @classmethod
    def from_json(cls, source: str | Path) -> GridResult:
        """Read what `to_json` gave: a path or the text. Raises BadInput on anything else."""
        text = source if isinstance(source, str) and source.lstrip().startswith("{") else Path(source).read_text()
        try:
            whole = json.loads(text)
            cells = {
                (c["model"], c["domain"], c["metric"]): np.array(c["rows"], np.float64).reshape(-1, 2)
                for c in whole["cells"]
            }
            names = ("models", "domains", "reference", "versions", "resamples", "extra")
            return cls(cells=cells, **{name: whole[name] for name in names})
        except (ValueError, KeyError, TypeError) as e:
            raise BadInput(f"not the JSON of an evaluation ({e!r})") from None

    def _lines(self) -> tuple[list[str], list[list[str]]]:
        """Headings and cells, shared by the terminal table and the Markdown one."""
        headings = ["model", "density", *(f"{domain} {metric}" for domain, metric in self.metrics)]
        rows = []
        for row, facts in self.models.items():
            density = f"{facts['density']:.3f}" if "density" in facts else ""
            rows.append([row, density, *(self._text(row, domain, metric) for domain, metric in self.metrics)])
        return headings, rows

    def _text(self, row: str, domain: str, metric: str) -> str:
        if (row, domain, metric) not in self.cells:
            return "-"
        value = _number(self.mean(row, domain, metric), metric)
        if row == self.reference:
            return f"{value} (reference)"
        return f"{value} ({_signed(self, row, domain, metric)}, {self.verdict(row, domain, metric)})"

    def to_markdown(self, path: str | Path | None = None, *, overwrite: bool = False) -> str:
        """A Markdown table, what did not help in words, and the data and versions; written to `path` too if given."""
        headings, rows = self._lines()
        lines = [*markdown_table(headings, rows), "", f"Reference: {in_markdown(self.reference)}. {LEGEND}", ""]
        if self.harness:
            lines += [*markdown_table(*self._harness_lines()), ""]
        said = [*self.words(), *self.remarks()]
        lines += [f"- {in_markdown(sentence)}" for sentence in said] + ([""] if said else [])
        data = [f"{name}: {facts['rows']} rows, {facts['digest']}" for name, facts in self.domains.items()]
        lines.append(in_markdown("Data: " + "; ".join(data) + "."))
        lines.append(in_markdown("Versions: " + ", ".join(f"{k} {v}" for k, v in self.versions.items()) + "."))
        return write_whole("\n".join(lines) + "\n", path, overwrite)

    def _repr_html_(self) -> str:
        """In a notebook: the table, what did not help, and the heat map where there is something to compare."""
        table = notebook.table(*self._lines(), notes=[LEGEND, *self.words(), *self.remarks()])
        comparable = len(self.models) > 1 and find_spec("matplotlib")
        return table + (notebook.picture(self.plot()) if comparable else "")

    def table(self) -> Table:
        """A rich table for the terminal."""
        return rich_table(*self._lines())

    def show(self, console: Console) -> None:
        """Print the table, what did not help in words, and remarks on data and masks."""
        console.print(self.table())
        console.print(LEGEND, markup=False, highlight=False, style="dim")
        if self.harness:
            console.print(rich_table(*self._harness_lines()))
        for sentence in [*self.words(), *self.remarks()]:
            console.print(shown(sentence), markup=False, highlight=False)

    def remarks(self) -> list[str]:
        """What to know about the masks and the marking."""
        said = [f"{row}: {facts['base']}." for row, facts in self.models.items() if facts.get("base")]
        said += [f"{row}: {facts['dropped']}." for row, facts in self.models.items() if facts.get("dropped")]
        said += [f"{name}: {text}." for name, d in self.domains.items() for text in d.get("remarks", [])]
        return said + self._power()

    def _power(self) -> list[str]:
        """Of each share of right answers: how small a difference its rows can show."""
        said = []
        for domain, metric in self.metrics:
            others = [r for r in self.models if r != self.reference and (r, domain, metric) in self.cells]
            if metric == LOSS or not others:
                continue
            largest = max((self.difference(r, domain, metric) for r in others), key=lambda d: d.standard_error)
            if 0 < largest.standard_error < float("inf"):
                said.append(
                    f"{domain} {metric}: {largest.n} rows would mostly miss a difference below "
                    f"{100 * pairing.visible(largest):.1f} points."
                )
        return said

    @property
    def harness(self) -> dict[str, dict[str, dict[str, float]]]:
        """Results of lm-evaluation-harness: row -> task -> metric -> number."""
        found: dict[str, dict[str, dict[str, float]]] = self.extra.get("lm_eval", {})
        return found

    def _harness_lines(self) -> tuple[list[str], list[list[str]]]:
        columns = list(dict.fromkeys((t, m) for row in self.harness.values() for t, ms in row.items() for m in ms))
        columns = [(task, metric) for task, metric in columns if "_stderr" not in metric]
        rows = [[row, *(_harness_text(tasks, *column) for column in columns)] for row, tasks in self.harness.items()]
        return ["lm-evaluation-harness", *(f"{task} {metric.removesuffix(',none')}" for task, metric in columns)], rows

    def plot(self, path: str | Path | None = None, *, overwrite: bool = False) -> Figure:
        """Heat map of the differences from the reference row (blue is better); `path`: a .png or .svg to write."""
        if path is not None:
            refuse_existing(path, overwrite)
        return _heat_map(self, path)


def write_whole(text: str, path: str | Path | None, overwrite: bool) -> str:
    """Write `text` to `path`, whole or not at all, and return it."""
    if path is not None:
        refuse_existing(path, overwrite)
        write_text(path, text)
    return text


def _signed(result: GridResult, row: str, domain: str, metric: str) -> str:
    difference = result.difference(row, domain, metric)
    text = f"{_number(difference.mean, metric, '+')} ± {_number(difference.standard_error, metric)}"
    if interval := result.interval(row, domain, metric):
        low, high = interval
        text += f", 95 % [{_number(low, metric, '+')}, {_number(high, metric, '+')}]"
    return text


def _number(value: float, metric: str, sign: str = "") -> str:
    """Losses with four places, shares as percentages with one."""
    return f"{value:{sign}.4f}" if metric == LOSS else f"{100 * value:{sign}.1f} %"


def finite(value: float) -> float | None:
    """The number, or None where JSON has no word for it."""
    return float(value) if np.isfinite(value) else None


def _harness_text(tasks: Mapping[str, Mapping[str, float]], task: str, metric: str) -> str:
    metrics = tasks.get(task, {})
    if metric not in metrics:
        return "-"
    name, comma, kind = metric.partition(",")
    error = metrics.get(f"{name}_stderr{comma}{kind}")
    return f"{metrics[metric]:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def rich_table(headings: list[str], rows: list[list[str]]) -> Table:
    """A table for the terminal, the first column to the left."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for i, heading in enumerate(headings):
        table.add_column(
            Text(shown(heading)),  # names are the user's, or from a file: no markup, no escape sequences
            justify="left" if i == 0 else "right",
        )
    for row in rows:
        table.add_row(*(_styled(text) for text in row))
    return table


def markdown_table(headings: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [_markdown_row(headings), _markdown_row(["---"] * len(headings)), *map(_markdown_row, rows)]


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(in_markdown(cell).replace("|", "\\|") for cell in cells) + " |"


def in_markdown(text: str) -> str:
    """Text with names in it, for a line of Markdown: no HTML, link or code begins in it."""
    return re.sub(r"[\\`<]|(?<=\])\(", r"\\\g<0>", shown(text))


def _styled(text: str) -> Any:
    from rich.text import Text

    styles: Mapping[str, str] = {"gain)": "green", "worse)": "red"}
    style = next((s for end, s in styles.items() if text.endswith(end) and not text.endswith("no gain)")), "")
    return Text(shown(text).replace(" (", "\n(", 1), style=style)


# -- the picture -------------------------------------------------------------------------------------------------------


def _heat_map(result: GridResult, path: str | Path | None = None) -> Figure:
    """Rows x columns of differences from the reference row, blue better and red worse; a star beyond two errors.

    Colours are scaled within a column, because a loss and a share of right answers have no common unit.
    path: .png, .svg or .pdf to write, whole or not at all.
    """
    rows, columns = list(result.models), result.metrics
    better, texts = np.full((len(rows), len(columns)), np.nan), {}
    for i, row in enumerate(rows):
        for j, (domain, metric) in enumerate(columns):
            if (row, domain, metric) in result.cells:
                difference = result.difference(row, domain, metric)
                better[i, j] = -difference.mean if metric == "loss" else difference.mean
                star = "*" if result.verdict(row, domain, metric) in ("gain", "worse") else ""
                texts[i, j] = _heat_text(result, row, domain, metric, difference, star)
    scale = np.nan_to_num(np.nanmax(np.abs(better), axis=0, initial=0))
    figure = plots.new_figure(2.4 + 1.9 * len(columns), 1.4 + 0.55 * len(rows))
    axes = figure.subplots()
    axes.imshow(better / np.where(scale > 0, scale, 1), cmap="RdBu", vmin=-1.6, vmax=1.6, aspect="auto")
    axes.set_xticks(range(len(columns)), [f"{shown(domain)}\n{shown(metric)}" for domain, metric in columns])
    axes.set_yticks(range(len(rows)), plots.labels(rows))
    for (i, j), text in texts.items():
        axes.text(j, i, text, ha="center", va="center", fontsize=8)
    axes.set_title(
        f"Difference from {shown(result.reference)}: blue better, red worse, scaled by column\n"
        "± one paired standard error, * beyond two",
        fontsize=9,
    )
    if path is not None:
        plots.save(figure, path)
    return figure


def _heat_text(result: GridResult, row: str, domain: str, metric: str, difference: PairedDifference, star: str) -> str:
    value = result.mean(row, domain, metric)
    if metric == "loss":
        top, unit, low = f"{value:.3f}", f"{difference.mean:+.4f}", f"{difference.standard_error:.4f}"
    else:
        top, unit, low = f"{value:.1%}", f"{100 * difference.mean:+.1f}", f"{100 * difference.standard_error:.1f}"
    return top if row == result.reference else f"{top}\n{unit} ± {low}{star}"

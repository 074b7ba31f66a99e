"""Results of evaluations and sweeps: gains with their standard errors, in words, numbers and colours."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from mftmerge.evaluate.results import LOSS, GridResult
from mftmerge.report.blocks import (
    Bold,
    Bullets,
    Cell,
    Content,
    Heading,
    Link,
    Row,
    Section,
    Small,
    Span,
    Table,
    Whisker,
    note,
)
from mftmerge.report.collect import Collection, MaskHere, ResultHere
from mftmerge.report.numbers import measured
from mftmerge.report.sweeps import Combination, SweepHere

VERDICTS = ("gain", "within noise", "no gain", "worse", "identical")
STYLES = {"gain": "good", "worse": "bad"}
MOST_RESAMPLES = 10_000
LEGEND = (
    "Difference from the reference row ± one paired standard error over rows. Gain and worse: beyond two standard "
    "errors. Within noise: the wanted direction, but could be chance. No gain: not even that."
)


def verdict_style(verdict: str) -> str:
    """The class of a verdict's cells."""
    return STYLES.get(verdict, "even")


def results_sections(found: Collection) -> list[Section]:
    """One section for all evaluations, one for all sweeps; none for what is not there."""
    sections = []
    if found.results:
        body = [_result(found, here, len(found.results) > 1) for here in found.results]
        sections.append(Section("gains", "Gains", body))
    if found.sweeps:
        sections.append(Section("sweeps", "Sweeps", [_sweep(sweep) for sweep in found.sweeps]))
    return sections


def mask_gains(found: Collection, mask: MaskHere) -> list[tuple[str, str, str]]:
    """What the results say about a mask: (domain, difference ± error, verdict), from the first one that has it."""
    for here in found.results:
        result = here.result
        for row, facts in result.models.items():
            if facts.get("mask") == mask.found.digest and row != result.reference:
                return [
                    (domain if metric == LOSS else f"{domain} {metric}", _signed(result, row, domain, metric), word)
                    for domain, metric in result.metrics
                    if (row, domain, metric) in result.cells
                    for word in [result.verdict(row, domain, metric)]
                ]
    return []


def _signed(result: GridResult, row: str, domain: str, metric: str) -> str:
    difference = result.difference(row, domain, metric)
    return f"{measured(difference.mean, metric, sign=True)} ± {measured(difference.standard_error, metric)}"


def _result(found: Collection, here: ResultHere, several: bool) -> Content:
    result = here.result
    names = {m.found.digest: i for i, m in enumerate(found.masks)}
    heads: list[Row] = [["model", Cell("density", "n", rows=2)], []]
    for domain, metric in result.metrics:
        rows = result.domains[domain].get("rows")
        unit = "nats per token, lower is better" if metric == LOSS else "share of rows, higher is better"
        title = [Bold(domain), Small(f"{unit}{f'; {rows} rows' if rows is not None else ''}")]
        heads[0].append(Cell(title, "group", span=3))
        value = Cell("loss" if metric == LOSS else metric, "n first")
        heads[1] += [value, "difference ± error", Cell("verdict, ± 2 errors", "pic")]
    body: list[Row] = [
        [_model(row, facts, names), _density(facts), *_cells(result, row)] for row, facts in result.models.items()
    ]
    parts: list[Content] = [Heading(here.path) if several else None, _counts(result)]
    parts.append(Table(f"{here.path}: each model on each domain, against {result.reference}", heads, body, "grid"))
    parts.append(
        note(
            LEGEND,
            " The picture: the difference, and two standard errors on either side; lower is left. "
            "Colours and pictures are scaled within a column.",
        )
    )
    if result.harness:
        parts.append(_harness(result))
    said = result.remarks()
    parts.append(Bullets(said, "note") if said else None)
    if here.contained:
        parts.append(note("Holds all that is in ", ", ".join(here.contained), "."))
    return parts


def _counts(result: GridResult) -> Bullets:
    """For each column, how many rows gained and how many did not."""
    lines: list[Content] = []
    for domain, metric in result.metrics:
        rows = [r for r in result.models if r != result.reference and (r, domain, metric) in result.cells]
        counted = Counter(result.verdict(row, domain, metric) for row in rows)
        words = [
            (" ", Span(f"{counted[word]} {word}", f"chip {verdict_style(word)}")) for word in VERDICTS if counted[word]
        ]
        lines.append([Bold(domain if metric == LOSS else f"{domain} {metric}"), *words])
    return Bullets(lines, "counts")


def _model(row: str, facts: dict[str, object], names: dict[str, int]) -> Content:
    number = names.get(str(facts.get("mask")))
    return Span(row) if number is None else Link(row, f"#mask-{number}")


def _density(facts: dict[str, object]) -> str:
    return f"{facts['density']:.4f}" if "density" in facts else ""


def _cells(result: GridResult, row: str) -> list[Cell]:
    cells: list[Cell] = []
    for domain, metric in result.metrics:
        if (row, domain, metric) not in result.cells:
            cells.append(Cell("not measured", "even n first", span=3))
            continue
        value = Cell(measured(result.mean(row, domain, metric), metric), "n first")
        if row == result.reference:
            cells += [value, Cell("reference", "even", span=2)]
            continue
        difference, word = result.difference(row, domain, metric), result.verdict(row, domain, metric)
        span = _span(result, domain, metric)
        style = verdict_style(word)
        strength = abs(difference.mean) / span if span and style != "even" else None
        shown = [_signed(result, row, domain, metric), _interval(result, row, domain, metric)]
        cells += [
            value,
            Cell(shown, f"n {style}", strength),
            Cell(
                [Span(word), Whisker(difference.mean, min(difference.standard_error, 1e9), span, style)],
                f"pic word {style}",
            ),
        ]
    return cells


def _span(result: GridResult, domain: str, metric: str) -> float:
    """The axis of a column: its farthest point, with the bar where that is finite."""
    differences = [
        result.difference(row, domain, metric) for row in result.models if (row, domain, metric) in result.cells
    ]
    return max(abs(d.mean) + (2 * d.standard_error if d.standard_error < 1e9 else 0) for d in differences)


def _interval(result: GridResult, row: str, domain: str, metric: str) -> Small | None:
    if result.resamples > MOST_RESAMPLES:  # a file may ask for any number
        result = dataclasses.replace(result, resamples=MOST_RESAMPLES)
    interval = result.interval(row, domain, metric)
    if interval is None:
        return None
    low, high = interval
    return Small(f"95 % {measured(low, metric, sign=True)} to {measured(high, metric, sign=True)}")


def _harness(result: GridResult) -> Table:
    """Tasks of lm-evaluation-harness as plain numbers."""
    columns: list[tuple[str, str]] = []
    numbers: dict[tuple[str, str, str], float] = {}
    for row, tasks in result.harness.items():
        for task, metrics in (tasks if isinstance(tasks, dict) else {}).items():
            for metric, value in (metrics if isinstance(metrics, dict) else {}).items():
                if isinstance(value, int | float):
                    numbers[row, task, metric] = value
                    if "_stderr" not in metric and (task, metric) not in columns:
                        columns.append((task, metric))
    body: list[Row] = []
    for row in result.harness:
        cells: Row = [row]
        for task, metric in columns:
            name, comma, kind = metric.partition(",")
            measured_here = numbers.get((row, task, metric))
            error = numbers.get((row, task, f"{name}_stderr{comma}{kind}"))
            said = "" if error is None else f" ± {error:.4f}"
            cells.append("" if measured_here is None else f"{measured_here:.4f}{said}")
        body.append(cells)
    heads: list[Row] = [["model", *(f"{task} {metric.removesuffix(',none')}" for task, metric in columns)]]
    return Table("lm-evaluation-harness: value ± its standard error, not paired", heads, body)


def _sweep(sweep: SweepHere) -> Content:
    heads: list[Row] = [["settings", "seeds", "validation loss", "± over seeds", "base", Cell("remark", "word")]]
    body: list[Row] = [
        [
            c.settings,
            str(c.seeds),
            *(measured(x, LOSS) if x == x else "" for x in (c.mask, c.deviation, c.base)),
            _remark(c),
        ]
        for c in sweep.combinations
    ]
    tried = Table(f"{sweep.path}: settings tried; losses in nats per token on validation rows", heads, body)
    if not sweep.tests:
        return [tried, note("No choice was made yet: the sweep is not finished.")]
    tests = [_test(line) for line in sweep.tests]
    heads = [["row", Cell("domain"), "loss or share", "difference ± error", Cell("verdict", "word")]]
    return [tried, Table("The chosen settings on test rows, against the base", heads, tests, "grid"), note(LEGEND)]


def _remark(combination: Combination) -> Cell:
    if combination.failed:
        return Cell(f"failed: {combination.failed}", "word bad")
    return Cell("chosen", "word") if combination.chosen else Cell("", "word")


def _test(line: dict[str, Any]) -> Row:
    word, error, metric = str(line.get("verdict")), line.get("standard_error"), str(line.get("metric", LOSS))
    style, domain = verdict_style(word), line.get("domain") if metric == LOSS else f"{line.get('domain')} {metric}"
    value = measured(line[metric], metric)
    if line.get("row") == "base":
        return ["base", Cell(domain), value, Cell("reference", "even n"), Cell("")]
    uncertain = "unknown" if error is None else measured(error, metric)
    shown = f"{measured(line['difference'], metric, sign=True)} ± {uncertain}"
    return [
        line.get("row"),
        Cell(domain),
        value,
        Cell(shown, f"n {style}", 0.6 if style != "even" else None),
        Cell(word, f"word {style}"),
    ]

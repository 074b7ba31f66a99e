"""What the page is built of: sections, tables whose cells are shaded, and two small drawings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mftmerge.report.html import Html, el, join

PLAIN_WIDTH, PLAIN_HEIGHT = 120, 14  # units of the drawings


@dataclass(frozen=True)
class Cell:
    """A table's cell. style: classes; shade: 0..1, how strong the colour of its class is; span, rows: of the table."""

    content: Any
    style: str = ""
    shade: float | None = None
    span: int | None = None
    rows: int | None = None
    title: str | None = None


@dataclass(frozen=True)
class Section:
    """A part of the page: its name in the contents line, and what it holds."""

    id: str
    title: str
    body: Html


def table(caption: Any, heads: Sequence[Sequence[Any]], rows: Sequence[Sequence[Any]], style: str = "") -> Html:
    """A table in a box of its own that scrolls sideways; the first cell of a row is its heading.

    heads: one or two rows of headings, text or `Cell`, the first of them above the column of headings.
    rows: text or `Cell`; text is set to the right, as numbers are, but for the first of a row.
    """
    groups = [[h if isinstance(h, Cell) else Cell(h, "n") for h in row] for row in heads]
    groups[0][0] = Cell(groups[0][0].content, "corner", rows=len(groups))
    top = [el("tr", *(_cell(c, "th", "colgroup" if c.span else "col") for c in row)) for row in groups]
    body = []
    for row in rows:
        first, *others = (c if isinstance(c, Cell) else Cell(c, "n" if i else "") for i, c in enumerate(row))
        body.append(el("tr", _cell(first, "th", "row"), *(_cell(c, "td") for c in others)))
    whole = el("table", el("caption", caption), el("thead", *top), el("tbody", *body), cls=style)
    return el("div", whole, cls="scroll", role="group", tabindex="0", aria_label="table, scrolls sideways")


def _cell(cell: Cell, tag: str, scope: str | None = None) -> Html:
    shade = None if cell.shade is None else f"--v:{min(1.0, max(0.0, cell.shade)):.3f}"
    spans = {"colspan": cell.span, "rowspan": cell.rows if cell.rows != 1 else None}
    return el(tag, cell.content, cls=cell.style, style=shade, scope=scope, title=cell.title, **spans)


def heat(value: float, shown: Any, low: float, high: float, title: str | None = None) -> Cell:
    """A cell whose colour grows from `low` to `high`."""
    return Cell(shown, "n heat", (value - low) / (high - low) if high > low else 0.0, title=title)


def details(summary: Any, *content: Any) -> Html:
    """Something that opens on demand."""
    return el("details", el("summary", summary), *content)


def note(*parts: Any) -> Html:
    """A paragraph of small print."""
    return el("p", *parts, cls="note")


def whisker(mean: float, error: float, span: float, style: str) -> Html:
    """A point and a bar of two standard errors on either side, on an axis from -span to span with a line at 0."""
    middle, reach = PLAIN_WIDTH / 2, PLAIN_WIDTH / 2 - 4

    def at(value: float) -> str:
        return f"{middle + reach * max(-1.0, min(1.0, value / span)):.1f}" if span else f"{middle:.1f}"

    half = PLAIN_HEIGHT / 2
    drawn = (
        el("line", cls="axis", x1=middle, x2=middle, y1=0, y2=PLAIN_HEIGHT),
        el("line", cls="bar", x1=at(mean - 2 * error), x2=at(mean + 2 * error), y1=half, y2=half),
        el("circle", cx=at(mean), cy=half, r=3),
    )
    return _drawing(f"whisker {style}", drawn)


def bar(share: float) -> Html:
    """A bar of a share from 0 to 1, with a line at 1."""
    reach = (PLAIN_WIDTH - 8) / 1.2
    width = reach * max(0.0, min(1.2, share))
    top, bottom = 3, PLAIN_HEIGHT - 3
    middle = (top + bottom) / 2
    drawn = (
        el("line", cls="amount", x1=2, x2=f"{2 + width:.1f}", y1=middle, y2=middle),
        el("line", cls="axis", x1=f"{2 + reach:.1f}", x2=f"{2 + reach:.1f}", y1=0, y2=PLAIN_HEIGHT),
    )
    return _drawing("whisker", drawn)


def curve(points: Sequence[tuple[float, float]]) -> Html:
    """A line through (step, loss) points, lower losses lower down."""
    if len(points) < 2:
        return Html("")
    steps, losses = [p[0] for p in points], [p[1] for p in points]
    wide, high = max(steps) - min(steps) or 1.0, max(losses) - min(losses) or 1.0
    places = [
        (
            4 + (PLAIN_WIDTH - 8) * (step - min(steps)) / wide,
            2 + (2 * PLAIN_HEIGHT - 4) * (max(losses) - loss) / high,
        )
        for step, loss in points
    ]
    x, y = min(zip(places, losses, strict=True), key=lambda p: p[1])[0]
    line = el("polyline", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in places))
    return _drawing("curve", (line, el("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3)), 2 * PLAIN_HEIGHT)


def _drawing(style: str, parts: Sequence[Html], height: int = PLAIN_HEIGHT) -> Html:
    """An inline picture of fixed size; the numbers beside it say the same, so readers of the page skip it."""
    return el(
        "svg",
        join(parts),
        cls=style,
        viewBox=f"0 0 {PLAIN_WIDTH} {height}",
        width=PLAIN_WIDTH,
        height=height,
        aria_hidden="true",
        focusable="false",
    )

"""How results show themselves in a notebook: a table as HTML, a figure inside it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"gain": "#1f77b4", "worse": "#b2560d"}  # told apart by the words beside them as well


def table(heads: Sequence[str], rows: Sequence[Sequence[object]], title: str = "", notes: Sequence[str] = ()) -> str:
    """An HTML table of texts, which are escaped: first column to the left, a cell that ends with a verdict coloured."""
    lines = [f"<p><b>{escape(title)}</b></p>"] if title else []
    lines += ["<table><thead><tr>", *(f"<th>{escape(head)}</th>" for head in heads), "</tr></thead><tbody>"]
    for row in rows:
        cells = [_cell(str(value), "left" if i == 0 else "right") for i, value in enumerate(row)]
        lines += ["<tr>", *cells, "</tr>"]
    return "".join([*lines, "</tbody></table>", *(f"<p>{escape(note)}</p>" for note in notes)])


def _cell(text: str, side: str) -> str:
    verdict = text.rstrip(")").rpartition(", ")[2]
    colour = f"; color: {COLOURS[verdict]}" if verdict in COLOURS else ""
    return f'<td style="text-align: {side}{colour}">{escape(text).replace(chr(10), "<br>")}</td>'


def picture(figure: Figure) -> str:
    """A figure as SVG that stands in a page."""
    from io import StringIO

    text = StringIO()
    figure.savefig(text, format="svg")
    svg = text.getvalue()
    return f"<div>{svg[svg.index('<svg') :]}</div>"

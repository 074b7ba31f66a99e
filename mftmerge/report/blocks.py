"""What the page is built of, as values: text, tables, small drawings. templates/blocks.html says how each looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from mftmerge.report.template import LONGEST

WIDTH, HEIGHT = 120, 14  # units of the drawings
LONG = 60  # characters of a value that takes a line of its own


class Block:
    """Something on the page; `kind` names its macro."""

    kind: ClassVar[str]


# Text, a block, or several of them one after another.
Content: TypeAlias = "str | Block | Sequence[Content] | None"


@dataclass(frozen=True)
class Bold(Block):
    content: Content
    kind = "bold"


@dataclass(frozen=True)
class Small(Block):
    """A line of small print below what stands before it."""

    content: Content
    kind = "small"


@dataclass(frozen=True)
class Code(Block):
    content: str
    kind = "code"


@dataclass(frozen=True)
class Emphasis(Block):
    content: str
    kind = "emphasis"


@dataclass(frozen=True)
class Span(Block):
    """Text with classes, or with a name that links lead to."""

    content: Content
    style: str = ""
    id: str | None = None
    kind = "span"


@dataclass(frozen=True)
class Link(Block):
    content: str
    href: str
    kind = "link"


@dataclass(frozen=True)
class PathText(Block):
    """A path that may be broken into lines after each slash."""

    path: str
    kind = "path"

    @property
    def names(self) -> list[str]:
        return self.path[:LONGEST].split("/")


@dataclass(frozen=True)
class Heading(Block):
    content: str
    kind = "heading"


@dataclass(frozen=True)
class Paragraph(Block):
    content: Content
    style: str = ""
    kind = "paragraph"


def note(*parts: Content) -> Paragraph:
    """A paragraph of small print."""
    return Paragraph(parts, "note")


@dataclass(frozen=True)
class Bullets(Block):
    items: Sequence[Content]
    style: str = ""
    kind = "bullets"


@dataclass(frozen=True)
class Details(Block):
    """Something that opens on demand."""

    summary: Content
    content: Content
    kind = "details"


@dataclass(frozen=True)
class Facts(Block):
    """Names and values in two columns."""

    pairs: Mapping[str, str]
    kind = "facts"

    def is_long(self, value: str) -> bool:
        return len(value) > LONG


@dataclass(frozen=True)
class Cell:
    """A table's cell. style: classes; shade: 0..1, how strong the colour of its class is; span, rows: of the table."""

    content: Content
    style: str = ""
    shade: float | None = None
    span: int | None = None
    rows: int | None = None
    title: str | None = None


Row: TypeAlias = "list[Content | Cell]"


def heat(value: float, shown: Content, low: float, high: float, title: str | None = None) -> Cell:
    """A cell whose colour grows from `low` to `high`."""
    return Cell(shown, "n heat", (value - low) / (high - low) if high > low else 0.0, title=title)


@dataclass(frozen=True)
class Table(Block):
    """heads: one or two rows of headings, text or `Cell`, the first of them above the column of headings.

    rows: text or `Cell`; text is set to the right, as numbers are, but for the first of a row.
    """

    caption: str
    heads: Sequence[Row]
    rows: Sequence[Row]
    style: str = ""
    kind = "table"

    @property
    def head_rows(self) -> list[list[Cell]]:
        rows = [[h if isinstance(h, Cell) else Cell(h, "n") for h in row] for row in self.heads]
        rows[0][0] = Cell(rows[0][0].content, "corner", rows=len(rows) if len(rows) > 1 else None)
        return rows

    @property
    def body_rows(self) -> list[list[Cell]]:
        return [[c if isinstance(c, Cell) else Cell(c, "n" if i else "") for i, c in enumerate(r)] for r in self.rows]


@dataclass(frozen=True)
class Drawing(Block):
    """An inline picture of fixed size."""

    width: ClassVar[int] = WIDTH
    height: ClassVar[int] = HEIGHT


@dataclass(frozen=True)
class Whisker(Drawing):
    """A point and a bar of two standard errors on either side, on an axis from -span to span with a line at 0."""

    mean: float
    error: float
    span: float
    style: str
    kind = "whisker"

    def at(self, errors: float) -> float:
        """Where the mean and so many errors stand, inside the picture."""
        reach = WIDTH / 2 - 4
        share = (self.mean + errors * self.error) / self.span if self.span else 0.0
        return WIDTH / 2 + reach * max(-1.0, min(1.0, share))


@dataclass(frozen=True)
class Bar(Drawing):
    """A bar of a share from 0 to 1, with a line at 1."""

    share: float
    kind = "bar"

    def at(self, share: float) -> float:
        return (WIDTH - 8) / 1.2 * max(0.0, min(1.2, share))


@dataclass(frozen=True)
class Curve(Drawing):
    """A line through (step, loss) points, lower losses lower down; nothing for fewer than two."""

    points: Sequence[tuple[float, float]]
    kind = "curve"
    height: ClassVar[int] = 2 * HEIGHT

    @property
    def places(self) -> list[tuple[float, float]]:
        if len(self.points) < 2:
            return []
        steps, losses = zip(*self.points, strict=True)
        wide, high = max(steps) - min(steps) or 1.0, max(losses) - min(losses) or 1.0
        x = [4 + (WIDTH - 8) * (step - min(steps)) / wide for step in steps]
        y = [2 + (self.height - 4) * (max(losses) - loss) / high for loss in losses]
        return list(zip(x, y, strict=True))

    @property
    def lowest(self) -> tuple[float, float]:
        """Where the point with the lowest loss stands."""
        losses = [loss for _, loss in self.points]
        return self.places[losses.index(min(losses))]


@dataclass(frozen=True)
class Node:
    """A mask of a family tree."""

    name: Content
    operation: str | None
    options: str
    parents: list[Node]


@dataclass(frozen=True)
class Tree:
    """A family tree. cut: there are more relatives than are shown."""

    root: Node
    cut: bool


@dataclass(frozen=True)
class Trees(Block):
    """Family trees beside each other."""

    trees: Sequence[Tree]
    kind = "trees"


@dataclass(frozen=True)
class Section:
    """A part of the page: its name in the contents line, and what it holds."""

    id: str
    title: str
    body: Content

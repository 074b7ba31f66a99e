"""YAML with line numbers: every value of a document is found again by its path, so that errors can say where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mftmerge import yamltext
from mftmerge.errors import BadInput

Location = tuple[str | int, ...]
MERGE = "tag:yaml.org,2002:merge"


@dataclass
class Lines:
    """Line (from 1) of each value of one YAML document by its path; `at` falls back to the nearest parent."""

    lines: dict[Location, int] = field(default_factory=dict)

    def at(self, location: Location) -> int:
        """Line of the value at `location`. Parts that are not in the document (names of union branches) are skipped."""
        path: Location = ()
        for part in location:
            if (*path, part) in self.lines:
                path = (*path, part)
        return self.lines.get(path, 1)


@dataclass(frozen=True, order=True)
class Problem:
    """One thing wrong with a recipe, and its line (0: the whole file)."""

    line: int
    message: str


def report(path: Path, problems: list[Problem]) -> BadInput:
    """All problems as one error of one line, sorted by their lines in the recipe."""
    rows = [f"line {p.line}: {p.message}" if p.line else p.message for p in sorted(set(problems))]
    if len(rows) == 1:
        return BadInput(f"{path}: {rows[0]}")
    return BadInput(f"{path}: {len(rows)} problems: " + "; ".join(rows))


def load_documents(path: Path, text: str) -> tuple[list[tuple[Any, Lines]], list[Problem]]:
    """The documents of a YAML text with their lines, and repeated keys (which YAML readers silently overwrite).

    Raises BadInput when the text is not YAML.
    """
    problems: list[Problem] = []
    lines: list[Lines] = []

    def visit(node: yaml.Node) -> None:
        lines.append(Lines())
        problems.extend(_visit(node, (), lines[-1]))

    values = yamltext.documents(path, text, visit)
    return list(zip(values, lines, strict=True)), problems


def _visit(node: yaml.Node, path: Location, lines: Lines) -> Iterator[Problem]:
    lines.lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield from _visit(item, (*path, i), lines)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag == MERGE:  # `<<: *anchor`: its keys stand here too, under those that are given here
                _merged(value, path, lines)
        given: set[str] = set()
        for key, value in node.value:
            if key.tag == MERGE:
                continue
            if isinstance(key, yaml.ScalarNode):
                key.tag = "tag:yaml.org,2002:str"  # keys are names: YAML 1.1 would read `on` as true
            name = key.value if isinstance(key, yaml.ScalarNode) else str(key)
            if name in given:
                yield Problem(key.start_mark.line + 1, f"{name!r} is given twice; YAML keeps only the last")
            given.add(name)
            yield from _visit(value, (*path, name), lines)
            lines.lines[(*path, name)] = key.start_mark.line + 1


def _merged(node: yaml.Node, path: Location, lines: Lines) -> None:
    """Note the lines of what a merge key brings in: one mapping, or several of which the first wins."""
    for part in reversed(node.value) if isinstance(node, yaml.SequenceNode) else [node]:
        for _ in _visit(part, path, lines):  # what is wrong there is said where the anchor stands
            pass

"""Combinations to try on some masks: how they are written, the usual ones, and the command that makes each."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from mftmerge import plugins
from mftmerge.combination import Combination
from mftmerge.combine import combine
from mftmerge.errors import BadInput
from mftmerge.mask import Mask
from mftmerge.operations import OPERATIONS, Operation, find
from mftmerge.progress import Progress, Step
from mftmerge.settings import parsed

SYNTAX = "OP[@DENSITY][,OPTION=VALUE...], such as score@0.93, vote,threshold=2 or score@0.95:0.9,elect,weights=2:1"
OWN = re.compile(r"@own(?:\+([0-9.]+))?")  # in a preset, see `Operation`


@dataclass(frozen=True)
class Candidate:
    """One way to combine masks. text: as it is written, and what it is called; density: as `combine` takes it."""

    text: str
    op: str
    density: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """Read `OP[@DENSITY][,OPTION=VALUE...]`; an option without a value is switched on. Raises BadInput."""
        head, *settings = (part.strip() for part in text.split(","))
        op, at, density = head.partition("@")
        options: dict[str, Any] = {}
        for setting in settings:
            name, equals, value = setting.partition("=")
            name = name.replace("-", "_")
            if not name or name in options or (equals and not value):
                raise BadInput(f"candidate {text!r}: cannot read {setting!r}; write {SYNTAX}")
            if name == "density":
                raise BadInput(f"candidate {text!r}: the density stands after @; write {SYNTAX}")
            options[name] = value if equals else True
        if not op or (at and not density):
            raise BadInput(f"candidate {text!r}: write {SYNTAX}")
        try:
            found = find(op)
            options = {name: _value(found, name, value) for name, value in options.items()}
        except BadInput as e:
            raise BadInput(f"candidate {text!r}: {e}") from None
        return cls(",".join([head, *settings]), op, density.replace(":", ",") or None, options)

    def combine(self, masks: Sequence[Mask], names: Sequence[str]) -> Mask:
        """The masks combined in memory. Raises BadInput that names the candidate."""
        try:
            return combine(self.op, masks, names=names, density=self.density, **self.options)
        except BadInput as e:
            raise BadInput(f"candidate {self.text!r}: {e}") from None

    def command(self, files: Sequence[str], out: str, *, archive: bool = False) -> str:
        """The `mftmerge combine` command, quoted for a shell, that writes the same mask."""
        words = ["mftmerge", "combine", *files, "--op", self.op]
        words += ["--density", self.density] if self.density else []
        for name, value in self.options.items():
            option = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                words += [option] if value else []
            else:
                words.append(f"{option}={','.join(map(_number, value)) if isinstance(value, tuple) else value}")
        return shlex.join([*words, *(["--archive"] if archive else []), "-o", out])


def combined(
    candidates: Sequence[Candidate], masks: Sequence[Mask], labels: Sequence[str], progress: Progress | None
) -> tuple[dict[str, Mask], list[str]]:
    """The combined masks by the candidates' texts, and notes on those left out because another one is the same mask."""
    made: dict[str, Mask] = {}
    notes = []
    different = {c.text: c for c in candidates}
    for number, candidate in enumerate(different.values()):
        if progress:
            progress(Step("combining", number, len(different), "runs", detail=candidate.text))
        mask = candidate.combine(masks, labels)
        equal = next((text for text, other in made.items() if other.digest == mask.digest), None)
        if equal is None:
            made[candidate.text] = mask
        else:
            notes.append(f"{candidate.text} is the same mask as {equal}")
    return made, notes


def defaults(masks: Mapping[str, Mask]) -> tuple[list[Candidate], list[str]]:
    """What is tried without a list, the operations' presets, and notes on those that these masks cannot do."""
    own, labels = _own_density(masks), list(masks)
    found: dict[str, Candidate] = {}
    notes = []
    with suppress(BadInput):  # a plug-in that fails has no presets; who asks for its operation is told
        plugins.load()
    for op in OPERATIONS.values():
        refused: dict[str, list[str]] = {}  # reason -> presets
        for preset in op.presets:
            candidate = Candidate.parse(op.name + OWN.sub(lambda m: _between(own, m[1]), preset))
            try:
                Combination(op.name, list(masks.values()), labels, density=candidate.density, **candidate.options)
            except BadInput as e:
                refused.setdefault(str(e), []).append(candidate.text)
            else:
                found[candidate.text] = candidate
        for reason, texts in refused.items():
            all_of_it = len(texts) == len(op.presets)
            notes.append(f"{op.name if all_of_it else ' and '.join(texts)} is left out ({reason})")
    return list(found.values()), notes


def _own_density(masks: Mapping[str, Mask]) -> Decimal:
    """The density that the masks were made for, or that they have; the mean where they differ."""
    own = [Decimal(str(m.density() if m.info.keep is None else m.info.keep)) for m in masks.values()]
    return sum(own, Decimal(0)) / len(own)


def _between(own: Decimal, step: str | None) -> str:
    """`@` and a density that lies so far on the way from the masks' own to 1."""
    return f"@{_decimal(own + (1 - own) * Decimal(step or 0))}"


def _decimal(value: Decimal) -> str:
    """A density with at most four places, never rounded to 0."""
    return f"{max(round(value, 4), Decimal('0.0001')).normalize():f}"


def _number(value: float) -> str:
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def _value(op: Operation, name: str, given: str | bool) -> object:
    """An option's value, as its type says: several between colons; a switch, a number, or else the text."""
    field = op.field(name)
    if field is None or isinstance(given, bool):
        return given  # what it is not is said with what the operation takes
    return parsed(field, given, ":", name)

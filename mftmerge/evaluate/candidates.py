"""Combinations to try on some masks: how they are written, the usual ones, and the command that makes each."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from mftmerge.combination import Combination
from mftmerge.combine import combine
from mftmerge.errors import BadInput
from mftmerge.mask import Mask
from mftmerge.operations import find

SYNTAX = "OP[@DENSITY][,OPTION=VALUE...], such as score@0.93, vote,threshold=2 or score@0.9,elect,weights=2:1"
STEPS = ("0.2", "0.3", "0.4", "0.5")  # of the way from the masks' own density to 1


@dataclass(frozen=True)
class Candidate:
    """One way to combine masks. text: as it is written, and what it is called; density: the decimal as written."""

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
            options[name] = _value(name, value, text) if equals else True
        if not op or (at and not density):
            raise BadInput(f"candidate {text!r}: write {SYNTAX}")
        try:
            find(op)
        except BadInput as e:
            raise BadInput(f"candidate {text!r}: {e}") from None
        return cls(",".join([head, *settings]), op, density or None, options)

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
            if name == "weights":
                words.append(f"{option}={','.join(map(_number, value))}")
            elif name in ("threshold", "uncovered"):
                words.append(f"{option}={value}")
            elif name in ("elect", "allow_different_init"):
                words += [option] if value else []
            else:  # of an operation of another package
                words += ["--set", f"{name}={json.dumps(value) if isinstance(value, bool) else value}"]
        return shlex.join([*words, *(["--archive"] if archive else []), "-o", out])


def defaults(masks: Mapping[str, Mask]) -> tuple[list[Candidate], list[str]]:
    """What is tried without a list, and notes on what is left out: score where the masks carry no scores that add up.

    Beside the set operations, score at the masks' own density and at 20, 30, 40 and 50 % of the way from it to 1.
    The density at which the worst-served domain keeps most is not known beforehand.
    """
    own = _own_density(masks)
    found, notes = ["union", "intersection", "vote", f"vote@{_decimal(own)}"], []
    reason = _no_scores(masks)
    if reason:
        notes.append(f"score is left out ({reason})")
    else:
        between = {step: _decimal(own + (1 - own) * Decimal(step)) for step in ("0", *STEPS)}
        found += [f"score@{density}" for density in between.values()]
        if all(mask.has_initial_scores for mask in masks.values()):
            found += [f"score@{between[step]},elect" for step in ("0", "0.3")]
        else:
            notes.append("score with elect is left out (not all masks carry the scores before training)")
    return [Candidate.parse(text) for text in dict.fromkeys(found)], notes


def _own_density(masks: Mapping[str, Mask]) -> Decimal:
    """The density that the masks were made for, or that they have; the mean where they differ."""
    own = [Decimal(str(m.density() if m.info.keep is None else m.info.keep)) for m in masks.values()]
    return sum(own, Decimal(0)) / len(own)


def _no_scores(masks: Mapping[str, Mask]) -> str | None:
    """Why the masks cannot be added by their scores, None where they can."""
    try:
        Combination("score", list(masks.values()), list(masks), density=1)
    except BadInput as e:
        return str(e)
    return None


def _decimal(value: Decimal) -> str:
    """A density with at most four places, never rounded to 0."""
    return f"{max(round(value, 4), Decimal('0.0001')).normalize():f}"


def _number(value: float) -> str:
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def _value(name: str, text: str, candidate: str) -> Any:
    """An option's value: weights between colons; a switch, a number, or else the text."""
    if name == "weights":
        try:
            return tuple(float(w) for w in text.split(":"))
        except ValueError:
            raise BadInput(f"candidate {candidate!r}: weights are numbers between colons, such as 2:1") from None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, bool | int | float) else text

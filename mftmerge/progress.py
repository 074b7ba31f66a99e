"""The one progress channel: long work calls `progress(Step(...))`; a bar, a notebook or a log listens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Step:
    """How far some work is.

    what: the work in a few words ("building", "code.mask on math"). done of total: in `unit`; total 0 is not known yet.
    detail: what of it just now ("code.mask, math"), where the pace is the same for all of it.
    facts: numbers worth showing beside it, such as loss or density.
    """

    what: str
    done: int
    total: int
    unit: Literal["bytes", "steps", "rows", "runs"] = "steps"
    facts: Mapping[str, float | int | None] = field(default_factory=dict)
    detail: str = ""


Progress = Callable[[Step], None]

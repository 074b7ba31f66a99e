"""The page's templates: text is escaped unless a template wrote it, so what a file says cannot become markup."""

from __future__ import annotations

import re
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

LONGEST = 400  # characters of one piece of text from a file
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(value: object) -> str:
    """A value as a string of characters that can be seen: control, direction and surrogate ones become U+FFFD."""
    return _CONTROL.sub("\ufffd", str(value))


def _shown(value: object) -> object:
    """What a template writes of a value: visible characters, `LONGEST` at most."""
    if isinstance(value, Markup):
        return value
    plain = str(value)
    return visible(plain if len(plain) <= LONGEST else plain[:LONGEST] + "…")


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("mftmerge.report"),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(name: str, /, **values: object) -> str:
    """A template of `templates/` with its values."""
    return _environment().get_template(name).render(values)

"""HTML from Python values. Text is escaped unless it is `Html` already, so what a file says cannot become markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any

LONGEST = 400  # characters of one piece of text from a file
VOID = {"meta"}  # HTML elements that have no end
DRAWN = {"line", "circle", "polyline"}  # SVG elements without content
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Html(str):
    """A string that is HTML."""


def visible(value: Any) -> str:
    """A value as a string of characters that can be seen: control, direction and surrogate ones become U+FFFD."""
    return _CONTROL.sub("\ufffd", str(value))


def text(value: Any) -> Html:
    """A value as HTML text: escaped, visible, and cut at `LONGEST`."""
    if isinstance(value, Html):
        return value
    plain = str(value)
    return Html(html.escape(visible(plain if len(plain) <= LONGEST else plain[:LONGEST] + "…")))


def el(tag: str, *children: Any, **attributes: Any) -> Html:
    """An element of text or Html. In names of attributes `cls` is class and `_` is `-`. None is left out everywhere."""
    given = "".join(
        f' {"class" if k == "cls" else k.replace("_", "-")}="{text(v)}"'
        for k, v in attributes.items()
        if v is not None and v != ""
    )
    if tag in VOID or tag in DRAWN:
        return Html(f"<{tag}{given}{'/' if tag in DRAWN else ''}>")
    return Html(f"<{tag}{given}>{join(children)}</{tag}>")


def join(children: Iterable[Any], between: str = "") -> Html:
    """Several pieces of text or Html as one."""
    return Html(between.join(text(child) for child in children if child is not None))


def path(value: Any) -> Html:
    """A path that may be broken into lines after each slash."""
    return join(str(value)[:LONGEST].split("/"), "/<wbr>")

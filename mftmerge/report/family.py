"""Family trees of combined masks."""

from __future__ import annotations

from typing import Any

from mftmerge.mask import MaskInfo, Parent
from mftmerge.report.blocks import Section, note
from mftmerge.report.collect import Collection, MaskHere
from mftmerge.report.html import Html, el, join
from mftmerge.report.numbers import options

MOST_RELATIVES = 200  # lines of one family tree


def family_section(found: Collection) -> Section | None:
    """What each combined mask was made from."""
    trees = [_tree(found, mask) for mask in found.masks if mask.found.info.parents]
    if not trees:
        return None
    lead = note("What each combined mask was made from. The short code is the beginning of a mask's digest.")
    return Section("family", "Family tree", join([lead, el("div", *trees, cls="trees")]))


def _tree(found: Collection, mask: MaskHere) -> Html:
    here = {m.found.digest: (m.name, i) for i, m in enumerate(found.masks)}
    lines = [0]
    tree = el("ul", _node(mask.found.info, el("b", mask.name), here, lines), cls="tree")
    return el("div", tree, note("The rest of this tree is left out.") if lines[0] > MOST_RELATIVES else None)


def _node(info: MaskInfo | Parent, name: Any, here: dict[str, tuple[str, int]], lines: list[int]) -> Html:
    """One mask of a tree with its parents below it."""
    lines[0] += 1
    made = el("span", el("b", info.operation), options(info.options), cls="chip") if info.operation else None
    parents = [
        _node(parent, _relative(parent, here), here, lines) for parent in info.parents if lines[0] <= MOST_RELATIVES
    ]
    return el("li", el("span", name, " " if made else None, made, cls="node"), el("ul", *parents) if parents else None)


def _relative(parent: Parent, here: dict[str, tuple[str, int]]) -> Html:
    known = here.get(parent.digest)
    name = el("a", known[0], href=f"#mask-{known[1]}") if known else el("span", parent.name)
    weight = f" × {parent.weight:g}" if parent.weight is not None else None
    return join([name, weight, " ", el("code", parent.digest[:12])])

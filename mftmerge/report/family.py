"""Family trees of combined masks."""

from __future__ import annotations

from itertools import islice

from mftmerge.mask import MaskInfo, Parent
from mftmerge.report.blocks import Bold, Code, Content, Link, Node, Section, Span, Tree, Trees, note
from mftmerge.report.collect import Collection, MaskHere
from mftmerge.report.numbers import options

MOST_RELATIVES = 200  # of one family tree


def family_section(found: Collection) -> Section | None:
    """What each combined mask was made from."""
    trees = [_tree(found, mask) for mask in found.masks if mask.found.info.parents]
    if not trees:
        return None
    lead = note("What each combined mask was made from. The short code is the beginning of a mask's digest.")
    return Section("family", "Family tree", [lead, Trees(trees)])


def _tree(found: Collection, mask: MaskHere) -> Tree:
    here = {m.found.digest: (m.name, i) for i, m in enumerate(found.masks)}
    relatives = list(islice(mask.found.info.family(), MOST_RELATIVES + 1))
    path = [_node(mask.found.info, Bold(mask.name))]  # from the mask down to the last relative
    for generation, parent in relatives[:MOST_RELATIVES]:
        node = _node(parent, _relative(parent, here))
        del path[generation:]
        path[-1].parents.append(node)
        path.append(node)
    return Tree(path[0], len(relatives) > MOST_RELATIVES)


def _node(info: MaskInfo | Parent, name: Content) -> Node:
    return Node(name, info.operation, options(info.options), [])


def _relative(parent: Parent, here: dict[str, tuple[str, int]]) -> Content:
    known = here.get(parent.digest)
    weight = f" × {parent.weight:g}" if parent.weight is not None else None
    name = Link(known[0], f"#mask-{known[1]}") if known else Span(parent.name)
    return [name, weight, " ", Code(parent.digest[:12])]

"""The model card of a masked checkpoint: what was done to it, the mask's family tree, and the original's own card.

What strangers wrote (a mask's metadata, a card's front matter) is read with limits and shown as inert text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mftmerge.errors import BadInput, shown
from mftmerge.files import refuse_pointer
from mftmerge.inspection import family_tree
from mftmerge.mask import Mask, MaskInfo
from mftmerge.yamltext import documents

# Front matter that stays true of a masked model. Evaluation results and widget examples do not.
KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name", "datasets", "tags")
MAX_CARD = 1 << 20  # bytes of an original card that are quoted
MAX_ENTRY = 1 << 14  # characters of one entry of its front matter
MAX_TEXT = 200  # characters of one foreign name or value
KEY = re.compile(r"^([A-Za-z_]+):")


def model_card(title: str, mask: Mask, digest: str, facts: Sequence[str], model: str, original: str | None) -> str:
    """README.md as text.

    title: heading; digest: the mask's; facts: sentences on this application; model: name of the model masked (a hub id,
    or a directory's name); original: that model's own README.md, if it has one.
    """
    front, body = split_front_matter(original or "")
    tree = mask_tree(mask, digest)
    base_model = [model] if model.count("/") == 1 else None
    lines = [
        front_matter(front, ("mftmerge", "mask-fine-tuning"), base_model),
        f"# {inert(title)}",
        f"`{inert(model)}` with a weight mask applied by mftmerge.",
        "\n".join(f"- {fact}" for fact in facts),
        "## The mask",
        "```\n" + "\n".join(tree) + "\n```",
    ]
    if body.strip():
        lines += [f"## Card of `{inert(model)}`", body.strip()]
    return "\n\n".join(lines) + "\n"


def mask_tree(mask: Mask, digest: str) -> list[str]:
    """The mask and its ancestors as lines that are fit for a card, local paths without their directories."""
    return family_tree(f"mask {digest[:12]}{_origin(mask.info)}", mask.info, inert, public_name)


def front_matter(front: Mapping[str, Any], tags: Sequence[str], base_model: Sequence[str] | None) -> str:
    """A card's YAML block: entries of `KEPT` as `split_front_matter` gives them, more tags, and the models it is of."""
    from huggingface_hub import ModelCardData  # a quarter of a second, which only this needs

    own = front.get("tags", [])
    entries = dict(front) | {"tags": sorted({*([own] if isinstance(own, str) else own), *tags})}
    data = ModelCardData(base_model=list(base_model) if base_model else None, **entries)
    return f"---\n{data.to_yaml().strip()}\n---"


def split_front_matter(card: str) -> tuple[dict[str, str | list[str]], str]:
    """The entries of a card's YAML front matter that are in `KEPT`, texts and lists of texts, and the card's body.

    Only those entries are parsed, each for itself: one that is no YAML, too long or nested is left out.
    """
    if not card.startswith("---\n") or "\n---" not in card[3:]:
        return {}, card
    head, _, body = card[4:].partition("\n---")
    entries: dict[str, list[str]] = {}
    current: list[str] = []
    for line in head.split("\n"):
        if found := KEY.match(line):
            current = entries.setdefault(found[1], [])
        elif line[:1] not in ("", " ", "-", "#"):
            current = []  # something else begins
        current.append(line)
    front: dict[str, str | list[str]] = {}
    for key in KEPT:
        if key in entries and (value := _parsed(key, "\n".join(entries[key]))):
            front[key] = value
    return front, body.lstrip("-")


def _parsed(key: str, text: str) -> str | list[str] | None:
    """The value of one entry `key: ...`; None unless it is a short text or list of such."""
    nested = text.count("[") + text.count("{") > 20  # PyYAML takes seconds over thousands
    if len(text) > MAX_ENTRY or nested or any(not (c.isprintable() or c in "\n\t") for c in text):
        return None
    try:
        value = documents(Path("README.md"), text)[0][key]
    except (BadInput, LookupError, TypeError):
        return None
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(v, str | int | float) and 0 < len(str(v)) <= MAX_TEXT for v in values):
        return None
    return [str(v) for v in values] if isinstance(value, list) else str(value)


def read_card(path: Path) -> str | None:
    """An existing README.md, or None when there is none or it is too large to be one."""
    if not path.is_file() or path.stat().st_size > MAX_CARD:
        return None
    refuse_pointer(path)
    return path.read_text(encoding="utf-8", errors="replace")


def public_name(reference: str) -> str:
    """A model's name for others to read: a hub id as it is, of a local path only the last part."""
    try:
        local = Path(reference).expanduser()
        name = local.resolve().name if local.is_absolute() or local.exists() else reference
    except (OSError, ValueError, RuntimeError):  # no path at all: too long, a NUL, ~nobody
        name = reference
    return inert(name)


def inert(text: object) -> str:
    """Foreign text as one line that means nothing to markdown in a heading, between backticks or in a fence."""
    plain = " ".join(shown(" ".join(str(text)[: 4 * MAX_TEXT].split())).split())
    for mark, harmless in (("`", "'"), ("<", "‹"), (">", "›")):
        plain = plain.replace(mark, harmless)
    return plain if len(plain) <= MAX_TEXT else f"{plain[: MAX_TEXT - 1]}…"


def _origin(info: MaskInfo) -> str:
    """Where a mask that no operation made comes from, to stand behind its name."""
    if info.operation:
        return ""
    trained = f": trained over {public_name(info.base)}" if info.base else ": origin not recorded"
    return trained if info.keep is None else f"{trained}, keep {info.keep:g}"

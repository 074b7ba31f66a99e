"""The model card of a masked checkpoint: what was done to it, the mask's family tree, and the original's own card."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from mftmerge.mask import Mask, MaskInfo, Parent

# Front matter that stays true of a masked model. Evaluation results and widget examples do not.
KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name", "datasets", "tags")
MAX_CARD = 1 << 20  # bytes of an original card that are quoted


def model_card(title: str, mask: Mask, digest: str, facts: Sequence[str], model: str, original: str | None) -> str:
    """README.md as text.

    title: heading; digest: the mask's; facts: sentences on this application; model: name of the model masked (a hub id,
    or a directory's name); original: that model's own README.md, if it has one.
    """
    front, body = split_front_matter(original or "")
    front = {k: front[k] for k in KEPT if k in front}
    tags = front.get("tags")
    front["tags"] = sorted({*(map(str, tags) if isinstance(tags, list) else []), "mftmerge", "mask-fine-tuning"})
    if model.count("/") == 1:
        front["base_model"] = [model]
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {title}",
        f"`{model}` with a weight mask applied by mftmerge.",
        "\n".join(f"- {fact}" for fact in facts),
        "## The mask",
        "```\n" + "\n".join(family_tree(mask, digest)) + "\n```",
    ]
    if body.strip():
        lines += [f"## Card of {model}", body.strip()]
    return "\n\n".join(lines) + "\n"


def family_tree(mask: Mask, digest: str) -> Iterator[str]:
    """The mask and what it was made of, one line each, indented by generation."""
    yield f"mask {digest[:12]}: {_origin(mask.info)}"
    yield from _parents(mask.info.parents, "  ")


def split_front_matter(card: str) -> tuple[dict[str, Any], str]:
    """YAML front matter and body of a model card. Unreadable front matter counts as none."""
    if not card.startswith("---\n") or "\n---" not in card[3:]:
        return {}, card
    head, _, body = card[4:].partition("\n---")
    try:
        front = yaml.safe_load(head)
    except yaml.YAMLError:
        front = None
    return (front if isinstance(front, dict) else {}), body.lstrip("-")


def read_card(path: Path) -> str | None:
    """An existing README.md, or None when there is none or it is too large to be one."""
    if not path.is_file() or path.stat().st_size > MAX_CARD:
        return None
    return path.read_text(encoding="utf-8", errors="replace")


def public_name(reference: str) -> str:
    """A model's name for others to read: a hub id as it is, of a local path only the last part."""
    local = Path(reference).expanduser()
    name = local.resolve().name if local.exists() or local.is_absolute() else reference
    return " ".join(name.replace("`", "'").split())


def _parents(parents: Sequence[Parent], indent: str) -> Iterator[str]:
    for p in parents:
        weight = f", weight {p.weight:g}" if p.weight is not None else ""
        made = f" = {_operation(p.operation, p.options)} of" if p.operation else ""
        yield f"{indent}{public_name(p.name)} {p.digest[:12]}{weight}{made}"
        yield from _parents(p.parents, indent + "  ")


def _origin(info: MaskInfo) -> str:
    if info.operation:
        return f"{_operation(info.operation, info.options)} of"
    parts = [f"trained over {public_name(info.base)}" if info.base else "origin not recorded"]
    if info.keep is not None:
        parts.append(f"keep {info.keep:g}")
    return ", ".join(parts)


def _operation(operation: str, options: dict[str, Any]) -> str:
    given = ", ".join(f"{k}={v}" for k, v in sorted(options.items()) if v is not None)
    return f"{operation}({given})" if given else operation

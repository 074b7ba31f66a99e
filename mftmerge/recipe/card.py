"""The files that explain a built model: model card, the recipe as mergekit reads it, and the masks used."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from mftmerge.card import front_matter, inert
from mftmerge.recipe.check import mask_uses, result_index
from mftmerge.recipe.load import Recipe
from mftmerge.recipe.locate import MaskBook, looks_like_hub_id
from mftmerge.recipe.schema import BaseInput, Document, MaskUse, ModelInput

CARD = """{metadata}

# {name}

Built with mftmerge through mergekit (merge method `{method}`).

| model | role | mask | kept |
|---|---|---|---|
{rows}

The masks are in `masks/`, the recipe is in `mftmerge_recipe.yml`:

{fence}yaml
{recipe}{fence}
"""


def mergekit_yaml(document: Document) -> str:
    """The document as mergekit would read it: without masks, which a first line then says."""
    data: dict[str, object] = {"merge_method": document.merge_method}
    if document.base_model:
        data["base_model"] = document.base_model.model.to_mergekit()
    plain = document.model_dump(exclude_none=True, mode="json")
    for key in ("models", "slices", "modules", "parameters", "dtype", "out_dtype"):
        if key in plain:
            data[key] = _without_masks(plain[key], key in ("parameters",))
    for key in ("tokenizer_source", "tokenizer", "chat_template"):
        if key in plain:
            data[key] = _without_masks(plain[key], True)
    text = yaml.safe_dump(data, sort_keys=False)
    if list(mask_uses(document)):
        text = "# without the masks that mftmerge applied: see mftmerge_recipe.yml\n" + text
    return text


def _without_masks(value: object, verbatim: bool) -> object:
    if isinstance(value, list):
        return [_without_masks(v, verbatim) for v in value]
    if not isinstance(value, dict):
        return value
    if "path" in value:
        from mftmerge.recipe.schema import Reference

        return Reference.model_validate(value).to_mergekit()
    kept: dict[str, object] = {}
    for key, part in value.items():
        if key == "mask" and not verbatim:
            continue
        is_base = key == "base_model" and isinstance(part, dict) and "model" in part
        kept[key] = _without_masks(part["model"] if is_base else part, verbatim or key == "parameters")
    return kept


def slug(text: str) -> str:
    """A file name from a mask's label."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text.removesuffix(".mask")).strip("-")[:80] or "mask"


def masks_used(recipe: Recipe, document: Document) -> list[tuple[str, MaskUse, str]]:
    """Each mask a document applies: whose ("the result" for an output mask), the mask, and its label."""
    book = recipe.masks(document)
    found = [(str(i.model), i.mask, book.label(i.mask)) for _, i in document.parts() if i.mask]
    return found + ([("the result", document.mask, book.label(document.mask))] if document.mask else [])


def write_companions(recipe: Recipe, out: Path, name: str) -> None:
    """Write README.md, mergekit_config.yml, mftmerge_recipe.yml and masks/ into a built model."""
    final = recipe.documents[result_index(recipe.documents)]
    (out / "mftmerge_recipe.yml").write_text(recipe.text, encoding="utf-8")
    (out / "mergekit_config.yml").write_text(mergekit_yaml(final), encoding="utf-8")
    rows, saved = [], set()
    for document in recipe.documents:
        book = recipe.masks(document)
        roles: list[tuple[object, ModelInput | BaseInput, str]] = [(w, i, "input") for w, i in document.inputs()]
        roles += [(w, b, "base") for w, b in document.bases()]
        rows += [_row(str(item.model), role, item.mask, book) for _, item, role in roles]
        if document.mask:
            rows.append(_row(document.name or "the result", "output", document.mask, book))
        for _, use, label in masks_used(recipe, document):
            mask = book.evaluate(use)
            path = out / "masks" / f"{slug(label)}.mask"
            if mask.digest not in saved:
                if path.exists():
                    path = path.with_name(f"{slug(label)}-{mask.digest[:8]}.mask")
                path.parent.mkdir(exist_ok=True)
                mask.save(path)
                saved.add(mask.digest)
    hub = sorted({str(i.model) for d in recipe.documents for _, i in d.inputs() if looks_like_hub_id(i.model.path)})
    card = CARD.format(
        metadata=front_matter({"library_name": "transformers"}, ["merge", "mergekit", "mftmerge"], hub),
        name=inert(name),
        method=final.merge_method,
        rows="\n".join(dict.fromkeys(rows)),
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", recipe.text)), default=0)),
        recipe=recipe.text if recipe.text.endswith("\n") else recipe.text + "\n",
    )
    (out / "README.md").write_text(card, encoding="utf-8")


def _row(model: str, role: str, use: MaskUse | None, book: MaskBook) -> str:
    if use is None:
        return f"| {_cell(model)} | {role} | - | 1 |"
    mask = book.evaluate(use)
    what = f"{_cell(book.label(use))}, on {use.on}"
    return f"| {_cell(model)} | {role} | {what} | {mask.density():.4f} of {len(mask.names)} tensors |"


def _cell(text: str) -> str:
    """A name as code in a table: inert, whatever it holds."""
    return f"`{inert(text)}`".replace("|", "\\|")

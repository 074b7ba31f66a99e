"""Masks of a recipe that are still to be learnt: where they may stand, and the recipe without them."""

from __future__ import annotations

from collections.abc import Iterator

from mftmerge.recipe.check import mask_uses
from mftmerge.recipe.lines import Location
from mftmerge.recipe.schema import Document, Learn

METHODS = ("task_arithmetic", "select")  # whose result has a gradient by each input's change, weight by weight


def to_learn(document: Document) -> tuple[tuple[int, Learn], ...]:
    """The entries of `models:` whose masks are to be learnt: their numbers, and what from."""
    models = document.models or ()
    return tuple((i, m.mask.learn) for i, m in enumerate(models) if m.mask and m.mask.learn)


def without(document: Document) -> Document:
    """The document without its open masks."""
    if not document.models:
        return document
    models = tuple(m.model_copy(update={"mask": None}) if m.mask and m.mask.learn else m for m in document.models)
    return document.model_copy(update={"models": models})


def problems(document: Document, *, documents: int, learning: bool) -> Iterator[tuple[Location, str]]:
    """What is wrong with a document's open masks. documents: how many the recipe has. learning: they are to be learnt
    now; otherwise any is one too many."""
    found = [(where, use) for where, use in mask_uses(document) if use.learn]
    if not found:
        if learning:
            yield ("models",), "there is no mask to learn: give a model mask: {learn: {data: ROWS}}"
        return
    if not learning:
        count = "a mask is" if len(found) == 1 else f"{len(found)} masks are"
        yield (
            found[0][0],
            f"{count} still to be learnt: run `mftmerge train --recipe`, and use the recipe that it writes",
        )
        return
    for where, use in found:
        if len(where) != 3 or where[0] != "models":
            yield where, "a mask that is to be learnt belongs to an entry of models:"
        if "on" in use.model_fields_set and use.on == "weights":
            yield (*where, "on"), "a mask that is to be learnt keeps changes: leave on: out"
    if document.merge_method not in METHODS:
        text = f"{document.merge_method} cannot take a mask that is to be learnt; use {' or '.join(METHODS)}"
        yield ("merge_method",), text
    if documents > 1:
        yield found[0][0], "masks are learnt in a recipe of one document; build the others first"
    if document.mask:
        yield ("mask",), "masks are learnt on a merge whose result has none; leave it out and apply it afterwards"
    for key in ("tokenizer", "tokenizer_source"):
        if getattr(document, key) not in (None, "base"):
            yield (key,), "masks are learnt over one vocabulary, the base's; leave it out"

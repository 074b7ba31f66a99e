"""What becomes of each document of a recipe in an export, decided from its text and from headers, before any work.

A document is stock mergekit's own, with masked checkpoints for inputs; the mask of its result goes on its inputs, or is
a second merge (kmask.py). Where none of that is exact, or can be run, the export has the result itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mftmerge.checkpoint import TensorEntry
from mftmerge.mask import Mask
from mftmerge.matching import EMBEDDINGS, HEADS
from mftmerge.recipe.catalogue import METHODS
from mftmerge.recipe.check import references
from mftmerge.recipe.load import Recipe
from mftmerge.recipe.locate import absolute, model_directory
from mftmerge.recipe.schema import DTYPES, Document, MaskUse, Reference

if TYPE_CHECKING:
    from mftmerge.recipe.headers import Header

AS_RESULT = ("localize_and_stitch", "select", "emr")  # methods of ours that no stock method computes
PUSH_DOWN = ("task_arithmetic", "ties", "dare_ties", "dare_linear", "breadcrumbs", "breadcrumbs_ties")
ALIKE = {"masked": "passthrough", "consensus": "task_arithmetic"}  # the stock methods that two of ours become


def stock_form(method: str) -> str:
    """What a merge method becomes in an export, for the reference."""
    if not METHODS[method].ours:
        return "the method itself"
    if method in AS_RESULT or METHODS[method].function:
        return "the result itself, passed through"
    return {
        "masked": "`passthrough` of a masked checkpoint: equal bits",
        "consensus": "its mask computed, then `task_arithmetic` over localised checkpoints: equal values",
    }[method]


class StockForms:
    """The decisions about one recipe's documents."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.stages = {d.name: d for d in recipe.documents if d.name}
        self._headers: dict[str, Header] = {}

    def why_result(self, document: Document) -> str | None:
        """Why a document is exported as its result; None when it has an exact stock form."""
        method = document.merge_method
        if method in AS_RESULT or METHODS[method].function:
            return f"stock mergekit has no method that computes {method}"
        if method in ALIKE and (reason := self._why_unlike(document)):
            return reason
        if document.mask is None or self.pushes_down(document):
            return None
        if document.tokenizer or document.tokenizer_source:
            return "the shapes that the output mask needs depend on the merged tokenizer"
        if document.modules:
            return "an output mask over several modules has no stock form"
        base = document.mask.base or (document.base_model.model if document.base_model else None)
        return self.why_no_second_merge(self.recipe.tensors(document), document.mask, base)

    def why_no_second_merge(self, entries: Sequence[TensorEntry], use: MaskUse, base: Reference | None) -> str | None:
        """Why a mask on a result with these tensors cannot be a second merge over a K-mask; None when it can."""
        types = {e.dtype for e in entries}
        fitting = types == {"F16"} or types <= {"BF16", "F32", "F64"}
        if not fitting or (use.on == "delta" and len(types) > 1):
            return f"its tensors are of types {', '.join(sorted(types))}, for which no one K-mask is exact"
        if use.on == "weights" or base is None:
            return None
        header = self.header(base)
        other = next((e.name for e in entries if e.name not in header or header[e.name][0] != e.shape), None)
        return other and f"{base} has no {other} of the result's shape, to take dropped weights from"

    def pushes_down(self, document: Document) -> bool:
        """Whether the result's mask can go on the inputs: where that is exact, and takes no more checkpoints."""
        mask, items = document.mask, document.models or ()
        method = ALIKE.get(document.merge_method, document.merge_method)
        if document.merge_method == "masked":
            items = as_passthrough(document).models or ()
        if mask is None or not items or document.tokenizer or document.tokenizer_source:
            return False
        if any(i.model.path in self.stages or i.model.lora for i in items):
            return False
        on_inputs = method == "passthrough" and not document.sets("scale")
        on_deltas = (
            method in PUSH_DOWN
            and mask.on == "delta"
            and mask.base is None
            and len(items) <= 2
            and not any(document.sets(k) for k in ("density", "rescale"))
        )
        if not on_inputs and not on_deltas:
            return False
        base: Reference | None = None
        if mask.on == "delta":
            base = mask.base or (document.base_model.model if document.base_model else None)
            # Dropped weights of a build go from the base's type to the result's, of an export through `dtype`.
            if base is None or base.lora or (document.out_dtype and document.dtype not in (None, document.out_dtype)):
                return False
        evaluated = self.recipe.masks(document).evaluate(mask)
        return all(self._fits(evaluated, i.model, base) for i in items)

    def header(self, reference: Reference) -> Header:
        """Shapes and types of the tensors of a model, or of an earlier document's result."""
        from mftmerge.recipe.headers import header  # torch

        if reference.path in self.stages:
            return {e.name: (e.shape, e.element.torch) for e in self.recipe.tensors(self.stages[reference.path])}
        if reference.path not in self._headers:
            found = model_directory(reference.path, self.recipe.folder, reference.revision)
            self._headers[reference.path] = header(found)
        return self._headers[reference.path]

    def why_not_staged(self, documents: Sequence[Document], out: Path) -> str | None:
        """Why mergekit-multi, which runs several merges, cannot run these; None when it can."""
        stages = {name: Path(name) for name in self.stages}
        paths = [str(out)]
        for document in documents:
            if self.why_result(document) is None:
                found = [absolute(r, self.recipe.folder, stages) for _, r in references(document)]
                paths += [part for r in found for part in (r.path, r.lora) if part]
        # It writes each reference down as one text and reads that again; with a space or quotation mark it cannot.
        if odd := next((p for p in paths if any(c in p for c in ' "+@')), None):
            return f"mergekit-multi cannot run several merges with a space, quotation mark, + or @ in a path ({odd})"
        # It takes any text of a configuration that is a document's name for that document.
        if taken := next((d.name for d in documents if d.name in (*METHODS, *DTYPES, "union", "base")), None):
            return f"mergekit-multi takes {taken} for the document of that name wherever it stands; rename it"
        return None

    def _why_unlike(self, document: Document) -> str | None:
        """Why `masked` or `consensus` is not what its stock method makes of masked checkpoints; None when it is."""
        method, base = document.merge_method, document.base_model.model if document.base_model else None
        if not document.models:
            return f"{method} over slices has no stock form"
        if document.tokenizer or document.tokenizer_source:
            return f"the rows that {method} masks depend on the merged tokenizer"
        unfit = f"{method} masks tensors of the result, and the models' files have other names, shapes or types than it"
        if method == "consensus":
            shapes = {e.name: e.shape for e in self.recipe.tensors(document)}
            return None if all(self._have(shapes, i.model, base) for i in document.models) else unfit
        for item in document.models:
            text = {**(document.parameters or {}), **(item.parameters or {})}.get("mask")
            if text is not None and (item.mask or not isinstance(text, str)):
                return "a model has several masks"
            if text is not None and not self._fits(
                self.recipe.masks(document).evaluate(MaskUse(file=text)), item.model, base
            ):
                return unfit
        return None

    def _fits(self, mask: Mask, model: Reference, base: Reference | None) -> bool:
        """Whether a mask on a result's tensors means the same on a model's, and on those of the base it drops to."""
        # A mask on one of tied embeddings and head covers both in a checkpoint (matching.py), in a result only the one.
        tied = [n for n in self.header(model) if n.endswith(HEADS + EMBEDDINGS)]
        if len({n in mask for n in tied}) > 1:
            return False
        return self._have({n: tuple(mask.shape(n)) for n in mask.names}, model, base)

    def _have(self, shapes: Mapping[str, tuple[int, ...]], model: Reference, base: Reference | None) -> bool:
        """Whether a model has weights of these names and shapes, and the base, if any, ones of the same type."""
        found = self.header(model)
        other = self.header(base) if base else found
        return all(
            n in found and found[n][0] == shape and found[n][1].is_floating_point and other.get(n) == found[n]
            for n, shape in shapes.items()
        )


def as_passthrough(document: Document) -> Document:
    """`masked` as stock passthrough of its one model; its mask becomes the model's."""
    parameters = dict(document.parameters or {})
    given = parameters.pop("mask", None)
    models = []
    for item in document.models or ():
        own = dict(item.parameters or {})
        text = own.pop("mask", given)
        own.pop("missing", None)
        mask = item.mask
        if mask is None and text is not None:
            mask = MaskUse(file=text, on="delta" if document.base_model else "weights")
        base = document.base_model
        if base is None or (item.model, item.mask) != (base.model, base.mask):
            models.append(item.model_copy(update={"mask": mask, "parameters": own or None}))
    changes: dict[str, object] = {"merge_method": "passthrough", "parameters": None}
    return document.model_copy(update=changes | ({"models": tuple(models)} if models else {}))

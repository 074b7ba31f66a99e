"""Checks of a recipe against the files it names: models and masks exist, and agree in names and shapes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mftmerge.checkpoint import Checkpoint
from mftmerge.errors import BadInput
from mftmerge.mask import Mask
from mftmerge.recipe.catalogue import METHODS
from mftmerge.recipe.check import groups, references
from mftmerge.recipe.lines import Location
from mftmerge.recipe.locate import WEIGHTS, MaskBook, local, looks_like_hub_id, model_directory
from mftmerge.recipe.schema import BaseInput, Document, MaskUse, ModelInput, Reference

Shapes = dict[str, tuple[int, ...]]


class FileChecks:
    """Checks of one document. `stages`: names of the recipe's documents, whose results do not exist yet."""

    def __init__(self, folder: Path, document: Document, stages: frozenset[str]) -> None:
        self.folder, self.document, self.stages = folder, document, stages
        self.book = MaskBook(folder, document.masks)
        self.warnings: list[tuple[Location, str]] = []
        self._shapes: dict[str, Shapes | None] = {}

    def problems(self) -> Iterator[tuple[Location, str]]:
        """Everything wrong with the files, with its place; fills `warnings`."""
        absent: set[str] = set()
        for where, reference in references(self.document):
            try:
                self._directories(reference)
            except BadInput as e:
                absent.add(str(reference))
                yield where, str(e)
        for name, expression in (self.document.masks or {}).items():
            try:
                self.book.evaluate(expression)
            except BadInput as e:
                yield ("masks", name), str(e)
        items: list[tuple[Location, ModelInput | BaseInput]] = [*self.document.inputs(), *self.document.bases()]
        for where, item in items:
            if item.mask:
                shapes = None if str(item.model) in absent else self.shapes(item.model)
                yield from self._mask((*where, "mask"), item.mask, shapes, str(item.model))
        if self.document.mask:
            yield from self._mask(("mask",), self.document.mask, self._output_shapes(), "the result")
        for where, inputs, _ in groups(self.document):
            if where[-1] == "models":
                yield from self._same_shapes(where, inputs)
        self._filters()

    def _directories(self, reference: Reference) -> None:
        if reference.path not in self.stages:
            found = model_directory(reference.path, self.folder, reference.revision)
            if not (found / "config.json").is_file():
                raise BadInput(f"{reference.path!r} has no config.json; it is not a model directory")
            if not any((found / name).is_file() for name in WEIGHTS):
                raise BadInput(f"{reference.path!r} has no weights ({WEIGHTS[0]} or {WEIGHTS[1]})")
        if reference.lora:
            adapter = model_directory(reference.lora, self.folder, reference.lora_revision)
            if not (adapter / "adapter_config.json").is_file():
                raise BadInput(f"{reference.lora!r} has no adapter_config.json; it is not a LoRA adapter")

    def shapes(self, reference: Reference) -> Shapes | None:
        """Shapes by tensor name, from the headers; None where they are not known (a stage, pickled weights)."""
        key = reference.path
        if key in self.stages:
            return None
        if key not in self._shapes:
            found = local(key, self.folder)
            if found is None and looks_like_hub_id(key):
                found = model_directory(key, self.folder, reference.revision)
            has = found is not None and any((found / name).is_file() for name in WEIGHTS[:2])
            self._shapes[key] = {e.name: e.shape for e in Checkpoint.open(found)} if found and has else None
        return self._shapes[key]

    def _mask(self, where: Location, use: MaskUse, shapes: Shapes | None, whose: str) -> Iterator[tuple[Location, str]]:
        try:
            mask = self.book.evaluate(use.expression())
        except BadInput as e:
            yield where, str(e)
            return
        if shapes is not None:
            yield from ((where, m) for m in mask_mismatches(mask, shapes, self.book.label(use), whose))
        base = use.base or (self.document.base_model and self.document.base_model.model)
        if use.on == "delta" and base and (base_shapes := self.shapes(base)) is not None:
            yield from ((where, m) for m in mask_mismatches(mask, base_shapes, self.book.label(use), f"base {base}"))
        if use.on == "weights" and self.document.merge_method in TASK_VECTOR_METHODS and where != ("mask",):
            self.warnings.append(
                (
                    where,
                    f"{self.book.label(use)} sets weights of {whose} to 0, so that its task vector is minus the base "
                    "there; use {file: ..., on: delta} to return them to the base instead",
                )
            )

    def _output_shapes(self) -> Shapes | None:
        """Shapes of the result where they are those of an input: a merge of whole models, tokenizer unchanged."""
        if not self.document.models or self.document.tokenizer or self.document.tokenizer_source:
            return None
        return self.shapes(self.document.models[0].model)

    def _same_shapes(self, where: Location, inputs: tuple[ModelInput, ...]) -> Iterator[tuple[Location, str]]:
        known = [(i, m, s) for i, m in enumerate(inputs) if (s := self.shapes(m.model)) is not None]
        if self.document.base_model and (s := self.shapes(self.document.base_model.model)) is not None:
            known.append((-1, ModelInput(model=self.document.base_model.model), s))
        realigned = bool(self.document.tokenizer or self.document.tokenizer_source)
        for i, item, shapes in known[1:]:
            place = (*where, i) if i >= 0 else ("base_model",)
            _, first, reference = known[0]
            wrong = [n for n in reference if n in shapes and not _agree(reference[n], shapes[n], realigned)]
            if wrong:
                n = wrong[0]
                more = f" (and {len(wrong) - 1} more tensors)" if len(wrong) > 1 else ""
                hint = "; set tokenizer: to align vocabularies" if reference[n][1:] == shapes[n][1:] else ""
                yield place, f"{n} is {shapes[n]} in {item.model}, {reference[n]} in {first.model}{more}{hint}"
            if missing := sorted(set(reference) ^ set(shapes)):
                self.warnings.append(
                    (place, f"{item.model} and {first.model} differ in {len(missing)} tensors ({missing[0]}, ...)")
                )

    def _filters(self) -> None:
        """Warn about filters that match no tensor of any model (mergekit passes over them silently)."""
        names = [n for _, item in self.document.inputs() for n in (self.shapes(item.model) or ())]
        settings: list[tuple[Location, Any]] = [
            (("parameters", k), v) for k, v in (self.document.parameters or {}).items()
        ]
        for where, item in self.document.inputs():
            settings += [((*where, "parameters", k), v) for k, v in (item.parameters or {}).items()]
        for where, value in settings:
            for rule in value if isinstance(value, list) else [value]:
                wanted = rule.get("filter") if isinstance(rule, dict) else None
                if wanted not in (None, "*") and names and not any(wanted in n for n in names):
                    self.warnings.append((where, f"filter {wanted!r} matches no tensor"))


TASK_VECTOR_METHODS = frozenset(
    name for name, m in METHODS.items() if m.base == "required" and name not in ("slerp", "nearswap", "arcee_fusion")
)


def _agree(a: tuple[int, ...], b: tuple[int, ...], realigned: bool) -> bool:
    return a == b or (realigned and len(a) == len(b) and a[1:] == b[1:])


def mask_mismatches(mask: Mask, shapes: Shapes, label: str, whose: str) -> Iterator[str]:
    """What keeps a mask from being applied to tensors of these names and shapes."""
    absent = [n for n in mask.names if n not in shapes]
    if absent:
        more = f" and {len(absent) - 1} more tensors" if len(absent) > 1 else ""
        yield f"mask {label} covers {absent[0]}{more}, which {whose} does not have"
    wrong = [n for n in mask.names if n in shapes and tuple(mask.shape(n)) != tuple(shapes[n])]
    if wrong:
        n = wrong[0]
        more = f" (and {len(wrong) - 1} more tensors)" if len(wrong) > 1 else ""
        yield f"mask {label} has {n} as {mask.shape(n)}, {whose} has {shapes[n]}{more}"

"""Checks of a recipe against the files it names: models and masks exist, and agree in names and shapes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mftmerge.checkpoint import Checkpoint
from mftmerge.errors import BadInput
from mftmerge.matching import match, require_base_tensors
from mftmerge.recipe.catalogue import METHODS
from mftmerge.recipe.check import groups, references
from mftmerge.recipe.lines import Location
from mftmerge.recipe.locate import WEIGHTS, MaskBook, model_directory
from mftmerge.recipe.schema import BaseInput, Document, MaskUse, ModelInput, Reference


class FileChecks:
    """Checks of one document. `stages`: names of the recipe's documents, whose results do not exist yet."""

    def __init__(self, folder: Path, document: Document, stages: frozenset[str]) -> None:
        self.folder, self.document, self.stages = folder, document, stages
        self.book = MaskBook(folder, document.masks)
        self.warnings: list[tuple[Location, str]] = []
        self._checkpoints: dict[str, Checkpoint | None] = {}

    def problems(self) -> Iterator[tuple[Location, str]]:
        """Everything wrong with the files, with its place; fills `warnings`."""
        for where, reference in references(self.document):
            try:
                self._directories(reference)
                self._open(reference)
            except BadInput as e:
                yield where, str(e)
        for name, expression in (self.document.masks or {}).items():
            try:
                self.book.evaluate(expression)
            except BadInput as e:
                yield ("masks", name), str(e)
        for where, item in self.document.parts():
            if item.mask:
                yield from self._mask((*where, "mask"), item.mask, self.checkpoint(item.model), str(item.model))
        if self.document.mask:
            yield from self._mask(("mask",), self.document.mask, self._like_output(), "the result", exact=True)
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

    def _open(self, reference: Reference) -> None:
        """Read the headers of a model that is there. Raises BadInput for an unsound checkpoint."""
        key = reference.path
        if key not in self._checkpoints and key not in self.stages:
            found = model_directory(key, self.folder, reference.revision)
            has = any((found / name).is_file() for name in WEIGHTS[:2])
            self._checkpoints[key] = Checkpoint.open(found) if has else None

    def checkpoint(self, reference: Reference) -> Checkpoint | None:
        """Headers of a model; None where they are not there to be read (a stage, pickled weights, a bad reference)."""
        return self._checkpoints.get(reference.path)

    def _mask(
        self, where: Location, use: MaskUse, model: Checkpoint | None, whose: str, exact: bool = False
    ) -> Iterator[tuple[Location, str]]:
        label = self.book.label(use)
        try:
            mask = self.book.evaluate(use.expression())
            if model is not None:
                if exact and (absent := [n for n in mask.names if n not in model]):
                    raise BadInput(f"{whose} will have no tensor {absent[0]!r}")
                names = match(mask, model, whose)
                base = use.base or (self.document.base_model and self.document.base_model.model)
                if use.on == "delta" and base and (foundation := self.checkpoint(base)) is not None:
                    require_base_tensors(names, model, foundation, f"base {base}")
        except BadInput as e:
            yield where, f"mask {label}: {e}"
            return
        if use.on == "weights" and self.document.merge_method in TASK_VECTOR_METHODS and where != ("mask",):
            message = f"mask {label} sets weights of {whose} to 0, so that its task vector is minus the base there; "
            self.warnings.append((where, message + "{file: ..., on: delta} returns them to the base instead"))

    def _like_output(self) -> Checkpoint | None:
        """An input with the result's names and shapes: in a merge of whole models, tokenizer unchanged."""
        if not self.document.models or self.document.tokenizer or self.document.tokenizer_source:
            return None
        return self.checkpoint(self.document.models[0].model)

    def _same_shapes(self, where: Location, inputs: tuple[ModelInput, ...]) -> Iterator[tuple[Location, str]]:
        items: list[tuple[int, ModelInput | BaseInput]] = list(enumerate(inputs))
        if self.document.base_model:
            items.append((-1, self.document.base_model))
        opened = [(i, m, self.checkpoint(m.model)) for i, m in items]
        known = [(i, m, {e.name: e.shape for e in c}) for i, m, c in opened if c is not None]
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
        opened = [self.checkpoint(item.model) for _, item in self.document.inputs()]
        names = [n for c in opened if c is not None for n in c.names]
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

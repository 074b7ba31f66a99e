"""Where a recipe's models and masks are: beside the recipe first, then in the current directory, then on the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from mftmerge.checkpoint import resolve
from mftmerge.errors import BadInput
from mftmerge.files import HUB_SCHEME, located
from mftmerge.mask import Mask
from mftmerge.recipe.schema import MaskExpression, Reference

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def local(text: str, folder: Path) -> Path | None:
    """The existing path that a recipe in `folder` means by `text`: beside the recipe, else in the current directory."""
    given = Path(text).expanduser()
    for candidate in (folder / given, given):
        if candidate.exists():
            return candidate.resolve()
    return None


def looks_like_hub_id(text: str) -> bool:
    """Whether `text` can only be `name` or `owner/name` on the hub, were it not a local directory."""
    return not text.startswith(("/", ".", "~")) and text.count("/") == 1


HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


def model_directory(path: str, folder: Path, revision: str | None = None) -> Path:
    """The directory of a model; a hub id is downloaded. Raises BadInput when there is no such model."""
    found = local(path, folder)
    if found is None and (looks_like_hub_id(path) or HUB_NAME.fullmatch(path)):  # gpt2 has no owner
        try:
            return resolve(f"{path}@{revision}" if revision else path).resolve()
        except BadInput as e:
            raise BadInput(f"no model {path!r} beside the recipe or in the current directory; {e}") from None
    if found is None:
        raise BadInput(f"no model at {path!r} (looked beside the recipe, in {folder}, and in the current directory)")
    if not found.is_dir():
        raise BadInput(f"{path!r} is a file; give the checkpoint's directory")
    return found


def absolute(reference: Reference, folder: Path, stages: Mapping[str, Path] | None = None) -> Reference:
    """The reference with absolute paths; `stages`: directories of the documents that are built already, by name."""
    if stages and reference.path in stages:
        path = stages[reference.path]
    else:
        path = model_directory(reference.path, folder, reference.revision)
    lora = model_directory(reference.lora, folder, reference.lora_revision) if reference.lora else None
    return reference.model_copy(
        update={"path": str(path), "revision": None, "lora": lora and str(lora), "lora_revision": None}
    )


class MaskBook:
    """A document's masks: each expression is evaluated once, from the check of the recipe to the card of the result."""

    def __init__(self, folder: Path, named: Mapping[str, MaskExpression] | None) -> None:
        self.folder, self.named = folder, dict(named or {})
        self._files: dict[Path, Mask] = {}
        self._made: dict[str, Mask] = {}  # by the operation, its inputs and options
        self._open: list[str] = []

    def file(self, text: str) -> Path:
        """Path of a mask file; `hf://owner/name/file.mask` is downloaded. Raises BadInput when there is none."""
        if text.startswith(HUB_SCHEME):
            return located(text)
        found = local(text, self.folder)
        if found is None or not found.is_file():
            raise BadInput(
                f"no mask file {text!r} (looked beside the recipe, in {self.folder}), and no such name in masks:"
            )
        return found

    def evaluate(self, expression: MaskExpression) -> Mask:
        """The mask that an expression means. Raises BadInput for absent files, cycles, and unsuitable options."""
        if expression.file is not None:
            return self._named_or_file(expression.file)
        assert expression.op is not None
        key = expression.model_dump_json(exclude={"on", "base", "learn"})
        if key in self._made:
            return self._made[key]
        parts = [self.evaluate(e) for e in expression.of or ()]
        names = [self.label(e) for e in expression.of or ()]
        from mftmerge.combine import combine

        self._made[key] = combine(expression.op, parts, names=names, **expression.options())
        return self._made[key]

    def _named_or_file(self, text: str) -> Mask:
        if text in self.named:
            if text in self._open:
                raise BadInput(f"masks: {' -> '.join([*self._open, text])} refers to itself")
            self._open.append(text)
            try:
                return self.evaluate(self.named[text])
            finally:
                self._open.pop()
        path = self.file(text)
        if path not in self._files:
            self._files[path] = Mask.load(path)
        return self._files[path]

    def label(self, expression: MaskExpression) -> str:
        """A short text for messages and family trees."""
        if expression.file is not None:
            return expression.file if expression.file in self.named else Path(expression.file).name
        return f"{expression.op}({', '.join(self.label(e) for e in expression.of or ())})"

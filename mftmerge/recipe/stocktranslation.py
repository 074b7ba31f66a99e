"""A document in stock mergekit's terms: its masked inputs are checkpoints in the export, or merges of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mftmerge.apply import apply_mask, copy_companions
from mftmerge.recipe.card import slug
from mftmerge.recipe.locate import absolute
from mftmerge.recipe.schema import BaseInput, Document, MaskUse, ModelInput, Reference
from mftmerge.recipe.translate import Translation

if TYPE_CHECKING:
    from mftmerge.recipe.export import Exporter


class StockTranslation(Translation):
    """Says where each input of a document is in an export, and writes what has to be there."""

    def __init__(self, exporter: Exporter, document: Document) -> None:
        super().__init__(document, exporter.recipe.masks(document))
        self.exporter = exporter
        names = {*exporter.entries, *(d.name for d in exporter.recipe.documents)}
        self.stages = {name: Path(name) for name in names if name}

    def absolute(self, reference: Reference) -> Reference:
        if Path(reference.path).is_relative_to(self.exporter.final):
            return reference
        return absolute(reference, self.folder, self.stages)

    def input(self, item: ModelInput | BaseInput) -> Any:
        return self.place(item).to_mergekit()

    def place(self, item: ModelInput | BaseInput) -> Reference:
        """Where the configuration finds an input: its model, a checkpoint in the export, or a merge in it."""
        reference = self.absolute(item.model)
        if item.mask is None:
            return reference
        if reference.path not in self.stages or reference.lora or self._why_no_merge(reference, item.mask):
            return self.checkpoint(item)
        key = self._key("stage", reference, item.mask)
        if key not in self.exporter.made:
            name = self.exporter.fresh(f"{reference.path}-masked")
            self.exporter.masked_stage(reference.path, item.mask, self.document, name)
            self.exporter.made[key] = Reference(path=name)
        return self.exporter.made[key]

    def _why_no_merge(self, stage: Reference, mask: MaskUse) -> str | None:
        """Why a mask on an earlier document's result cannot be a merge of its own; None when it can."""
        base, entries = self.delta_base(mask), self.exporter.entries[stage.path]
        return self.exporter.stock.why_no_second_merge(entries, mask, base.model if base else None)

    def checkpoint(self, item: ModelInput | BaseInput) -> Reference:
        """A masked input as a checkpoint in the export."""
        assert item.mask is not None
        exporter, mask, reference = self.exporter, item.mask, self.absolute(item.model)
        key = self._key("checkpoint", reference, mask)
        if key not in exporter.made:
            label = self.book.label(mask)
            here, final = exporter.folder(f"{slug(Path(reference.path).name)}-{slug(label)}")
            self._write_masked(reference, mask, here)
            what = "its dropped weights from the base" if mask.on == "delta" else "its dropped weights 0"
            exporter.forms.append(f"{reference} with {label}: a checkpoint with {what} (bit-exact)")
            exporter.made[key] = Reference(path=final, override_architecture=reference.override_architecture)
        return exporter.made[key]

    def delta_base(self, mask: MaskUse) -> BaseInput | None:
        """The model to which a mask returns dropped weights; None where it sets them to 0."""
        if mask.on == "weights":
            return None
        base = BaseInput(model=mask.base) if mask.base else self.document.base_model
        assert base is not None  # checked when the recipe was read
        return base

    def directory(self, item: BaseInput) -> Path:
        """Where the weights of a base are now, with its adapter and under its mask."""
        reference = self.absolute(item.model)
        if item.mask is None:
            return self.exporter.weights.of(reference)
        if reference.path not in self.stages or reference.lora:
            return self.exporter.now(self.checkpoint(item).path)
        key = self._key("base", reference, item.mask)
        if key not in self.exporter.made:  # the export has it as a merge, which is not run here
            here = self.exporter.work / "bases" / str(len(self.exporter.made))
            here.parent.mkdir(parents=True, exist_ok=True)
            self._write_masked(reference, item.mask, here)
            self.exporter.made[key] = Reference(path=str(here))
        return Path(self.exporter.made[key].path)

    def _write_masked(self, reference: Reference, mask: MaskUse, here: Path) -> None:
        base = self.delta_base(mask)
        values = self.directory(base) if base else None
        self.exporter.notify(f"masking {reference}")
        model = self.exporter.weights.of(reference.model_copy(update={"path": str(self.exporter.now(reference.path))}))
        evaluated = self.book.evaluate(mask)
        # The recipe's word holds, not the mask's own.
        apply_mask(evaluated, model, here, base=values, on=mask.on, check_base=False)
        if reference.lora and reference.path not in self.stages:  # mergekit merges weights, and leaves the tokenizer
            copy_companions(Path(reference.path), here)

    def _key(self, kind: str, reference: Reference, mask: MaskUse) -> tuple[str, ...]:
        """What makes a masked model the same as another one, of this document or of another."""
        base = self.delta_base(mask)
        found = (kind, str(reference), self.book.evaluate(mask).digest, mask.on)
        if base is None:
            return found
        own = self._key(kind, self.absolute(base.model), base.mask) if base.mask else ()
        return *found, str(self.absolute(base.model)), *own

"""Whose each weight of a selection is: one of the models of a recipe with `merge_method: select`, or the base."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from mftmerge import yamltext
from mftmerge.errors import BadInput
from mftmerge.mask import Mask
from mftmerge.recipe.locate import MaskBook
from mftmerge.recipe.schema import Document

METHOD = "select"


@dataclass(frozen=True)
class Parents:
    """A selection. names: the base, then the models in order; masks: of the models."""

    names: tuple[str, ...]
    masks: tuple[Mask, ...]

    def tensors(self) -> Iterator[str]:
        """Every tensor that any mask covers; in the others each weight is the base's."""
        yield from sorted({name for mask in self.masks for name in mask})

    def of(self, tensor: str) -> npt.NDArray[np.uint16]:
        """The number in `names` of each weight's parent, in the tensor's shape."""
        found: npt.NDArray[np.uint16] | None = None
        for number, mask in reversed(list(enumerate(self.masks, 1))):  # the first mask that keeps a weight has it
            if tensor in mask:
                kept = mask.kept(tensor)
                found = np.zeros(kept.shape, np.uint16) if found is None else found
                found[kept] = number
        if found is None:
            raise BadInput(f"no mask covers {tensor!r}: all of it is {self.names[0]}'s")
        return found

    def shares(self) -> dict[str, list[float]]:
        """For each tensor, the share of its weights that each parent has."""
        found = {}
        for name in self.tensors():
            owners = self.of(name)
            found[name] = (np.bincount(owners.ravel(), minlength=len(self.names)) / max(1, owners.size)).tolist()
        return found


def parents(path: str | Path) -> Parents:
    """The parents of the weights of a recipe's result. Raises BadInput unless it is a selection with masks in files."""
    path = Path(path)
    try:
        documents = [Document.model_validate(d) for d in yamltext.documents(path, yamltext.read_text(path))]
    except ValidationError as e:
        raise BadInput(f"{path}: not a recipe ({e.errors()[0]['msg']})") from None
    document = documents[0] if len(documents) == 1 else None
    if document is None or document.merge_method != METHOD or not document.models or not document.base_model:
        raise BadInput(f"{path}: only of a recipe with merge_method: {METHOD} each weight is one parent's")
    book = MaskBook(path.parent, document.masks)
    masks = []
    for item in document.models:
        if item.mask is None or item.mask.learn is not None:
            raise BadInput(f"{path}: {item.model} has no mask yet")
        masks.append(book.evaluate(item.mask))
    return Parents((str(document.base_model.model), *(str(m.model) for m in document.models)), tuple(masks))

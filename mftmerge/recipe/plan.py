"""What a build will do, from headers alone: steps, tensors, sizes, memory and disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mftmerge.dtypes import named
from mftmerge.machine import cores
from mftmerge.recipe.build import needed
from mftmerge.recipe.card import masks_used
from mftmerge.recipe.load import Recipe, load_recipe
from mftmerge.recipe.locate import MaskBook
from mftmerge.recipe.schema import Document
from mftmerge.recipe.settings import MergeSettings

# mergekit's imports before it reads a tensor, and what sorting one element for TIES takes: its magnitude, its place,
# and torch's scratch room.
IMPORT_BYTES, SORT_BYTES = 350_000_000, 28


@dataclass(frozen=True)
class Step:
    """One merge: its masks as (whose, label, on, density), and what it writes and holds."""

    name: str
    method: str
    inputs: tuple[str, ...]
    masks: tuple[tuple[str, str, str, float], ...]
    tensors: int
    nbytes: int
    peak_memory: int


@dataclass(frozen=True)
class Plan:
    """The steps of a build in order; `disk`: bytes needed beside the output, intermediate steps included."""

    recipe: Path
    steps: tuple[Step, ...]
    disk: int
    warnings: tuple[str, ...]

    def text(self) -> str:
        """For people."""
        rows: list[str] = []
        for step in self.steps:
            rows.append(f"{step.name}: {step.method} over {', '.join(step.inputs)}")
            rows += [
                f"  mask {label} on {on} of {whose}, keeps {density:.4f}" for whose, label, on, density in step.masks
            ]
            rows.append(
                f"  writes {step.tensors} tensors, {step.nbytes / 1e6:.1f} MB;"
                f" needs about {step.peak_memory / 1e6:.0f} MB of memory"
            )
        rows.append(f"disk: {self.disk / 1e6:.1f} MB")
        return "\n".join(rows + [f"warning: {w}" for w in self.warnings])


def plan(recipe_path: str | Path, settings: MergeSettings | None = None) -> Plan:
    """The plan of `build(recipe_path, ...)`. Raises BadInput for everything wrong with the recipe."""
    recipe = load_recipe(recipe_path, settings=settings)
    steps = [_step(recipe, document) for document in needed(recipe.documents)]
    return Plan(recipe.path, tuple(steps), sum(s.nbytes for s in steps), recipe.warnings)


def _step(recipe: Recipe, document: Document) -> Step:
    entries = recipe.tensors(document)
    book = MaskBook(recipe.folder, document.masks)
    masks = tuple(
        (w, label, u.on, book.evaluate(u.expression()).density()) for w, u, label in masks_used(recipe, document)
    )
    inputs = dict.fromkeys(str(i.model) for _, i in document.parts())
    sizes = [e.size * e.element.nbytes for e in entries]
    largest = max((e.size for e in entries), default=0)
    # In each thread: each input and the method's own deltas in the dtype of the arithmetic, then the result.
    held = largest * (named(document.dtype).nbytes if document.dtype else 4) * (2 * len(inputs) + 2)
    sorting = SORT_BYTES * largest if document.merge_method == "ties" and document.sets("density") else 0
    return Step(
        document.name or "result",
        document.merge_method,
        tuple(inputs),
        masks,
        len(entries),
        sum(sizes),
        IMPORT_BYTES + (held + sorting) * cores(),
    )

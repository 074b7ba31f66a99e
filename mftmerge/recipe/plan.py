"""What a build will do, from headers alone: steps, tensors, sizes, memory and disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mftmerge.dtypes import named
from mftmerge.recipe.build import needed
from mftmerge.recipe.card import masks_used
from mftmerge.recipe.catalogue import SORTED, by_element
from mftmerge.recipe.load import Recipe, load_recipe
from mftmerge.recipe.schema import Document
from mftmerge.recipe.settings import BuildSettings

# mergekit's imports before it reads a tensor, the pieces of tensors in one thread, what finding the first elements of a
# sort takes for each (its magnitude, its place, whether it is one), and what sorting takes (and torch's scratch room).
IMPORT_BYTES, PIECES_BYTES, CUT_BYTES, SORT_BYTES = 320_000_000, 16_000_000, 10, 28
RANKED = ("della", "della_linear")


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


def plan(recipe_path: str | Path, settings: BuildSettings | None = None) -> Plan:
    """The plan of `build(recipe_path, ...)`. Raises BadInput for everything wrong with the recipe."""
    settings = settings or BuildSettings()
    recipe = load_recipe(recipe_path, settings=settings)
    steps = [_step(recipe, document, settings) for document in needed(recipe.documents)]
    return Plan(recipe.path, tuple(steps), sum(s.nbytes for s in steps), recipe.warnings)


def _step(recipe: Recipe, document: Document, settings: BuildSettings) -> Step:
    entries = recipe.tensors(document)
    masks = tuple(
        (w, label, u.on, recipe.masks(document).evaluate(u).density()) for w, u, label in masks_used(recipe, document)
    )
    inputs = dict.fromkeys(str(i.model) for _, i in document.parts())
    sizes = [e.size * e.element.nbytes for e in entries]
    largest = max((e.size for e in entries), default=0)
    held = PIECES_BYTES * min(settings.threads, len(entries))
    if not by_element(document.merge_method, not document.sets("density")):
        # Tensors that are merged at a time are together no larger than the largest one: each input and the method's
        # own deltas in the dtype of the arithmetic, then the result.
        if document.merge_method in SORTED and not document.sets("rescale"):
            held += largest * (CUT_BYTES + len(inputs))  # merged in pieces; a bit a byte of what each model keeps
        else:
            held += largest * (named(document.dtype).nbytes if document.dtype else 4) * (2 * len(inputs) + 2)
            held += SORT_BYTES * largest * (document.merge_method in (*SORTED, *RANKED))
    return Step(
        document.name or "result",
        document.merge_method,
        tuple(inputs),
        masks,
        len(entries),
        sum(sizes),
        IMPORT_BYTES + held,
    )

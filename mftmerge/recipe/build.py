"""Build a model from a recipe."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mftmerge.errors import MftmergeError
from mftmerge.files import protect
from mftmerge.outputdirectory import OutputDirectory
from mftmerge.progress import Progress, Step
from mftmerge.recipe.card import write_companions
from mftmerge.recipe.check import references, result_index
from mftmerge.recipe.load import Recipe, load_recipe
from mftmerge.recipe.locate import local
from mftmerge.recipe.schema import Document
from mftmerge.recipe.settings import BuildSettings


@dataclass(frozen=True)
class BuildReport:
    """What was built: directory, tensors, bytes of weights, seconds, and what the user should know.

    not_finite: weights of the result that are infinite or not a number.
    """

    out: Path
    tensors: int
    nbytes: int
    seconds: float
    warnings: tuple[str, ...]
    not_finite: int


@dataclass
class Built:
    """What steps have built so far: bytes, and weights that are not finite, by tensor of the last one; and what the
    user should know."""

    sizes: dict[str, int] = field(default_factory=dict)
    not_finite: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def needed(
    documents: tuple[Document, ...],
    result: Document | None = None,
    alone: Callable[[Document], bool] = lambda _: False,
) -> list[Document]:
    """The documents that the recipe's result (or another, `result`) needs, itself last, each after those it needs.

    alone: tells of documents whose own needs do not matter.
    """
    by_name = {d.name: d for d in documents if d.name}
    wanted: list[Document] = []

    def visit(document: Document) -> None:
        for _, reference in references(document) if not alone(document) else ():
            if reference.path in by_name and by_name[reference.path] not in wanted:
                visit(by_name[reference.path])
        wanted.append(document)

    visit(result or documents[result_index(documents)])
    return wanted


def build(
    recipe_path: str | Path, out: str | Path, *, progress: Progress | None = None, **given: object
) -> BuildReport:
    """Merge what the recipe says into the directory `out`, which appears whole or not at all.

    given: fields of `BuildSettings` by name. progress: called as bytes are written.
    Raises BadInput for everything wrong with the recipe, before a tensor is read.
    """
    settings = BuildSettings.make(given)
    recipe = load_recipe(recipe_path, settings=settings)
    out = Path(out).absolute()
    refuse_own_input(recipe, out)
    started = time.monotonic()
    with OutputDirectory(out, lambda: "build", overwrite=settings.overwrite) as output:
        built = build_into(recipe, output.path, name=out.name, settings=settings, progress=progress)
        not_finite = sum(built.not_finite.values())
        if not_finite and settings.require_finite:
            first = next(iter(built.not_finite))
            raise MftmergeError(f"{recipe.path}: {not_finite} weights of the result are not finite, first in {first}")
        output.commit()
    seconds, warnings = time.monotonic() - started, (*recipe.warnings, *built.warnings)
    return BuildReport(out, len(built.sizes), sum(built.sizes.values()), seconds, warnings, not_finite)


def build_into(
    recipe: Recipe,
    folder: Path,
    *,
    name: str,
    result: Document | None = None,
    settings: BuildSettings | None = None,
    progress: Progress | None = None,
) -> Built:
    """Build a checked recipe's result (or another of its documents) into an existing directory."""
    from mftmerge.recipe.merge import merge  # mergekit takes seconds to import: not before the recipe is checked

    work = folder / ".work"
    stages: dict[str, Path] = {}
    built = Built()
    documents = needed(recipe.documents, result)
    for i, document in enumerate(documents):
        last = i == len(documents) - 1
        target = folder if last else work / "stages" / str(document.name)
        scratch = work / f"step-{i}"
        scratch.mkdir(parents=True)
        tensors = recipe.tensors(document)
        total = sum(e.size * e.element.nbytes for e in tensors)
        merged = merge(
            document,
            recipe.masks(document),
            target,
            scratch,
            tensors,
            stages=stages,
            settings=settings,
            progress=_shown(progress, total) if progress and last else None,
        )
        built.sizes, built.not_finite = merged.sizes, merged.not_finite
        built.warnings += merged.warnings
        if document.name:
            stages[document.name] = target
    shutil.rmtree(work)
    write_companions(recipe, folder, name)
    return built


def _shown(progress: Progress, total: int) -> Callable[[int], None]:
    return lambda done: progress(Step("build", done, max(done, total), "bytes"))


def refuse_own_input(recipe: Recipe, out: Path) -> None:
    """Raise BadInput when the output would touch what the recipe reads: itself, models, adapters, masks."""
    found: list[object] = [recipe.path]
    for document in recipe.documents:
        used = [text for _, r in references(document) for text in (r.path, r.lora) if text]
        used += [text for text in texts(document.model_dump()) if text.endswith(".mask")]
        found += [local(text, recipe.folder) for text in used]
    protect(out, found)


def texts(value: object) -> Iterator[str]:
    """All texts in plain values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (t for part in value.values() for t in texts(part))
    elif isinstance(value, list | tuple):
        yield from (t for part in value for t in texts(part))

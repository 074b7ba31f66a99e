"""Build a model from a recipe."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mftmerge.checkpoint import Checkpoint
from mftmerge.files import protect
from mftmerge.outputdirectory import OutputDirectory
from mftmerge.progress import Progress, Step
from mftmerge.recipe.card import write_companions
from mftmerge.recipe.check import references, result_index
from mftmerge.recipe.locate import local
from mftmerge.recipe.schema import Document, Recipe, load_recipe
from mftmerge.recipe.sizes import expected, width


@dataclass(frozen=True)
class BuildReport:
    """What was built: directory, tensors, bytes of weights, seconds, and what the user should know."""

    out: Path
    tensors: int
    nbytes: int
    seconds: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Options:
    """How to build; see `build`."""

    seed: int | None = None
    device: str = "cpu"
    progress: Progress | None = None


@dataclass
class Built:
    """What steps have built so far: bytes by tensor of the last one, and what the user should know."""

    sizes: dict[str, int] = field(default_factory=dict)
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
    recipe_path: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    seed: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> BuildReport:
    """Merge what the recipe says into the directory `out`, which appears whole or not at all.

    seed: for methods that draw random numbers. device: where mergekit does arithmetic. progress: called as
    bytes are written.
    Raises BadInput for everything wrong with the recipe, before a tensor is read.
    """
    recipe = load_recipe(recipe_path)
    out = Path(out).absolute()
    refuse_own_input(recipe, out)
    started = time.monotonic()
    with OutputDirectory(out, lambda: "build", overwrite=overwrite) as output:
        built = build_into(recipe, output.path, name=out.name, options=Options(seed, device, progress))
        output.commit()
    seconds = time.monotonic() - started
    warnings = (*recipe.warnings, *built.warnings)
    return BuildReport(out, len(built.sizes), sum(built.sizes.values()), seconds, warnings)


def build_into(
    recipe: Recipe, folder: Path, *, name: str, result: Document | None = None, options: Options = Options()
) -> Built:
    """Build a checked recipe's result (or another of its documents) into an existing directory."""
    work = folder / ".work"
    stages: dict[str, Path] = {}
    built = Built()
    documents = needed(recipe.documents, result)
    for i, document in enumerate(documents):
        last = i == len(documents) - 1
        target = folder if last else work / "stages" / str(document.name)
        scratch = work / f"step-{i}"
        scratch.mkdir(parents=True)
        _step(
            document,
            recipe.folder,
            target,
            scratch,
            stages,
            options if last else replace(options, progress=None),
            built,
        )
        if document.name:
            stages[document.name] = target
    shutil.rmtree(work)
    write_companions(recipe, folder, name)
    return built


def _step(
    document: Document,
    folder: Path,
    target: Path,
    scratch: Path,
    stages: dict[str, Path],
    options: Options,
    built: Built,
) -> None:
    """Merge one document into `target`."""
    entries = list(expected(document, folder, {n: list(Checkpoint.open(p)) for n, p in stages.items()}))
    total = sum(e.size * width(e, document.out_dtype or document.dtype) for e in entries)
    report, progress = options.progress, None
    if report is not None:
        watcher = report

        def progress(done: int) -> None:
            watcher(Step("build", done, max(done, total), "bytes"))

    from mftmerge.recipe.merge import merge  # mergekit takes seconds to import: not before the recipe is checked

    merged = merge(
        document, folder, target, scratch, stages=stages, seed=options.seed, device=options.device, progress=progress
    )
    unread = [e.name for e in entries if e.name not in merged.sizes]
    if document.models and unread and sum(merged.sizes.values()) < total:
        built.warnings.append(
            f"mergekit's definition of the architecture does not list {unread[0]}"
            f"{f' and {len(unread) - 1} more tensors' if len(unread) > 1 else ''}: not in the result"
        )
    built.sizes = merged.sizes
    built.warnings += merged.warnings


def refuse_own_input(recipe: Recipe, out: Path) -> None:
    """Raise BadInput when the output would touch what the recipe reads: itself, models, adapters, masks."""
    found: list[object] = [recipe.path]
    for document in recipe.documents:
        used = [text for _, r in references(document) for text in (r.path, r.lora) if text]
        used += [text for text in _texts(document.model_dump()) if text.endswith(".mask")]
        found += [local(text, recipe.folder) for text in used]
    protect(out, found)


def _texts(value: Any) -> Iterator[str]:
    """All texts in plain values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (t for part in value.values() for t in _texts(part))
    elif isinstance(value, list | tuple):
        yield from (t for part in value for t in _texts(part))

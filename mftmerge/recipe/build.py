"""Build a model from a recipe."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mftmerge.errors import BadInput
from mftmerge.recipe.card import write_companions
from mftmerge.recipe.check import references, result_index
from mftmerge.recipe.eligible import why_not
from mftmerge.recipe.schema import Document, Recipe, load_recipe
from mftmerge.recipe.sizes import expected, width
from mftmerge.writer import OutputDirectory

Executor = Literal["auto", "stream", "mergekit"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class BuildReport:
    """What was built: directory, tensors, bytes of weights, seconds; who did each step ("stream", "mergekit")."""

    out: Path
    tensors: int
    nbytes: int
    seconds: float
    executors: tuple[str, ...]
    warnings: tuple[str, ...]


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
    executor: Executor = "auto",
    seed: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> BuildReport:
    """Merge what the recipe says into the directory `out`, which appears whole or not at all.

    executor: "auto": ours where its result is mergekit's bit for bit (linear, task_arithmetic, ties over checkpoints
    with the same tensors), else mergekit; "mergekit"; or "stream": ours or nothing, and TIES keeps, of equal magnitudes
    at its cut, those of lowest index, where mergekit's choice is that of an unstable sort, and slower.
    seed: for methods that draw random numbers. device: where mergekit does arithmetic. progress: called with bytes
    done and bytes in all.
    Raises BadInput for everything wrong with the recipe, before a tensor is read.
    """
    recipe = load_recipe(recipe_path)
    out = Path(out).absolute()
    started = time.monotonic()
    with OutputDirectory(out, lambda: "build", overwrite=overwrite) as output:
        sizes, executors = build_into(
            recipe, output.path, executor=executor, seed=seed, device=device, progress=progress, name=out.name
        )
        output.commit()
    seconds = time.monotonic() - started
    return BuildReport(out, len(sizes), sum(sizes.values()), seconds, tuple(executors), recipe.warnings)


def build_into(
    recipe: Recipe,
    folder: Path,
    *,
    name: str,
    result: Document | None = None,
    executor: Executor = "auto",
    seed: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[dict[str, int], list[str]]:
    """Build a checked recipe's result (or another of its documents) into an existing directory.

    Gives bytes by tensor, and who did each step.
    """
    work = folder / ".work"
    stages: dict[str, Path] = {}
    executors: list[str] = []
    sizes: dict[str, int] = {}
    documents = needed(recipe.documents, result)
    for i, document in enumerate(documents):
        last = i == len(documents) - 1
        target = folder if last else work / "stages" / str(document.name)
        scratch = work / f"step-{i}"
        scratch.mkdir(parents=True)
        step_progress = progress if last else None
        sizes, used = _step(document, recipe, target, scratch, stages, executor, seed, device, step_progress)
        executors.append(used)
        if document.name:
            stages[document.name] = target
    shutil.rmtree(work)
    write_companions(recipe, folder, name)
    return sizes, executors


def choose(
    document: Document, folder: Path, stages: Mapping[str, Path | None], executor: Executor, device: str = "cpu"
) -> tuple[str, str]:
    """Who merges a document, "stream" or "mergekit", and why. Raises BadInput if "stream" was asked for and cannot."""
    if executor == "mergekit":
        return "mergekit", "asked for"
    reason = why_not(document, folder, stages) if device == "cpu" else f"arithmetic on {device}"
    if reason is None:
        return "stream", "like checkpoints and a method that works piece by piece: mergekit's result without its graph"
    if executor == "stream":
        raise BadInput(f"cannot be streamed: {reason}; use --executor auto")
    return "mergekit", reason


def _step(
    document: Document,
    recipe: Recipe,
    target: Path,
    scratch: Path,
    stages: dict[str, Path],
    executor: Executor,
    seed: int | None,
    device: str,
    progress: Progress | None,
) -> tuple[dict[str, int], str]:
    chosen = choose(document, recipe.folder, stages, executor, device)[0]
    watched = None
    if progress:
        report = progress
        entries = expected(document, recipe.folder, {})
        total = sum(e.size * width(e, document.out_dtype or document.dtype) for e in entries)

        def watched(done: int) -> None:
            report(done, max(done, total))

    if chosen == "stream":
        from mftmerge.recipe import stream

        sort = executor != "stream"
        return stream.merge(document, recipe.folder, target, stages=stages, sort=sort, progress=watched), chosen
    from mftmerge.recipe import bridge

    sizes = bridge.merge(
        document, recipe.folder, target, scratch, stages=stages, seed=seed, device=device, progress=watched
    )
    return sizes, chosen

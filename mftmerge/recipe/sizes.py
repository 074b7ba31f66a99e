"""Sizes of a merge's result, from the headers of its inputs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from mftmerge.checkpoint import Checkpoint, TensorEntry
from mftmerge.dtypes import named
from mftmerge.recipe.check import groups
from mftmerge.recipe.locate import WEIGHTS, local
from mftmerge.recipe.schema import Document, Reference

LAYER = re.compile(r"\.(\d+)\.")


def width(entry: TensorEntry, dtype: str | None) -> int:
    """Bytes an element takes when a tensor is stored in `dtype` (None: as it is)."""
    return named(dtype).nbytes if dtype else max(entry.nbytes // entry.size, 1) if entry.size else 1


def headers(reference: Reference, folder: Path) -> list[TensorEntry]:
    """The tensors of a model, from its files' headers; empty for pickled weights and models not yet downloaded."""
    found = local(reference.path, folder)
    if found is None or not any((found / name).is_file() for name in WEIGHTS[:2]):
        return []
    return list(Checkpoint.open(found))


def expected(document: Document, folder: Path, stages: Mapping[str, list[TensorEntry]]) -> Iterator[TensorEntry]:
    """The result's tensors as far as headers tell: those of the first input, with layers repeated as slices say."""

    def of(reference: Reference) -> list[TensorEntry]:
        return stages[reference.path] if reference.path in stages else headers(reference, folder)

    first = document.inputs()[0][1].model
    layered = [inputs for where, inputs, _ in groups(document) if where[-1] != "models" and "modules" not in where]
    if not layered:
        yield from of(first)
        return
    yield from (e for e in of(first) if not LAYER.search(e.name))
    at = 0
    for sources in layered:
        start, stop = sources[0].layer_range  # type: ignore[attr-defined]
        for entry in of(sources[0].model):
            match = LAYER.search(entry.name)
            if match and start <= int(match[1]) < stop:
                name = LAYER.sub(f".{at + int(match[1]) - start}.", entry.name, count=1)
                yield TensorEntry(name, entry.dtype, entry.shape, entry.file, entry.start, entry.stop)
        at += stop - start


def stored(entry: TensorEntry, dtype: str | None) -> TensorEntry:
    """The entry of a tensor after it was stored in `dtype` (None: as it was); its place in a file means nothing."""
    return TensorEntry(entry.name, named(dtype).code if dtype else entry.dtype, entry.shape, entry.file, 0, 0)


def entries_of(path: Path) -> list[TensorEntry]:
    """All tensors of a checkpoint."""
    return list(Checkpoint.open(path))


def given(document: Document, parameter: str) -> bool:
    """Whether a parameter is set anywhere to something that is not its neutral value (density 1, rescale false)."""
    settings = [document.parameters, *(i.parameters for _, i in document.inputs())]
    return any(s is not None and s.get(parameter) not in (None, 1, 1.0, False) for s in settings)

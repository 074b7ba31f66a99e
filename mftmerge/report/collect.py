"""What there is to report on below a directory: masks, results of evaluations and sweeps, and what cannot be read."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mftmerge.errors import BadInput
from mftmerge.evaluate.results import BY_LAYER, GridResult
from mftmerge.files import refuse_pointer
from mftmerge.inspection import Inspection, inspect
from mftmerge.report.sweeps import SweepHere, read_sweep
from mftmerge.yamltext import read_document

RESULT_KEYS = ("models", "domains", "cells", "reference", "versions", "resamples", "extra")
LARGEST_RESULT = 1 << 28  # bytes; a larger JSON file is data, not a result
UNREADABLE = (BadInput, OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class MaskHere:
    """A mask file. name: short and unique on the page. copies: other files with the same bits, names and shapes.

    settings: the training settings in the file beside it, where there is one. note: what a sweep says about it.
    """

    name: str
    path: str
    copies: tuple[str, ...]
    found: Inspection
    settings: dict[str, Any]
    note: str = ""

    @property
    def kind(self) -> str:
        """ "trained", "combined", "untrained" (zero steps: a baseline) or "other" (imported, closed form)."""
        if self.found.info.operation:
            return "combined"
        steps = self.found.info.training.get("steps")
        return "other" if steps is None else "trained" if steps else "untrained"


@dataclass(frozen=True)
class ResultHere:
    """The JSON of an evaluation. contained: other files whose measurements are all in this one."""

    path: str
    result: GridResult
    contained: tuple[str, ...] = ()


@dataclass
class Collection:
    """Everything below a directory, in the order of the page. problems: (file, what is wrong with it)."""

    directory: Path
    masks: list[MaskHere] = field(default_factory=list)
    results: list[ResultHere] = field(default_factory=list)
    sweeps: list[SweepHere] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    newest: float = 0.0  # seconds since the epoch: when the newest of the files was written


def collect(directory: str | Path, say: Callable[[str], None] = lambda text: None) -> Collection:
    """Read all there is, checking every bit. A file that cannot be read becomes a problem of the collection.

    Raises BadInput for a directory without any mask or result that can be read.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise BadInput(f"{directory}: {'not a directory' if directory.exists() else 'no such directory'}; give the one")
    found = Collection(directory)
    masks: dict[str, Inspection] = {}
    readers: dict[str, Callable[[Path], Any]] = {".mask": _read_mask, ".json": _read_result, ".jsonl": read_sweep}
    for path in _files(directory, tuple(readers)):
        name = path.relative_to(directory).as_posix()
        try:
            say(f"reading {name}")
            content = readers[path.suffix](path)
        except UNREADABLE as e:  # files are anybody's: none of them may end the report
            found.problems.append((name, _reason(e, path)))
            continue
        if content is None:
            continue
        found.newest = max(found.newest, path.stat().st_mtime)
        if isinstance(content, Inspection):
            masks[name] = content
        elif isinstance(content, GridResult):
            found.results.append(ResultHere(name, content))
        else:
            found.sweeps.append(dataclasses.replace(content, path=name))
    found.results = _without_parts(found.results)
    found.masks = _named(directory, masks, found.sweeps)
    if not (found.masks or found.results or found.sweeps):
        wrong = "; ".join(f"{name}: {what}" for name, what in found.problems[:3])
        raise BadInput(
            f"{directory}: no mask or result that can be read ({wrong})"
            if wrong
            else f"{directory}: holds no .mask file and no results of `mftmerge eval --out` or `mftmerge sweep`"
        )
    return found


def _files(directory: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Files with these endings, sorted; not in hidden directories and not in those of unfinished trainings."""
    for root, inside, names in os.walk(directory):
        inside[:] = sorted(d for d in inside if not d.startswith(".") and not d.endswith(".run"))
        for name in sorted(names):
            path = Path(root, name)
            if name.endswith(suffixes) and not name.startswith(".") and not path.is_fifo():
                yield path


def _reason(error: Exception, path: Path) -> str:
    """An error in one line, without the path that is said before it."""
    if isinstance(error, BadInput):
        return " ".join(str(error).removeprefix(f"{path}: ").split())
    return f"cannot be read ({getattr(error, 'strerror', None) or ' '.join(repr(error).split())})"


def _read_mask(path: Path) -> Inspection:
    found = inspect(path)
    found.table()  # names that cannot be told apart by layer are an error here, not on the page
    return found


def _read_result(path: Path) -> GridResult | None:
    """The JSON of an evaluation, checked; None for another JSON file."""
    if path.stat().st_size > LARGEST_RESULT:
        return None
    raw = path.read_bytes()
    refuse_pointer(path, raw)
    if not all(f'"{key}"'.encode() in raw for key in RESULT_KEYS):
        return None
    text = raw.decode("utf-8").strip()
    whole = json.loads(text)
    if not isinstance(whole, dict) or not set(RESULT_KEYS) <= set(whole):
        return None
    result = GridResult.from_json(text)
    maps = (result.models, result.domains, result.versions, result.extra, result.harness)
    facts = [*result.models.values(), *result.domains.values()]
    if not all(isinstance(m, dict) for m in (*maps, *facts)) or result.reference not in result.models:
        raise BadInput("not the JSON of an evaluation (models, domains or the reference row are missing)")
    if any(not isinstance(f.get("density", 1.0), int | float) for f in facts):
        raise BadInput("not the JSON of an evaluation (a density is not a number)")
    layer_changes(result)
    result.remarks()  # built from what the file says, like the differences below: fails here or never
    for cell, values in result.cells.items():
        if cell[0] not in result.models or cell[1] not in result.domains or not np.isfinite(values).all():
            raise BadInput(f"a measurement of {cell[0]!r} on {cell[1]!r} belongs to no row or is not a number")
        result.difference(*cell)  # the same rows as the reference's
    return result


def layer_changes(result: GridResult) -> dict[str, dict[str, dict[str, float]]]:
    """Row -> domain -> layer -> change that was predicted by `mftmerge choose --search`, empty in other results."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row, domains in result.extra.get(BY_LAYER, {}).items():
        found[row] = {d: {layer: float(v) for layer, v in layers.items()} for d, layers in domains.items()}
    return found


def _without_parts(results: list[ResultHere]) -> list[ResultHere]:
    """Results whose measurements are not all in another one; the larger ones take them in."""
    kept: list[ResultHere] = []
    for here in sorted(results, key=lambda r: -len(r.result.cells)):
        for i, larger in enumerate(kept):
            if _inside(here.result, larger.result):
                kept[i] = dataclasses.replace(larger, contained=(*larger.contained, here.path))
                break
        else:
            kept.append(here)
    return sorted(kept, key=lambda r: r.path)


def _inside(part: GridResult, whole: GridResult) -> bool:
    same = all(whole.domains.get(d, {}).get("digest") == f.get("digest") for d, f in part.domains.items())
    return same and all(c in whole.cells and np.array_equal(whole.cells[c], v) for c, v in part.cells.items())


def _named(directory: Path, found: dict[str, Inspection], sweeps: list[SweepHere]) -> list[MaskHere]:
    """Each different mask once, with a short name: trained ones first, then combined ones, then baselines."""
    notes: dict[str, str] = {}
    for sweep in sweeps:
        folder = Path(sweep.path).parent
        notes |= {(folder / mask).as_posix(): said for mask, said in sweep.masks.items()}
    settings = {path: _settings(directory / path) for path in found}
    by_digest: dict[str, list[str]] = {}
    for path in sorted(found, key=lambda p: (not settings[p], p.count("/"), p)):  # the original before its copies
        by_digest.setdefault(found[path].digest, []).append(path)
    stems = [Path(paths[0]).stem for paths in by_digest.values()]
    masks = []
    for paths in by_digest.values():
        first, stem = paths[0], Path(paths[0]).stem
        name = stem if stems.count(stem) == 1 else first.removesuffix(".mask")
        note = next((notes[p] for p in paths if p in notes), "")
        masks.append(MaskHere(name, first, tuple(paths[1:]), found[first], settings[first], note))
    order = ("trained", "combined", "other", "untrained")
    return sorted(masks, key=lambda m: (order.index(m.kind), m.path))


def _settings(mask: Path) -> dict[str, object]:
    """Plain values of the settings file that training leaves beside a mask; nothing where it cannot be read."""
    path = mask.with_name(f"{mask.name}.yaml")
    try:
        given = read_document(path)
    except (BadInput, OSError):
        return {}
    return {str(k): v for k, v in given.items() if is_plain(v)} if isinstance(given, dict) else {}


def is_plain(value: object) -> bool:
    """A scalar, or a short list of scalars: what a page can show."""
    scalar = (str, int, float, bool, type(None))
    return isinstance(value, scalar) or (
        isinstance(value, list) and len(value) <= 50 and all(isinstance(v, scalar) for v in value)
    )

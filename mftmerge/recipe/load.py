"""A recipe, read once: checked, its files found, and what each of its documents will give, from mergekit's plan.

Everything that is wrong is reported at once, with lines; check, plan, build, card and export read the `Recipe`.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mftmerge.checkpoint import TensorEntry
from mftmerge.errors import BadInput
from mftmerge.recipe import openmasks
from mftmerge.recipe.catalogue import METHODS, suggestion
from mftmerge.recipe.check import Checked, check_documents, out_of_range, references
from mftmerge.recipe.files import FileChecks
from mftmerge.recipe.lines import Lines, Location, Problem, load_documents, report
from mftmerge.recipe.locate import MaskBook, model_directory
from mftmerge.recipe.reference import Reference, Strict
from mftmerge.recipe.schema import Document, Learn
from mftmerge.recipe.settings import MergeSettings
from mftmerge.yamltext import read_text

if TYPE_CHECKING:
    from mftmerge.recipe.result import Result


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: its file, its text, its documents in order, and where each value stands.

    to_learn: the entries of `models:` whose masks are to be learnt, which the documents are then without.
    """

    path: Path
    text: str
    documents: tuple[Document, ...]
    lines: tuple[Lines, ...]
    warnings: tuple[str, ...] = ()
    books: tuple[MaskBook, ...] = ()  # each document's masks
    results: tuple[Result | None, ...] = ()  # what each document will give; without `files` unknown
    to_learn: tuple[tuple[int, Learn], ...] = ()

    def tensors(self, document: Document) -> tuple[TensorEntry, ...]:
        """Names, shapes and types of what a document, or one like it under its name, gives."""
        found = next((r for d, r in zip(self.documents, self.results, strict=True) if d.name == document.name), None)
        return found.tensors if found else ()

    def masks(self, document: Document) -> MaskBook:
        """The masks of a document, or of one like it under its name."""
        return next(b for d, b in zip(self.documents, self.books, strict=True) if d.name == document.name)

    @property
    def folder(self) -> Path:
        """Relative paths in the recipe start here."""
        return self.path.parent


@dataclass(frozen=True)
class Checks:
    """What the files say of a recipe: problems, warnings, and each document's result (None where it has problems)."""

    problems: list[Problem]
    warnings: list[str]
    results: tuple[Result | None, ...]


def check_files(documents: Checked, books: Sequence[MaskBook], sound: bool, settings: MergeSettings) -> Checks:
    """What shows in the files that a recipe names (files.py) and, of documents without problems, in mergekit's plan.

    books: the documents' masks. sound: whether the text is without problems, so that its documents can be planned.
    """
    problems: list[Problem] = []
    warnings: list[str] = []
    results: list[Result | None] = []
    stages: dict[str, Path | None] = {d.name: None for d, _ in documents if d.name}
    with tempfile.TemporaryDirectory(prefix="mftmerge-") as scratch:
        for i, ((document, lines), book) in enumerate(zip(documents, books, strict=True)):
            checks = FileChecks(document, book, stages, Path(scratch) / "checks" / str(i), settings.allow_lost)
            found = list(checks.problems())
            result = None
            needs = [r.path for _, r in references(document) if r.path in stages]
            if sound and checks.models_sound and all(stages[name] for name in needs):
                from mftmerge.recipe.result import plan_result  # it imports mergekit, which takes seconds

                work, known = Path(scratch) / str(i), {n: p for n, p in stages.items() if p}
                result, stand_in = plan_result(document, book, known, work, settings.of_mergekit(), checks.returned())
                places = {where for where, _ in found}
                found += [(where, text) for where, text in checks.of_result(result) if where not in places]
                if document.name and not found:
                    stages[document.name] = Path(scratch) / "stages" / document.name
                    stand_in(Path(scratch) / "stages" / document.name)
            results.append(None if found else result)
            problems += [Problem(lines.at(where), message) for where, message in found]
            said = [*checks.warnings, *out_of_range(document)]
            warnings += [f"line {lines.at(where)}: {message}" for where, message in said]
    return Checks(problems, warnings, tuple(results))


def load_recipe(
    path: str | Path, *, files: bool = True, settings: MergeSettings | None = None, learning: bool = False
) -> Recipe:
    """Read a recipe and check all of it; nothing but headers is read of the models and masks that it names.

    files: also check that models and masks exist and fit, and plan the merge (False: the text alone). learning: it has
    masks that are to be learnt now, which is otherwise a problem.
    Raises BadInput with every problem found, each with its line.
    """
    path, settings = Path(path), settings or MergeSettings()
    text = read_text(path)
    parsed, problems = load_documents(path, text)
    documents: list[tuple[Document, Lines]] = []
    salvaged: list[tuple[Document, Lines]] = []  # documents whose only fault of form is an unknown key
    for data, lines in parsed:
        try:
            documents.append((Document.model_validate(data), lines))
        except ValidationError as e:
            problems += problems_of(e, data, lines)
            salvaged += (found := _without_unknown(data, lines, e))
            others = isinstance(data, dict) and bool(OTHER_TOOLS.keys() & data.keys())
            if files and not found and not others:
                names = {n for d, _ in parsed if isinstance(d, dict) for n in (d.get("name"), *(d.get("masks") or ()))}
                problems += _absent(path.parent, data, lines, names)
    if not parsed:
        problems.append(Problem(0, "the recipe is empty"))
    problems += check_documents(documents + salvaged)
    for document, lines in documents:
        found_open = openmasks.problems(document, documents=len(documents), learning=learning)
        problems += [Problem(lines.at(where), message) for where, message in found_open]
    to_learn = openmasks.to_learn(documents[0][0]) if documents else ()
    documents = [(openmasks.without(d), lines) for d, lines in documents]
    books = tuple(MaskBook(path.parent, d.masks) for d, _ in documents + salvaged)
    checks = check_files(documents + salvaged, books, not problems, settings) if files else Checks([], [], ())
    if problems + checks.problems:
        raise report(path, problems + checks.problems)
    parts = tuple(d for d, _ in documents), tuple(lines for _, lines in documents)
    return Recipe(path.resolve(), text, *parts, tuple(checks.warnings), books, checks.results, to_learn)


def _absent(folder: Path, data: object, lines: Lines, names: set[object], where: Location = ()) -> list[Problem]:
    """Models and masks that are not there, of a document whose form is too wrong to be read as one.

    names: of documents and masks in the recipe.
    """
    found: list[Problem] = []
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        place = (*where, key)
        try:
            if key in ("model", "base_model") and isinstance(value, str):
                reference = Reference.model_validate(value)
                if reference.path not in names:
                    model_directory(reference.path, folder, reference.revision)
            elif key in ("mask", "file") and isinstance(value, str) and value not in names:
                MaskBook(folder, None).file(value)
        except ValidationError:
            continue
        except BadInput as e:
            found.append(Problem(lines.at(place), str(e)))
        found += _absent(folder, value, lines, names, place)
    return found


def _without_unknown(data: object, lines: Lines, error: ValidationError) -> list[tuple[Document, Lines]]:
    """The document less its unknown keys, when nothing else is wrong with its form: its content can then be checked."""
    if any(e["type"] != "extra_forbidden" for e in error.errors()):
        return []
    data = copy.deepcopy(data)
    for e in error.errors():
        place: Any = data
        for part in e["loc"][:-1]:  # parts that name a branch of a union are not in the data
            if isinstance(place, dict):
                place = place.get(part, place)
            elif isinstance(place, list) and isinstance(part, int):
                place = place[part]
        place.pop(e["loc"][-1], None)
    try:
        return [(Document.model_validate(data), lines)]
    except ValidationError:
        return []


OTHER_TOOLS = {"experts": "mergekit-moe", "genome": "mergekit-evolve"}


def problems_of(error: ValidationError, data: object, lines: Lines) -> list[Problem]:
    """What is wrong with a document's form."""
    for key, tool in OTHER_TOOLS.items():
        if isinstance(data, dict) and key in data and "merge_method" not in data:
            return [Problem(lines.at((key,)), f"{key}: this is a file for {tool}, not a recipe; run {tool}")]
    errors = error.errors()
    # A list whose parts are all wrong is called empty as well.
    noise = [e for e in errors if e["type"] == "too_short"]
    noise = [e for e in noise if any(o is not e and o["loc"][: len(e["loc"])] == e["loc"] for o in errors)]
    return [problem_of(e, lines) for e in errors if e not in noise]


def problem_of(error: Any, lines: Lines) -> Problem:
    """One pydantic error as a line of ours."""
    location: Location = error["loc"]
    where = ".".join(str(p) for p in location if not str(p).startswith("function-"))
    line = lines.at(location)
    if error["type"] == "extra_forbidden":
        name = str(location[-1])
        if name in {n for m in METHODS.values() for n in m.parameters} and "parameters" not in location:
            return Problem(line, f"{where}: {name} is a parameter of merge methods; it belongs under parameters")
        known = {k for cls in Strict.__subclasses__() for k in cls.model_fields} | {"layer_range", "on", "base"}
        return Problem(line, f"unknown key {location[-1]!r} at {where}{_close(name, known - {name})}")
    if error["type"] == "missing":
        return Problem(line, f"{where}: is missing")
    if not location and error["type"].startswith("model_type"):
        return Problem(line, "a recipe is a mapping: merge_method: ..., models: ...")
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] not in ("value_error", "missing") and not isinstance(error.get("input"), dict | list):
        message += f", not {error.get('input')!r}"
    return Problem(line, f"{where}: {message}" if where else message)


def _close(word: str, known: set[str]) -> str:
    text = suggestion(word, known)
    return text if text.startswith("; did") else ""

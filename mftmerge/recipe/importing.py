"""Read any mergekit YAML as a recipe."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mftmerge.errors import BadInput
from mftmerge.recipe.catalogue import METHODS, lookup
from mftmerge.recipe.check import check_documents, references
from mftmerge.recipe.lines import Lines, Location, load_documents, report
from mftmerge.recipe.load import OTHER_TOOLS, problem_of, problems_of
from mftmerge.recipe.locate import local
from mftmerge.recipe.schema import Document
from mftmerge.yamltext import read_text

HEADER = "# Imported from {name} by mftmerge. Add masks: to a model or to the result with mask:.\n"


@dataclass(frozen=True)
class ImportReport:
    """What was imported: the recipe's text, and what was left out or changed because mergekit ignores it anyway."""

    text: str
    notes: tuple[str, ...]


def import_recipe(config: str | Path, *, folder: Path | None = None) -> ImportReport:
    """The recipe that means what mergekit makes of `config`, comments kept where nothing had to change.

    mergekit ignores unknown keys and parameters; a recipe refuses them, so they are removed and noted. folder: where
    the recipe will be; relative paths of local models are rewritten when it is another directory than `config`'s.
    Raises BadInput for what mergekit itself would refuse.
    """
    config = Path(config)
    text = read_text(config)
    parsed, problems = load_documents(config, text)
    if not parsed:
        raise BadInput(f"{config}: there is nothing in it")
    notes: list[str] = [f"line {p.line}: {p.message}" for p in problems]
    documents, checked, edits = [], [], []
    for data, lines in parsed:
        cleaned, document, removed, lost = _clean(data, lines, config)
        notes += removed
        edits += lost
        documents.append(cleaned)
        checked.append((document, lines))
    if remaining := check_documents(checked):
        raise report(config, remaining)
    moved = _rebase(documents, [d for d, _ in checked], config.parent.resolve(), (folder or config.parent).resolve())
    notes += moved
    if not notes:
        return ImportReport(HEADER.format(name=config.name) + text, ())
    moves = dict(m.split(": now ", 1) for m in moved) | {"tokenizer_source: model:": "tokenizer_source: "}
    body = _edited(config, text, edits, moves, documents)
    if body is None:
        body = yaml.safe_dump_all(documents, sort_keys=False, default_flow_style=None)
    return ImportReport(HEADER.format(name=config.name) + body, tuple(notes))


def _clean(data: Any, lines: Lines, config: Path) -> tuple[object, Document, list[str], list[tuple[int, str]]]:
    """The document less the keys and parameters that mergekit passes over, checked; a note and the line of each."""
    data, notes, edits = copy.deepcopy(data), [], []
    for where, key, rule in _stray_keys(data):
        del rule[key]
        notes.append(f"line {lines.at(where)}: unknown key {key!r} in a rule: removed, mergekit ignores it")
        edits.append((lines.at(where), key))
    for _ in range(100):  # each round removes keys at one depth
        try:
            document = Document.model_validate(data)
            break
        except ValidationError as e:
            unknown = [error for error in e.errors() if error["type"] == "extra_forbidden"]
            if not unknown or OTHER_TOOLS.keys() & {str(error["loc"][0]) for error in unknown}:
                raise report(config, problems_of(e, data, lines)) from None
            for error in unknown:
                problem = problem_of(error, lines)
                what = problem.message.partition("; did you mean")[0]
                notes.append(f"line {problem.line}: {what}: removed, mergekit ignores it")
                edits.append((problem.line, str(error["loc"][-1])))
                _remove(data, error["loc"])
    for where, settings in _parameter_tables(data, ()):
        for name in [n for n in settings if n not in known_parameters(document)]:
            del settings[name]
            line = lines.at((*where, name))
            edits.append((line, name))
            notes.append(f"line {line}: parameter {name!r}: removed, {document.merge_method} has none of that name")
    source = data.get("tokenizer_source")
    if isinstance(source, str) and source.startswith("model:"):  # as mergekit wrote it once
        data["tokenizer_source"] = source.removeprefix("model:")
        notes.append(
            f"line {lines.at(('tokenizer_source',))}: tokenizer_source: {source} is written without model: now"
        )
    return data, Document.model_validate(data), notes, edits


def _edited(
    config: Path, text: str, removed: list[tuple[int, str]], moves: dict[str, str], wanted: list[object]
) -> str | None:
    """The text with its comments, less the removed (line, key) and with moved paths; None unless it says `wanted`."""
    rows = text.splitlines()
    for line, key in removed:
        row = rows[line - 1]
        if not row.lstrip().startswith(f"{key}:"):  # inside { }
            rows[line - 1] = re.sub(
                rf",\s*{re.escape(key)}:[^,{{}}\[\]]*|{re.escape(key)}:[^,{{}}\[\]]*,\s*", "", row, count=1
            )
            continue
        indent, stop = len(row) - len(row.lstrip()), line
        while stop < len(rows) and rows[stop].strip() and len(rows[stop]) - len(rows[stop].lstrip()) > indent:
            stop += 1
        rows[line - 1 : stop] = [""] * (stop - line + 1)  # the lines of other keys stay where they are
    edited = "\n".join(rows) + "\n"
    for old, new in moves.items():
        edited = re.sub(rf"(?<![\w./-]){re.escape(old)}(?![\w/-])" if "/" in old else re.escape(old), new, edited)
    try:
        found = [data for data, _ in load_documents(config, edited)[0]]
    except BadInput:
        return None
    return edited if found == wanted else None


def known_parameters(document: Document) -> set[str]:
    """Names of the parameters of the document's method (all that exist when the method is not known)."""
    method = lookup(document.merge_method)
    return set(method.parameters) if method else {n for m in METHODS.values() for n in m.parameters}


def _remove(data: Any, location: tuple[Any, ...]) -> None:
    for part in location[:-1]:
        if (isinstance(data, dict) and part in data) or (isinstance(data, list) and isinstance(part, int)):
            data = data[part]
    data.pop(location[-1], None)


def _stray_keys(data: object) -> list[tuple[Location, str, dict[str, object]]]:
    """Keys of the rules of parameters, [{filter, value}] or one of them, that are neither: place, key, and rule."""
    rules: list[tuple[Location, object]] = []
    for where, settings in _parameter_tables(data, ()):
        for name, value in settings.items():
            several = enumerate(value) if isinstance(value, list) else ()
            rules += [((*where, name), value), *(((*where, name, i), rule) for i, rule in several)]
    found = [(where, rule) for where, rule in rules if isinstance(rule, dict)]
    return [((*where, key), key, rule) for where, rule in found for key in rule if key not in ("filter", "value")]


def _parameter_tables(data: object, where: Location) -> list[tuple[Location, dict[str, object]]]:
    """Every `parameters:` in plain values, with its place."""
    if isinstance(data, list):
        return [t for i, v in enumerate(data) for t in _parameter_tables(v, (*where, i))]
    if not isinstance(data, dict):
        return []
    found: list[tuple[Location, dict[str, object]]] = []
    if isinstance(data.get("parameters"), dict):
        found.append(((*where, "parameters"), data["parameters"]))
    return found + [t for k, v in data.items() if k != "parameters" for t in _parameter_tables(v, (*where, k))]


def _rebase(documents: list[object], checked: list[Document], here: Path, there: Path) -> list[str]:
    """Make local models' relative paths absolute when the recipe goes to another directory; notes what changed."""
    if here == there:
        return []
    names = {d.name for d in checked}
    paths = {r.path for d in checked for _, r in references(d)} - names
    moved = {p: str(found) for p in paths if not Path(p).is_absolute() and (found := local(p, here))}
    for document in documents:
        _replace(document, moved)
    return [f"{old}: now {new}" for old, new in sorted(moved.items())]


def _replace(data: Any, moved: dict[str, str]) -> None:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in list(items):
        if isinstance(value, str) and (base := value.split("+")[0].split("@")[0]) in moved:
            data[key] = moved[base] + value[len(base) :]
        else:
            _replace(value, moved)

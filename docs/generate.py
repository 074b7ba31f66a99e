"""The parts of the documentation that repeat what the program declares: run it after changing a declaration.

    python docs/generate.py

It writes docs/recipe-reference.md, docs/api.md and recipes/recipe.schema.json whole, and the tables between
`<!-- generated: NAME -->` and `<!-- end -->` in the pages of `TABLES`. A test fails where the files differ.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mftmerge.learn.rebasesettings import RebaseSettings
from mftmerge.learn.settings import LearnSettings
from mftmerge.operations import OPERATIONS, Everywhere, options
from mftmerge.operations import meaning as option_meaning
from mftmerge.recipe import schema
from mftmerge.recipe.catalogue import ABOUT, METHODS, REQUIRED, Method, Parameter, meaning
from mftmerge.recipe.stockform import PUSH_DOWN, stock_form
from mftmerge.serve.settings import ServeSettings
from mftmerge.settings import Settings
from mftmerge.train.settings import TrainSettings

ROOT = Path(__file__).resolve().parent.parent
# The parts of a recipe and how the page calls them.
PARTS: list[tuple[type[BaseModel], str]] = [
    (schema.Document, "A document"),
    (schema.ModelInput, "One of `models:`"),
    (schema.BaseInput, "`base_model:`"),
    (schema.OutputSlice, "One of `slices:`"),
    (schema.SliceInput, "One of a slice's `sources:`"),
    (schema.Module, "One of `modules:`"),
    (schema.MaskExpression, "A mask: in `masks:`, `of:`"),
    (schema.MaskUse, "A mask that is applied: `mask:`"),
    (schema.Learn, "`learn:` of a mask"),
    (schema.Reference, "A model reference, written as a mapping"),
    (schema.Tokenizer, "`tokenizer:`"),
    (schema.TokenSetting, "One of `tokens:`"),
    (schema.TokenSource, "`source:` of a token"),
]
HEADINGS = dict(PARTS)
INTRODUCTION = """\
# Recipe reference

Every key of a recipe, every merge method with its parameters, and what becomes of each in stock mergekit. Written by
`python docs/generate.py` from the program's own declarations; [recipes.md](recipes.md) explains and shows examples. Any
other key is an error. `recipes/recipe.schema.json` says the same to editors.

A recipe is a YAML file of one or more documents. A **parameter** (a value in `parameters:`) is a number, a text or
true/false; a list of them, a gradient over the layers; or a list of `{filter, value}`, of which the first whose
`filter` is a part of the tensor's name counts.
"""


def main() -> None:
    """Write every generated file and table."""
    for path, text in pages().items():
        (ROOT / path).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Path in the repository -> the text that the file should have."""
    found = {
        "docs/recipe-reference.md": recipe_reference(),
        "docs/api.md": api_page(),
        "recipes/recipe.schema.json": json.dumps(schema.json_schema(), indent=2) + "\n",
    }
    for path, tables in TABLES.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        for name, table in tables.items():
            text = put(text, name, table(), path)
        found[path] = text
    return found


def api_page() -> str:
    """docs/api.md, see docs/api.py."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from api import page
    finally:
        sys.path.pop(0)
    return page()


def put(text: str, name: str, table: str, path: str) -> str:
    """A page with its generated part `name` replaced."""
    begin, end = f"<!-- generated: {name} -->\n", "<!-- end -->"
    if text.count(begin) != 1:
        raise SystemExit(f"{path}: needs exactly one line {begin!r}")
    before, rest = text.split(begin)
    return f"{before}{begin}{table}\n{end}{rest.split(end, 1)[1]}"


def rows(header: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells)


# -- recipes ----------------------------------------------------------------------------------------------------------


def recipe_reference() -> str:
    """docs/recipe-reference.md."""
    text = [INTRODUCTION, "## Keys\n"]
    for part, heading in PARTS:
        about = " ".join((inspect.getdoc(part) or "").split("\n\n")[0].split())
        text += [f"### {heading}\n", f"{about}\n", fields(part), ""]
        if part is schema.MaskExpression:
            text += ["Beside `op:`, options of the operation:\n", option_table("key", "{}"), ""]
    text += ["## Operations in `op:`\n", operations(), ""]
    text += ["`density` and `uncovered` belong to every operation. See [operations.md](operations.md).\n"]
    text += ["## Merge methods\n", methods(), "", METHOD_NOTES, parameters(), "", EXPORTS]
    text += [rows(["mask", "form in the export", "equal"], MASK_EXPORTS), EXPORT_NOTES]
    return "\n".join(text)


def fields(part: type[BaseModel]) -> str:
    """Key, type, default and meaning of each field."""
    lines = []
    for name, field in part.model_fields.items():
        lines.append([f"`{name}`", type_text(field.annotation, field), default(field), field.description or ""])
    return rows(["key", "type", "default", "meaning"], lines)


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "" if field.default in (None, PydanticUndefined) else f"`{json.dumps(field.default)}`"


def type_text(annotation: Any, field: FieldInfo | None = None) -> str:
    """A type as a reader of YAML knows it."""
    if annotation is Any:
        return "parameter"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        anchor = re.sub(r"[^\w -]", "", HEADINGS[annotation].lower()).replace(" ", "-")
        return f"[{annotation.__name__}](#{anchor})"
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_text(inside[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_text(a) for a in inside if a is not type(None)))
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin is tuple:
        return f"list of {type_text(inside[0])}" if inside[-1] is Ellipsis else "[integer, integer]"
    if origin is list:
        return f"list of {type_text(inside[0])}"
    if origin is dict:
        return f"mapping of name to {type_text(inside[1])}"
    return {str: "text", int: "integer", float: "number", bool: "true or false"}[annotation]


def methods() -> str:
    """What each merge method gives and takes."""
    lines = []
    for name, method in METHODS.items():
        label = f"`{name}`" + (" (ours)" if method.ours else "")
        takes = "; ".join(parameter(key, p) for key, p in method.parameters.items()) or "none"
        lines.append([label, ABOUT[name], BASE[method.base], count(method), takes, stock_form(name)])
    return rows(["method", "result", "`base_model`", "models", "parameters", "in an export"], lines)


BASE = {"ignored": "one more input", "required": "required", "optional": "optional"}


def count(method: Method) -> str:
    besides = method.base != "ignored" and method.non_base != (None, None)
    low, high = method.non_base if besides else method.inputs
    counted = " besides the base" if besides else ", the base included" if method.base == "required" else ""
    return (str(low) if low == high else f"{low} or more") + counted


def parameter(key: str, p: Parameter) -> str:
    """`weight` number for each model, required."""
    kind = {"float": "number", "int": "integer", "bool": "true/false", "str": "text"}[p.kind]
    scope = "" if p.scope == "shared" else " for each model"
    if p.default in (REQUIRED, None):
        return f"`{key}` {kind}{scope}" + (", required" if p.default else "")
    return f"`{key}` {kind}{scope} = {json.dumps(p.default)}"


def parameters() -> str:
    """What each parameter means."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, method in METHODS.items():
        for key in method.parameters:
            found.setdefault((key, meaning(name, key)), []).append(name)
    shared = {key for key, _ in found if sum(k == key for k, _ in found) == 1}
    lines = [[f"`{k}`", "all that have it" if k in shared else ", ".join(of), text] for (k, text), of in found.items()]
    return rows(["parameter", "of", "meaning"], lines)


METHOD_NOTES = """\
"For each model": in `parameters:` of the model, or at the top for all models. The methods that are not ours are those
of mergekit 0.1.5, computed by mergekit itself ([recipes.md](recipes.md#how-a-build-works)); a test compares this table
with mergekit's registry.
"""
EXPORTS = """\
## What is exact in an export

`mftmerge export` writes checkpoints and a configuration for stock mergekit. "The method itself" is bit-equal, also for
random methods with the same seed. Masks become:
"""
MASK_EXPORTS = [  # place, form, what is equal
    ["on an input or the base, on weights or delta", "that model as a masked checkpoint", "bits"],
    ["on the result of a `passthrough` of one model", "one masked checkpoint", "bits"],
    ["on the result, on weights", "a second merge over a K-mask", "values (a kept -0 becomes +0)"],
    [
        f"on the result, on delta; up to two models, at density 1, of {', '.join(f'`{name}`' for name in PUSH_DOWN)}",
        "localised checkpoints",
        "values",
    ],
    [
        "on the result, on delta, otherwise",
        "K-mask for what is kept, plus the base where dropped, by `linear`",
        "values",
    ],
    [
        "on the result, with a merged tokenizer, over modules, or with float16 beside other types",
        "the result itself, passed through",
        "bits",
    ],
]
EXPORT_NOTES = """
[recipes.md](recipes.md#export-to-stock-mergekit) says what a K-mask is and within which bounds it is exact. `--verify`
runs stock mergekit and compares every weight.
"""


# -- tables -----------------------------------------------------------------------------------------------------------


def operations(form: str = "{}") -> str:
    """The operations, what each keeps, and its options."""
    lines = []
    for name, op in OPERATIONS.items():
        if not op.summary:
            raise SystemExit(f"operation {name}: needs a docstring, it is its documentation")
        lines.append([f"`{name}`", op.summary, ", ".join(f"`{form.format(option)}`" for option in op.options)])
    return rows(["operation", "meaning", "options"], lines)


def option_table(heading: str, form: str) -> str:
    """The operations' options, then those that each of them has."""
    lines = [(name, field, option_meaning(name)) for name, (_, field) in options().items()]
    lines += [(name, field, field.description or "") for name, field in Everywhere.model_fields.items()]
    return rows(
        [heading, "type", "meaning"],
        [
            [f"`{form.format(name)}`", type_text(field.annotation), f"{text[:1].upper()}{text[1:]}."]
            for name, field, text in lines
        ],
    )


def command_line(table: str) -> str:
    """A table with options as the command line has them."""
    return re.sub(r"`--([a-z_]+)`", lambda m: f"`--{m[1].replace('_', '-')}`", table)


def operations_page() -> str:
    """The tables of docs/operations.md."""
    return command_line(f"{operations('--{}')}\n\n{option_table('option', '--{}')}")


def settings(model: type[Settings]) -> Callable[[], str]:
    """Every setting of a training run, or of one that learns a merge."""

    def table() -> str:
        lines = []
        for name, field in model.model_fields.items():
            lines.append([f"`{name}`", type_text(field.annotation, field), default(field), field.description or ""])
        return rows(["setting", "type", "default", "meaning"], lines)

    return table


def scale() -> dict[str, Callable[[], str]]:
    """The tables of docs/scale.md, which a benchmark computes."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from scale import TABLES as tables
    finally:
        sys.path.pop(0)
    return tables


TABLES = {
    "docs/operations.md": {"operations": operations_page},
    "docs/training.md": {"settings": settings(TrainSettings)},
    "docs/learning.md": {"settings": settings(LearnSettings), "rebase": settings(RebaseSettings)},
    "docs/scale.md": scale(),
    "docs/serving.md": {"serve": settings(ServeSettings)},
}

if __name__ == "__main__":
    main()

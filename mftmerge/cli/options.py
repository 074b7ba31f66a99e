"""Options of the commands: those generated from settings models, those that many commands share, and their values.

A settings model declares an option once, as a field. `@options(given=TrainSettings)` puts one option for each field in
the place of the parameter `given` of a command, which gets the values that were typed; the model checks them.
"""

from __future__ import annotations

import functools
import inspect
import os
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mftmerge.errors import BadInput
from mftmerge.settings import Flag, Settings, inner_type, parsed

Completion = Callable[[str], list[str]]

MASKS = (".mask",)
ROWS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz")
YAML = (".yml", ".yaml")
WORDS: dict[Any, str] = {str: "TEXT", int: "N", float: "NUMBER", Path: "PATH"}


# -- what Tab offers: light, no command and no library is imported for it ---------------------------------------------


def files(*endings: str) -> Completion:
    """Offers the files with these endings. Where a directory fits too, the shell's own completion is left to it."""

    def offered(incomplete: str) -> list[str]:
        folder, start = os.path.split(incomplete)
        try:
            found = [e for e in os.scandir(folder or ".") if e.name.startswith(start) and (start or e.name[0] != ".")]
        except OSError:
            return []
        if any(entry.is_dir() for entry in found):
            return []
        return sorted(os.path.join(folder, entry.name) for entry in found if entry.name.endswith(endings))

    return offered


def words(*known: str) -> Completion:
    """Offers these words."""
    return lambda incomplete: [word for word in known if word.startswith(incomplete)]


# -- options that many commands share ---------------------------------------------------------------------------------

AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT.")]
ReplacePictures = Annotated[bool, typer.Option("--overwrite", help="Replace a picture that is there.")]
Archive = Annotated[bool, typer.Option("--archive", help="Compress the result (about half the size).")]
MaskOut = Annotated[Path, typer.Option("--out", "-o", help="The mask file to write.")]
ModelOut = Annotated[Path, typer.Option("--out", "-o", help="Directory to write.")]
MaskFile = Annotated[
    Path, typer.Argument(help="The .mask file, here or as hf://owner/name/file.mask.", autocompletion=files(*MASKS))
]
Recipe = Annotated[Path, typer.Argument(help="Recipe: a mergekit YAML plus masks.", autocompletion=files(*YAML))]


# -- options from settings --------------------------------------------------------------------------------------------


def options(**models: type[Settings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command an option for each field of each model.

    models: parameter of the command -> settings model. The parameter gets a dict of the values that were typed, by
    name of field, to be given to `model.make`, alone or over those of a file. A name that several models have is one
    option, of the first of them, and its value goes to each.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
            known = {p.name for p in parameters}
            parameters += (
                [p for p in _parameters(models[name]) if p.name not in known] if name in models else [parameter]
            )

        @functools.wraps(command)
        def run(**values: Any) -> None:
            typed = {name: values.pop(name) for name in {n for m in models.values() for n in m.model_fields}}
            for parameter, model in models.items():
                values[parameter] = {
                    name: _value(field, name, typed[name])
                    for name, field in model.model_fields.items()
                    if typed[name] is not None and typed[name] != []
                }
            command(**values)

        vars(run)["__signature__"] = inspect.Signature(
            [p.replace(kind=p.KEYWORD_ONLY) for p in parameters]
        )  # typer reads it
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _parameters(model: type[Settings]) -> Iterator[inspect.Parameter]:
    for name, field in model.model_fields.items():
        flag = _flag(field)
        kind, metavar = _kind(field.annotation)
        names = flag.names or (f"--{name.replace('_', '-')}",)
        if kind is bool and not flag.names:
            names = tuple(f"{n}/--no-{n[2:]}" if n.startswith("--") else n for n in names)
        option = typer.Option(
            None,
            *names,
            help=_help(field),
            metavar=flag.metavar or metavar,
            autocompletion=files(*flag.endings) if flag.endings else words(*flag.words) if flag.words else None,
            show_default=False,
        )
        if typing.get_origin(kind) is not list:
            kind |= None
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)


def _flag(field: FieldInfo) -> Flag:
    return next((m for m in field.metadata if isinstance(m, Flag)), Flag())


def _kind(annotation: Any) -> tuple[Any, str | None]:
    """The type that typer reads for a field of this type, and how the help page calls a value."""
    inner = inner_type(annotation)
    origin, inside = typing.get_origin(inner), typing.get_args(inner)
    if origin is Literal and not isinstance(inside[0], str):
        return type(inside[0]), f"[{'|'.join(map(str, inside))}]"
    if origin is dict:
        return list[str], "NAME=VALUE"
    if origin in (list, tuple):
        return (list[str], "TEXT") if inside[0] in (str, Path) else (str, "NUMBER,...")
    return inner, WORDS.get(inner)


def _value(field: FieldInfo, name: str, value: Any) -> Any:
    """A value as the field takes it: numbers apart by commas, NAME=VALUE pairs. Raises BadInput, with the option."""
    option = (_flag(field).names or (f"--{name.replace('_', '-')}",))[0]
    if typing.get_origin(inner_type(field.annotation)) is dict:
        return pairs(value, option, _flag(field).metavar or "NAME=VALUE")
    return parsed(field, value, ",", option)


def _help(field: FieldInfo) -> str:
    """The field's description as a sentence, with the default."""
    text = field.description or ""
    default = "" if field.default in (None, False, (), []) or field.default is PydanticUndefined else field.default
    shown = f" [{'on' if default is True else default}]" if default != "" and "default" not in text else ""
    return f"{text[:1].upper()}{text[1:]}{shown}."


# -- values -----------------------------------------------------------------------------------------------------------


def pairs(texts: list[str], option: str, form: str = "NAME=VALUE") -> dict[str, str]:
    """What was typed as NAME=VALUE."""
    found = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise BadInput(f"{option} {text}: give {form}")
        found[name] = value
    return found


def named(texts: list[str], option: str) -> dict[str, str]:
    """Name -> path of what was typed as [NAME=]PATH: without a name, the file's or directory's own stands in."""
    found: dict[str, str] = {}
    for text in texts:
        name, sign, path = text.partition("=")
        if not sign or "/" in name or Path(text).exists():
            file = Path(text)
            name, path = file.stem if file.suffix in (*MASKS, *ROWS) else file.name, text
        if not name or not path:
            raise BadInput(f"{option} {text}: give NAME=PATH or a path")
        if name in found:
            raise BadInput(f"{option}: two are called {name!r}; name them apart with NAME=PATH")
        found[name] = path
    return found

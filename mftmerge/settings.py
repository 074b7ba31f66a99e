"""Settings models: each option is declared once, as a field with its type, default and one sentence.

The command line's options, the fields of `--config` files, the arguments in Python and the rows of the documentation
all follow from these fields. A component's settings stand in a subclass beside the component.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from mftmerge.errors import BadInput
from mftmerge.yamltext import read_document

# What numpy, and with it accelerate, optuna and mergekit, take as a seed.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
BETWEEN = {",": "commas, such as 2,1", ":": "colons, such as 2:1"}


@dataclass(frozen=True)
class Flag:
    """What the command line needs to know about a field beyond its type, `Annotated[Path, Flag(("--out", "-o"))]`.

    names: the option's names where they are not `--` and the field's name. endings: of the files
    that Tab offers. metavar: how the help page calls a value where the type does not say it. words: that Tab offers.
    """

    names: tuple[str, ...] = ()
    endings: tuple[str, ...] = ()
    metavar: str | None = None
    words: tuple[str, ...] = ()


class Settings(BaseModel):
    """Base of all settings models: unknown names, infinities and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    @classmethod
    def make(cls, given: Mapping[str, object]) -> Self:
        """Settings from plain values. Raises BadInput, which names the wrong one."""
        try:
            return cls(**given)
        except ValidationError as e:
            first = e.errors()[0]
            name = ".".join(map(str, first["loc"])) or "settings"
            known = f"; there are {', '.join(cls.model_fields)}" if first["type"] == "extra_forbidden" else ""
            raise BadInput(f"{name}: {first['msg'].removeprefix('Value error, ')}{known}") from None

    @classmethod
    def of(cls, given: Self | Mapping[str, object] | None, others: Mapping[str, object]) -> Self:
        """Settings that were given, or plain values, with others over them. Raises BadInput as `make`."""
        known = given.model_dump(exclude_unset=True) if isinstance(given, Settings) else dict(given or {})
        return cls.make({**known, **others})

    @classmethod
    def read(cls, path: Path, form: str) -> Self:
        """Settings from a YAML file. form: what such a file is, in words. Raises BadInput that names the file."""
        values = read_document(path)
        if not isinstance(values, dict):
            raise BadInput(f"{path}: {form}")
        try:
            return cls.make(values)
        except BadInput as e:
            raise BadInput(f"{path}: {e}") from None

    @classmethod
    def load(cls, path: str | Path, also: tuple[str, ...] = ()) -> dict[str, Any]:
        """The values in a YAML file of settings, checked; `also`: names that the file may have besides the fields.

        Raises BadInput unless the file is a mapping of known names.
        """
        values = read_document(Path(path)) or {}
        if not isinstance(values, dict):
            raise BadInput(f"{path}: settings must be a mapping such as 'keep: 0.9'")
        try:
            cls.make({k: v for k, v in values.items() if k not in also})
        except BadInput as e:
            raise BadInput(f"{path}: {e}") from None
        return values

    def to_yaml(self, **first: object) -> str:
        """The settings as YAML, after entries of the caller's own."""
        import yaml

        return str(yaml.safe_dump({**first, **self.model_dump(mode="json")}, sort_keys=False))


def inner_type(annotation: object) -> Any:
    """A field's type without None and bounds; of several types, text: the model finds out which it is."""
    if get_origin(annotation) in (Union, UnionType):
        inner = [a for a in get_args(annotation) if a is not type(None)]
        return inner_type(inner[0]) if len(inner) == 1 else str
    return inner_type(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation


def parsed(field: FieldInfo, typed: object, apart: str, called: str) -> Any:
    """A typed value as a field takes it; several values stand between commas or colons. Raises BadInput."""
    value, hint = typed, ""
    if get_origin(inner_type(field.annotation)) in (list, tuple) and isinstance(typed, str):
        value, hint = typed.replace(apart, " ").split(), f"; give numbers between {BETWEEN[apart]}"
    kind: Any = Annotated[(field.annotation, Flag(), *field.metadata)]  # the type with its bounds
    return valid(kind, value, f"{called} {typed}", hint)


def valid(kind: Any, value: object, called: str, hint: str = "") -> Any:
    """A value as a type takes it. Raises BadInput with what it is called, and the hint."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as e:
        raise BadInput(f"{called}: {e.errors()[0]['msg'].removeprefix('Value error, ')}{hint}") from None


def in_words(values: Mapping[str, object]) -> str:
    """Some settings in words: `lr 0.001, steps 60`."""
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "the settings given"

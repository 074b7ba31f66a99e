"""Merge methods from outside: `@merge_method` makes a function of one tensor a method that recipes can name."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any, Literal

from mftmerge import plugins
from mftmerge.errors import BadInput
from mftmerge.recipe.catalogue import ABOUT, METHODS, REQUIRED, Kind, Method, Parameter

Function = Callable[..., Any]
KINDS: dict[Any, Kind] = {float: "float", int: "int", bool: "bool", str: "str"}


def merge_method(
    *, base: Literal["required", "optional"] = "required", least: int = 1, most: int | None = None, random: bool = False
) -> Callable[[Function], Function]:
    """Register a typed function as a merge method under its own name.

    It is called for each tensor of the result with the base model's tensor (None without one) and the list of the other
    models' tensors, all of one shape, and returns the merged tensor of that shape; it is stored in the models' dtype.
    Its keyword-only arguments are the method's parameters: `float`, `int`, `bool` or `str` is one value for the merge,
    `list[float]` and so on has one value for each model, in the models' order, and must be given in the recipe. Its
    docstring is the description.
    least, most: how many models besides the base. random: it draws random numbers (`--seed` then sets torch's).
    Raises BadInput for a parameter of another type, or a name that is taken.
    """

    def register(function: Function) -> Function:
        name = function.__name__
        known = METHODS.get(name)
        owner = None if known is None else getattr(known.function, "__module__", "mergekit or mftmerge")
        plugins.free(name, function.__module__, owner, "merge method")
        hints = typing.get_type_hints(function)
        keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        parameters = {p.name: _parameter(name, p, hints.get(p.name)) for p in keywords}
        METHODS[name] = Method(parameters, base, (1, None), (least, most), random, ours=True, function=function)
        ABOUT[name] = (inspect.getdoc(function) or "").split("\n")[0]
        return function

    return register


def _parameter(method: str, declared: inspect.Parameter, hint: Any) -> Parameter:
    default = REQUIRED if declared.default is declared.empty else declared.default
    if hint in KINDS:
        return Parameter(KINDS[hint], "shared", default)
    (inner,) = typing.get_args(hint) if typing.get_origin(hint) is list else (None,)
    if inner in KINDS and default == REQUIRED:
        return Parameter(KINDS[inner], "non_base", default)
    raise BadInput(
        f"merge method {method!r}: parameter {declared.name!r} must be float, int, bool or str, "
        "or a list of one of them without a default"
    )

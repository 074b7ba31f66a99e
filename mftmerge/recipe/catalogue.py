"""The merge methods a recipe may name: their parameters and how many models they take.

mergekit knows the same of its own methods, but importing it takes five seconds and it ignores what it does not know;
this table lets a recipe be checked at once. A test compares it with mergekit's registry.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

REQUIRED = "required"
Kind = Literal["float", "int", "bool", "str"]
Scope = Literal["shared", "input", "non_base"]


@dataclass(frozen=True)
class Parameter:
    """A parameter of a merge method. scope: one value, one for each input, or one for each input but the base."""

    kind: Kind
    scope: Scope
    default: bool | int | float | str | None = REQUIRED


@dataclass(frozen=True)
class Method:
    """A merge method: what it needs. `ours`: registered by mftmerge, so stock mergekit does not have it."""

    parameters: dict[str, Parameter] = field(default_factory=dict)
    base: Literal["optional", "required", "ignored"] = "ignored"
    inputs: tuple[int, int | None] = (1, None)
    non_base: tuple[int | None, int | None] = (None, None)
    random: bool = False
    ours: bool = False
    mask_as_parameter: bool = False


def _shared(kind: Kind, default: bool | int | float | str | None = REQUIRED) -> Parameter:
    return Parameter(kind, "shared", default)


def _task_arithmetic(normalize: bool, rescale: bool, random: bool = False, **more: float) -> Method:
    """A method of mergekit's task-arithmetic family; `more`: per-model float parameters with their defaults."""
    return Method(
        {
            "int8_mask": _shared("bool", False),
            "normalize": _shared("bool", normalize),
            "rescale": _shared("bool", rescale),
            "lambda": _shared("float", 1.0),
            "weight": Parameter("float", "non_base"),
            "density": Parameter("float", "non_base", 1.0),
            **{name: Parameter("float", "non_base", default) for name, default in more.items()},
        },
        base="required",
        random=random,
    )


METHODS: dict[str, Method] = {
    "linear": Method({"weight": Parameter("float", "input"), "normalize": _shared("bool", True)}),
    "passthrough": Method({"scale": Parameter("float", "input", None)}, inputs=(1, 1)),
    "task_arithmetic": _task_arithmetic(False, False),
    "ties": _task_arithmetic(True, False),
    "dare_ties": _task_arithmetic(False, True, random=True),
    "dare_linear": _task_arithmetic(False, True, random=True),
    "breadcrumbs": _task_arithmetic(False, False, gamma=0.01),
    "breadcrumbs_ties": _task_arithmetic(False, False, gamma=0.01),
    "della": _task_arithmetic(True, True, random=True, epsilon=0.15),
    "della_linear": _task_arithmetic(False, True, random=True, epsilon=0.15),
    "slerp": Method({"t": _shared("float")}, "required", (2, 2)),
    "nearswap": Method({"t": _shared("float")}, "required", (2, 2)),
    "arcee_fusion": Method({}, "required", (2, 2)),
    "nuslerp": Method(
        {
            "weight": Parameter("float", "non_base"),
            "nuslerp_row_wise": _shared("bool", False),
            "nuslerp_flatten": _shared("bool", True),
        },
        "optional",
        non_base=(2, 2),
    ),
    "multislerp": Method(
        {
            "weight": Parameter("float", "non_base"),
            "normalize_weights": _shared("bool", True),
            "eps": _shared("float", 1e-8),
        },
        "optional",
        non_base=(1, None),
    ),
    "karcher": Method({"max_iter": _shared("int", 10), "tol": _shared("float", 1e-5)}),
    "model_stock": Method({"filter_wise": _shared("bool", False)}, "required", (3, None)),
    "sce": Method({"int8_mask": _shared("bool", False), "select_topk": _shared("float", 1.0)}, "required"),
    "ram": Method({"epsilon": _shared("float", 1e-5)}, "required"),
    "ramplus_tl": Method(
        {"r": _shared("float", 0.1), "alpha": _shared("float", 0.2), "epsilon": _shared("float", 1e-5)}, "required"
    ),
    # ours, see methods.py
    "masked": Method(
        {"mask": _shared("str", None), "missing": _shared("str", "keep")},
        "optional",
        non_base=(1, 1),
        ours=True,
    ),
    "consensus": Method(
        {
            "weight": Parameter("float", "non_base", 1.0),
            "tall_lambda": Parameter("float", "non_base", 0.4),
            "k": _shared("int", 2),
            "lambda": _shared("float", 1.0),
        },
        "required",
        non_base=(1, None),
        ours=True,
    ),
    "localize_and_stitch": Method(
        {
            "density": Parameter("float", "non_base", 1.0),
            "mask": Parameter("str", "non_base", None),
            "lambda": _shared("float", 1.0),
        },
        "required",
        non_base=(1, None),
        ours=True,
        mask_as_parameter=True,
    ),
    "emr": Method(
        {"task": Parameter("bool", "non_base", False)},
        "required",
        non_base=(1, None),
        ours=True,
    ),
}


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the list of what is known when nothing is close."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""


def table() -> str:
    """The methods as a table in Markdown, as it stands in docs/recipes.md (a test compares them)."""
    rows = ["| method | base model | models | parameters |", "|---|---|---|---|"]
    for name, method in METHODS.items():
        besides = method.base != "ignored" and method.non_base != (None, None)
        low, high = method.non_base if besides else method.inputs
        count = str(low) if low == high else f"{low} or more"
        counted = " besides the base" if besides else ", the base included" if method.base == "required" else ""
        base = "one more input" if method.base == "ignored" else method.base
        parameters = [_described(key, p) for key, p in method.parameters.items()]
        label = f"`{name}`" + (" (ours)" if method.ours else "")
        rows.append(f"| {label} | {base} | {count}{counted} | {'; '.join(parameters) or 'none'} |")
    return "\n".join(rows)


def _described(key: str, parameter: Parameter) -> str:
    default = "" if parameter.default == REQUIRED else f" = {str(parameter.default).lower()}"
    required = ", required" if parameter.default == REQUIRED else ""
    return f"`{key}` {parameter.kind}{'' if parameter.scope == 'shared' else ' for each model'}{default}{required}"

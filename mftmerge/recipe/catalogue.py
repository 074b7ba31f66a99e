"""The merge methods a recipe may name: their parameters and how many models they take.

mergekit knows the same of its own methods, but importing it takes five seconds and it ignores what it does not know;
this table lets a recipe be checked at once. A test compares it with mergekit's registry.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from mftmerge import plugins

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
    """A merge method: what it needs. `ours`: registered by mftmerge, so stock mergekit does not have it.

    function: of a method that was added by `extend.merge_method`.
    """

    parameters: dict[str, Parameter] = field(default_factory=dict)
    base: Literal["optional", "required", "ignored"] = "ignored"
    inputs: tuple[int, int | None] = (1, None)
    non_base: tuple[int | None, int | None] = (None, None)
    random: bool = False
    ours: bool = False
    mask_as_parameter: bool = False
    function: Callable[..., Any] | None = None


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


def lookup(name: str) -> Method | None:
    """The method of that name, from this program, mergekit or a plug-in."""
    if name not in METHODS:
        plugins.load()
    return METHODS.get(name)


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the list of what is known when nothing is close."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""


# A line on each method and parameter, for the reference (docs/recipe-reference.md). A test asks for all of them.
ABOUT: dict[str, str] = {
    "linear": "The weighted average of the models.",
    "passthrough": "One model's tensors as they are; with `slices:`, layers of several models one after another.",
    "task_arithmetic": "The base plus the weighted sum of the task vectors (model minus base).",
    "ties": "As task arithmetic over each model's largest changes, without those against the elected sign.",
    "dare_ties": "As `ties`, but the changes that stay are drawn at random and enlarged.",
    "dare_linear": "As task arithmetic over changes that are drawn at random and enlarged.",
    "breadcrumbs": "As task arithmetic without the largest and the smallest changes.",
    "breadcrumbs_ties": "As `ties` without the largest and the smallest changes.",
    "della": "As `dare_ties`, where larger changes are drawn with a higher probability.",
    "della_linear": "As `dare_linear`, where larger changes are drawn with a higher probability.",
    "slerp": "A point on the arc between two models.",
    "nearswap": "The base, moved to the other model where the two are close.",
    "arcee_fusion": "The base plus the other model's most important changes.",
    "nuslerp": "As `slerp` with a weight for each model; with a base, between the task vectors.",
    "multislerp": "A weighted mean on the sphere of any number of models; with a base, of the task vectors.",
    "karcher": "The mean of the models' directions on the sphere, found step by step.",
    "model_stock": "The base and the models' average, mixed by the angle between the task vectors.",
    "sce": "Task vectors where they vary most between models, weighted by their size, without minority signs.",
    "ram": "Changes of one model alone as they are, changes of several averaged.",
    "ramplus_tl": "As `ram`, with the changes of one model alone enlarged.",
    "masked": "One model with its mask. With a base and `on: delta`, dropped weights return to the base.",
    "consensus": "The sum of weighted task vectors where at least `k` tasks want it (TALL masks, arXiv 2405.07813).",
    "localize_and_stitch": "Each model's changes inside its region, averaged where regions overlap (arXiv 2408.13656).",
    "emr": "One unified task vector; with `task`, one model rebuilt from it by a mask and a scale (arXiv 2405.17461).",
}
# By parameter, or by "method.parameter" where a method means something of its own.
MEANING: dict[str, str] = {
    "weight": "share of the model, or factor of its task vector",
    "normalize": "divide by the sum of the weights",
    "scale": "factor on the tensor",
    "int8_mask": "mergekit keeps its sign masks in 8 bits; saves memory",
    "rescale": "enlarge what sparsification keeps, to the sum of magnitudes before it",
    "lambda": "factor on the merged task vector",
    "density": "share of each task vector that is kept",
    "gamma": "share of the largest changes that is removed",
    "epsilon": "a change up to this counts as none",
    "della.epsilon": "half the range of the probabilities of keeping, around `density`",
    "della_linear.epsilon": "as for `della`",
    "t": "0 is the base, 1 the other model",
    "nearswap.t": "how close a weight must be: the other model's share is t over the distance, at most 1",
    "nuslerp_row_wise": "rows are the vectors, not columns; needs `nuslerp_flatten: false`",
    "nuslerp_flatten": "the whole tensor is one vector",
    "normalize_weights": "divide the weights by their sum",
    "eps": "keeps divisions finite",
    "max_iter": "steps at most",
    "tol": "change at which it stops",
    "filter_wise": "a mixing weight for each row, not one for the tensor",
    "select_topk": "share of positions with the highest variance that is kept",
    "r": "how much changes of one model alone are enlarged",
    "alpha": "upper limit of the ratio of shared to unique changes that enlarges them",
    "mask": "a .mask file; `mask:` on the model does the same and takes operations",
    "missing": "keep: a tensor that the mask does not cover stays as it is; error: refuse it",
    "tall_lambda": "a task wants a weight where its change is at least this times the sum of the others' changes",
    "k": "tasks that must want a weight",
    "localize_and_stitch.density": "share of the model's largest changes in each tensor that is its region",
    "localize_and_stitch.mask": "the model's region; set by `mask:` on the model",
    "task": "rebuild this model; at most one may say true",
}


def meaning(method: str, parameter: str) -> str:
    """What a parameter of a method means. KeyError for one that nobody described."""
    own = f"{method}.{parameter}"
    return MEANING[own] if own in MEANING else MEANING[parameter]

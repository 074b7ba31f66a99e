"""The merge methods a recipe may name: mergekit's, as they declare themselves, and ours."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from mergekit.merge_methods import registered_methods
from mergekit.merge_methods.base import MergeMethodSpec

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


# Methods that draw random numbers, which their specs do not say. COUNTED: as many of `torch.bernoulli` as there are
# weights in the task vectors that they thin out.
COUNTED = ("dare_ties", "dare_linear", "della", "della_linear")
RANDOM = (*COUNTED, "arcee_fusion")


def described(spec: MergeMethodSpec) -> Method:
    """One of mergekit's methods, as it declares itself."""
    kinds: dict[object, Kind] = {float: "float", int: "int", bool: "bool", str: "str"}

    def kind(value_type: object) -> Kind:  # of `float` or `float | None`
        return next(kinds[t] for t in (value_type, *typing.get_args(value_type)) if t in kinds)

    parameters = {
        p.name: Parameter(kind(p.value_type), p.scope.value, REQUIRED if p.required else p.default)
        for p in spec.parameters
    }
    c = spec.contract
    inputs, non_base = (c.min_inputs, c.max_inputs), (c.min_non_base, c.max_non_base)
    return Method(parameters, c.base.value, inputs, non_base, random=spec.name in RANDOM)


OURS: dict[str, Method] = {  # implemented in methods.py
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
    "select": Method(
        {"mask": Parameter("str", "non_base", None)},
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

# All of them by name; `extend.merge_method` adds to it.
METHODS: dict[str, Method] = {
    m.spec.name: described(m.spec) for m in registered_methods() if m.spec.name not in OURS
} | OURS


# Methods in which a weight of the result follows from the same weight of the inputs alone; the others of the
# task-arithmetic family do so where nothing is cut.
BY_ELEMENT = ("linear", "passthrough", "task_arithmetic", "nearswap", "ram")
SORTED = ("ties", "breadcrumbs", "breadcrumbs_ties")  # which sort magnitudes, and do the rest weight by weight
AT_DENSITY_1 = ("ties", "dare_ties", "dare_linear", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear")


def by_element(method: str, whole: bool) -> bool:
    """Whether a tensor can be merged in pieces. whole: whether the density of every task vector is 1."""
    return method in BY_ELEMENT or (whole and method in AT_DENSITY_1)


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
    "select": "Each weight as it is in the first model whose mask keeps it, else in the base: nothing is rounded.",
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
    "select.mask": "the weights that the model gives; set by `mask:` on the model, none of a tensor it does not cover",
    "task": "rebuild this model; at most one may say true",
}


def meaning(method: str, parameter: str) -> str:
    """What a parameter of a method means. KeyError for one that nobody described."""
    own = f"{method}.{parameter}"
    return MEANING[own] if own in MEANING else MEANING[parameter]

"""The operations on masks, each one typed function registered once. The command line, recipes and Python read it.

A function gets, for a range of one tensor, the packed words of the masks that have an opinion there, and returns the
words of the result. Its keyword arguments are the operation's options: their types, defaults and the sentences about
them in its docstring (`name: what it says.`) make the options of `mftmerge combine`, the fields of recipes, those of
`mftmerge choose --try`, and the tables of the pages.

Numpy is imported where it computes: `mftmerge combine --help` reads this file and starts at once.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, create_model
from pydantic.errors import PydanticUndefinedAnnotation, PydanticUserError
from pydantic.fields import FieldInfo

from mftmerge import plugins
from mftmerge.errors import BadInput
from mftmerge.settings import Settings, inner_type

if TYPE_CHECKING:
    from mftmerge.bits import Words
    from mftmerge.maskstore import Scores

Threshold = int | float | str | None
Weights = tuple[float, ...] | None


class Everywhere(Settings):
    """The options that every operation has."""

    density: float | str | tuple[float, ...] | None = Field(
        None,
        description="cut every tensor to exactly this share of kept weights: by votes, then scores, then position; "
        "several shares, as in 0.95,0.9, go from the first covered layer to the last",
    )
    uncovered: Literal["abstain", "keep"] = Field(
        "abstain", description="a mask on a tensor that it does not cover: 'abstain', or 'keep' all of it"
    )


# What stands beside an operation's options: in a recipe, on the command line, in Python.
TAKEN = {*Everywhere.model_fields, "file", "op", "of", "learn", "on", "base", "masks", "out", "archive", "overwrite"}
TAKEN |= {"as_json", "json", "names", "paths", "help", "debug", "verbose", "quiet", "plugin"}


@dataclass(frozen=True)
class Operation:
    """A registered operation.

    function: see the module. settings: its keyword arguments as a model. most: how many masks it takes (None = any).
    ordered: whether the first mask has a part of its own. support: the masks whose ones support a kept weight, which
    rank the weights when the result is projected to a density; None for an operation on scores.
    effect: "grows" / "shrinks" where the result contains / is contained in every mask that counts.
    presets: what `choose` tries of it without being asked, "" or "@DENSITY,OPTION=VALUE" as `Candidate.parse` reads it;
    "@own" is the density of the masks, "@own+0.2" lies 20 % of the way from there to 1.
    """

    name: str
    function: Callable[..., Any]
    settings: type[Settings]
    most: int | None
    ordered: bool
    support: Callable[[Sequence[Words]], list[Words]] | None
    effect: Literal["grows", "shrinks"] | None
    presets: tuple[str, ...]

    @property
    def summary(self) -> str:
        """First line of the description."""
        return (inspect.getdoc(self.function) or "").split("\n")[0]

    @property
    def options(self) -> tuple[str, ...]:
        """Names of its own options."""
        return tuple(self.settings.model_fields)

    @property
    def every_option(self) -> tuple[str, ...]:
        """Names of its own options and of those that every operation has."""
        return (*self.options, *Everywhere.model_fields)

    def field(self, name: str) -> FieldInfo | None:
        """The declaration of an option of its own, or of every operation; None for another name."""
        return self.settings.model_fields.get(name) or Everywhere.model_fields.get(name)

    def checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Values as the function takes them, of those options that were given. Raises BadInput.

        None and False say the same as nothing.
        """
        given = {k: v for k, v in options.items() if v is not None and v is not False}
        for name, value in given.items():
            if name not in self.options:
                raise BadInput(f"{self.name} has no option {name!r}; it takes {', '.join(self.every_option)}")
            if value is True and inner_type(self.settings.model_fields[name].annotation) is not bool:
                raise BadInput(f"{name}: give a value")
        made = self.settings.make(given)
        return {name: getattr(made, name) for name in given}


OPERATIONS: dict[str, Operation] = {}
DROPPED = Fraction(7, 10)  # see `combined_density`: 0.93 for masks of 0.9


def _as_they_are(masks: Sequence[Words]) -> list[Words]:
    return list(masks)


def operation(
    *,
    most: int | None = None,
    ordered: bool = False,
    support: Callable[[Sequence[Words]], list[Words]] | None = _as_they_are,
    effect: Literal["grows", "shrinks"] | None = None,
    presets: Sequence[str] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a typed function under its own name. The keyword arguments are the fields of `Operation`.

    Raises BadInput where another module has an operation of that name, and for an option without a type, of a name that
    means something else in recipes or commands, or of another type than another operation's option of that name.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        owner = OPERATIONS[name].function.__module__ if name in OPERATIONS else None
        plugins.free(name, function.__module__, owner, "operation")
        made = Operation(name, function, _settings(function), most, ordered, support, effect, tuple(presets))
        for option, field in made.settings.model_fields.items():
            for other in OPERATIONS.values():
                theirs = other.settings.model_fields.get(option)
                if theirs and other.name != name and theirs.annotation != field.annotation:
                    raise BadInput(f"operation {name}: {other.name} has an option {option!r} of another type")
        OPERATIONS[name] = made
        return function

    return register


def _settings(function: Callable[..., Any]) -> type[Settings]:
    """The keyword-only arguments of a function as a model, described by its docstring."""
    fields: dict[str, Any] = {}
    about = dict(_described(inspect.getdoc(function) or ""))
    for p in inspect.signature(function).parameters.values():
        if p.kind is not p.KEYWORD_ONLY:
            continue
        if p.annotation is p.empty:
            raise BadInput(f"operation {function.__name__}: option {p.name!r} needs a type")
        if p.name in TAKEN or hasattr(Settings, p.name):
            raise BadInput(
                f"operation {function.__name__}: an option cannot be called {p.name!r}; give it another name"
            )
        default = ... if p.default is p.empty else p.default
        fields[p.name] = (p.annotation, Field(default, description=about.get(p.name, "")))
    try:
        model = create_model(function.__name__, __base__=Settings, __module__=function.__module__, **fields)
        model.model_rebuild()  # types are texts where a module has annotations of the future
    except (PydanticUndefinedAnnotation, PydanticUserError) as e:
        reason = str(e).splitlines()[0]
        raise BadInput(f"operation {function.__name__}: the type of an option is not understood ({reason})") from None
    return model


def _described(text: str) -> Iterator[tuple[str, str]]:
    """Option -> its first sentence, from the lines `name: sentence.` of a docstring, which may go on in others."""
    for name, said in re.findall(r"^(\w+): (.*?)(?=\n\w+: |\n\n|\Z)", text, re.DOTALL | re.MULTILINE):
        yield name, re.split(r"\.(?:\s|$)", " ".join(said.split()))[0]


def lookup(name: str) -> Operation | None:
    """The operation of that name, from this program or a plug-in."""
    if name not in OPERATIONS:
        plugins.load()
    return OPERATIONS.get(name)


def find(name: str) -> Operation:
    """The operation of that name. Raises BadInput with the names that there are."""
    found = lookup(name)
    if found is None:
        raise BadInput(
            f"unknown operation {name!r}; choose from {', '.join(OPERATIONS)}; `--plugin FILE.py` brings your own"
        )
    return found


def options() -> dict[str, tuple[list[str], FieldInfo]]:
    """Every option of the registered operations -> the operations that have it, and its declaration in the first."""
    found: dict[str, tuple[list[str], FieldInfo]] = {}
    for made in OPERATIONS.values():
        for name, field in made.settings.model_fields.items():
            found.setdefault(name, ([], field))[0].append(made.name)
    return found


def meaning(option: str) -> str:
    """What an option means for each operation that has it: `what it does (score)`."""
    said = {name: OPERATIONS[name].settings.model_fields[option].description for name in options()[option][0]}
    return "; ".join(f"{text} ({name})".strip() for name, text in said.items())


@operation(effect="grows", presets=[""])
def union(masks: Sequence[Words]) -> Words:
    """Keeps what any mask keeps: prunes only what all prune."""
    return functools.reduce(operator.or_, masks[1:], masks[0])


@operation(effect="shrinks", presets=[""])
def intersection(masks: Sequence[Words]) -> Words:
    """Keeps what all masks keep: prunes what any prunes."""
    return functools.reduce(operator.and_, masks[1:], masks[0])


@operation(presets=["", "@own"])
def vote(masks: Sequence[Words], *, threshold: Threshold = None, weights: Weights = None) -> Words:
    """Keeps what enough of the masks keep: by default half of them or more (a strict majority prunes).

    threshold: a count (an integer from 1) or a share of the votes (a number with a point, above 0 and at most 1.0).
    Where fewer masks cover a tensor than the count asks for, all of them must keep.
    weights: one positive number a mask; a count then means that many times the mean weight.
    """
    from mftmerge import bits

    if weights is None:
        return bits.vote(masks, votes_needed(threshold, len(masks), Fraction(len(masks))))
    scaled, total = whole_weights(weights)
    return bits.weighted_vote(masks, scaled, votes_needed(threshold, len(masks), Fraction(total)))


def _against_the_rest(masks: Sequence[Words]) -> list[Words]:
    return [masks[0], *(~m for m in masks[1:])]


@operation(ordered=True, support=_against_the_rest)
def difference(masks: Sequence[Words]) -> Words:
    """Keeps what the first mask keeps and none of the others does."""
    return functools.reduce(lambda a, b: a & ~b, masks[1:], masks[0])


@operation()
def xor(masks: Sequence[Words]) -> Words:
    """Keeps what an odd number of the masks keep; of two masks, what exactly one keeps."""
    return functools.reduce(operator.xor, masks[1:], masks[0])


@operation(most=1, support=lambda masks: [~masks[0]])
def complement(masks: Sequence[Words]) -> Words:
    """Keeps what the mask prunes."""
    return ~masks[0]


@operation(
    support=None,
    # The density at which the worst-served domain keeps most is not known beforehand.
    presets=[*("@own", "@own+0.2", "@own+0.3", "@own+0.4", "@own+0.5"), *("@own,elect", "@own+0.3,elect")],
)
def score(
    scores: Sequence[Scores],
    initial: Sequence[Scores],
    *,
    weights: Weights = None,
    elect: bool = False,
    allow_different_init: bool = False,
) -> Scores:
    """Adds the evidence of masks that carry scores and cuts once per tensor at the density: task arithmetic on scores.

    With S0 the scores before training and S_d those of mask d after it: S0 + sum_d w_d (S_d - S0), weights 1 unless
    given. Where no mask carries S0 the weights are scaled to sum to 1, for then S0 cancels. Without a density, several
    masks are cut to drop 70 % of what one of them drops (0.93 for masks of 0.9).
    weights: one number a mask, negative ones subtract its evidence.
    elect: at each weight add only the evidence that has the sign of the sum. TIES merging (arXiv 2306.01708) does so
    with task vectors: what most evidence asks for is not weakened by the rest.
    allow_different_init: also add masks that started from different scores.
    """
    import numpy as np

    given = [1.0] * len(scores) if weights is None else [float(w) for w in weights]
    total = math.fsum(given)
    if not initial and elect:
        raise BadInput("elect needs the scores before training (::init), which these masks do not carry; leave it out")
    if not initial and abs(total) < 1e-9:
        raise BadInput("weights sum to 0: without the scores before training (::init) they must not; change one")
    if not initial:
        parts = [w / total * after.astype(np.float64) for w, after in zip(given, scores, strict=True)]
        return np.asarray(np.sum(parts, axis=0, dtype=np.float64), np.float32)
    parts = [w * (s.astype(np.float64) - s0) for w, s, s0 in zip(given, scores, initial, strict=True)]
    added = np.sum(parts, axis=0, dtype=np.float64)
    if elect:
        sign = np.sign(added)
        added = np.sum([np.where(np.sign(part) == sign, part, 0) for part in parts], axis=0)
    return (added + initial[0]).astype(np.float32)


def combined_density(keep: float | str | None, masks: int) -> Fraction:
    """The density that `score` cuts to where none is given: of one mask its own, of several a higher one.

    keep: what each mask was trained to keep. The sum of several masks' evidence asks for more room than one mask has:
    at their own density the masks with more evidence took the place of the others. With `DROPPED` of what one mask
    drops, the worst served domain kept most of its gain (docs/results.md).
    """
    from mftmerge import cut

    own = cut.exact(keep if keep is not None else 1)
    return own if masks == 1 else 1 - DROPPED * (1 - own)


def votes_needed(threshold: Threshold, masks: int, total: Fraction) -> int:
    """The smallest whole number of votes that keeps, where `masks` masks have `total` votes together.

    A count k of m masks asks for k/m of the total, so that weights change who decides and not how much is needed.
    """
    kind, value = parse_threshold(threshold)
    share = min(value / masks, Fraction(1)) if kind == "count" else value
    needed = share * total
    return max(1, -(-needed.numerator // needed.denominator))


@functools.lru_cache(maxsize=64)
def parse_threshold(threshold: Threshold) -> tuple[Literal["count", "share"], Fraction]:
    """What a threshold means: 2 and "2" are a count, 0.5 and "0.5" and 1.0 a share. None is the share 0.5."""
    if threshold is None:
        return "share", Fraction(1, 2)
    text = str(threshold).strip()
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise BadInput(f"threshold {text!r} is not a number; give a count such as 2 or a share such as 0.5") from None
    if text.lstrip("+-").isdigit():
        if value < 1:
            raise BadInput(f"threshold {text} is out of range; a count starts at 1 (a share has a point, such as 0.5)")
        return "count", value
    if not 0 < value <= 1:
        raise BadInput(f"threshold {text} is out of range; a share is above 0 and at most 1.0 (a count has no point)")
    return "share", value


def whole_weights(weights: Sequence[float]) -> tuple[tuple[int, ...], int]:
    """Positive weights as the smallest integers in the same proportions, and their sum."""
    return _whole_weights(tuple(weights))


@functools.lru_cache(maxsize=64)
def _whole_weights(weights: tuple[float, ...]) -> tuple[tuple[int, ...], int]:
    from mftmerge import cut

    given = [cut.exact(w) for w in weights]
    if any(w <= 0 for w in given):
        raise BadInput("the weights of a vote must be above 0; leave a mask out instead of giving it 0")
    scale = math.lcm(*(w.denominator for w in given))
    whole = [int(w * scale) for w in given]
    divisor = math.gcd(*whole)
    return tuple(w // divisor for w in whole), sum(whole) // divisor

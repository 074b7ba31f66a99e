"""What can be wrong with a recipe's text: methods, parameters, counts, names, masks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from typing import Any

from mftmerge import operations
from mftmerge.errors import BadInput
from mftmerge.operations import Everywhere, Operation
from mftmerge.recipe.catalogue import METHODS, REQUIRED, Kind, Method, lookup, suggestion
from mftmerge.recipe.lines import Lines, Location, Problem
from mftmerge.recipe.reference import is_cut
from mftmerge.recipe.schema import Document, MaskExpression, MaskUse, ModelInput, Module, OutputSlice, Reference

Checked = list[tuple[Document, Lines]]
TEMPLATES = resources.files("mergekit._data") / "chat_templates"


def check_documents(documents: Checked) -> list[Problem]:
    """Problems that show in the text alone."""
    problems = list(_check_names(documents))
    for document, lines in documents:
        for location, message in _check_document(document):
            problems.append(Problem(lines.at(location), message))
    return problems


def result_index(documents: Iterable[Document]) -> int:
    """Which document is the recipe's result: the one without a name, else the last."""
    names = [d.name for d in documents]
    return names.index(None) if None in names else len(names) - 1


def references(document: Document) -> Iterator[tuple[Location, Reference]]:
    """Every model reference of a document, those of delta masks and the tokenizer's included."""
    for where, item in document.parts():
        yield where, item.model
    for where, use in mask_uses(document):
        if use.base:
            yield (*where, "base"), use.base
    for where, source in (
        (("tokenizer_source",), document.tokenizer_source),
        (("tokenizer", "source"), document.tokenizer and document.tokenizer.source),
    ):
        if source and source not in ("union", "base"):
            yield where, Reference.model_validate(source)
    for token, setting in ((document.tokenizer and document.tokenizer.tokens) or {}).items():
        given = setting.source
        if model := given if isinstance(given, Reference) else given and given.model:
            yield ("tokenizer", "tokens", token, "source"), model


def mask_uses(document: Document) -> Iterator[tuple[Location, MaskUse]]:
    """Every mask that the document applies, with its place."""
    for where, item in document.parts():
        if item.mask:
            yield (*where, "mask"), item.mask
    if document.mask:
        yield ("mask",), document.mask


def _check_names(documents: Checked) -> Iterator[Problem]:
    seen: dict[str | None, int] = {}
    names = {d.name for d, _ in documents if d.name}
    order = [d.name for d, _ in documents]
    for i, (document, lines) in enumerate(documents):
        if document.name in seen:
            what = f"the name {document.name!r} is used twice" if document.name else "a second document without name:"
            yield Problem(lines.at(("name",)), what)
        seen[document.name] = i
        if document.name and ("/" in document.name or document.name.startswith(".")):
            yield Problem(lines.at(("name",)), f"name: {document.name!r} is not a plain name")
        elif document.name and is_cut(document.name):
            text = f"name: {document.name!r} could not be named as a model, where @ begins a revision and + an adapter"
            yield Problem(lines.at(("name",)), text)
        for where, reference in references(document):
            if reference.path in names and reference.path not in order[:i]:
                message = f"{reference.path!r} is built by a later document; put that document first"
                yield Problem(lines.at(where), message)


def _check_document(document: Document) -> Iterator[tuple[Location, str]]:
    method = lookup(document.merge_method)
    if method is None:
        yield (
            ("merge_method",),
            f"unknown merge method {document.merge_method!r}{suggestion(document.merge_method, METHODS)}",
        )
    else:
        yield from _check_parameters(document, method)
        for where, out, module in groups(document):
            yield from _check_group(document, method, where, out, module)
        yield from _check_own(document)
        yield from _check_epsilon(document)
    yield from _check_masks(document)
    yield from _check_chat_template(document)


def _check_chat_template(document: Document) -> Iterator[tuple[Location, str]]:
    """mergekit's templates have names; a text is taken for a template where it has a brace."""
    text = document.chat_template
    names = [f.name.removesuffix(".jinja") for f in TEMPLATES.iterdir() if f.name.endswith(".jinja")]
    if text and "{" not in text and text not in ("auto", *names):
        yield ("chat_template",), f"chat_template: there is no template {text!r}{suggestion(text, ['auto', *names])}"
    elif text and "{" in text and len(text) < 20:  # mergekit's own limit, which it comes to after the weights
        yield ("chat_template",), f"chat_template: {text!r} is too short for a template"


def groups(document: Document) -> Iterator[tuple[Location, tuple[ModelInput, ...], OutputSlice | Module | None]]:
    """The sets of inputs that are merged together: `models:`, or each slice, of the document or of each module."""
    parts: list[tuple[Location, Document | Module]] = [((), document)]
    parts += [(("modules", name), m) for name, m in (document.modules or {}).items()]
    for where, part in parts:
        module = part if isinstance(part, Module) else None
        if part.models:
            yield (*where, "models"), part.models, module
        for i, out in enumerate(part.slices or ()):
            yield (*where, "slices", i), out.sources, out


def _settings(document: Document) -> Iterator[tuple[Location, str, Mapping[str, object], bool]]:
    """Every `parameters:` mapping: place, and whether it belongs to one model."""
    if document.parameters:
        yield ("parameters",), "", document.parameters, False
    for where, item in document.inputs():
        if item.parameters:
            yield (*where, "parameters"), str(item.model), item.parameters, True
    for where, _, out in groups(document):
        if out is not None and out.parameters:
            place = where[:-1] if where[-1] == "models" else where
            yield (*place, "parameters"), "", out.parameters, False
    for name, module in (document.modules or {}).items():
        if module.slices and module.parameters:
            yield ("modules", name, "parameters"), "", module.parameters, False


def mask_parameters(document: Document) -> Iterator[tuple[Location, str]]:
    """Every mask file that a parameter names, with its place; of methods of ours, which know masks."""
    method = METHODS.get(document.merge_method)
    if method is None or not method.ours or method.function or "mask" not in method.parameters:
        return
    for where, _, settings, _ in _settings(document):
        yield from (((*where, "mask"), v) for v in _scalars(settings.get("mask")) if isinstance(v, str))


def _check_parameters(document: Document, method: Method) -> Iterator[tuple[Location, str]]:
    for where, model, settings, per_model in _settings(document):
        for name, value in settings.items():
            place = (*where, name)
            if name not in method.parameters:
                hint = suggestion(name, method.parameters) or "; it has none"
                yield place, f"{document.merge_method} has no parameter {name!r}{hint}"
            elif per_model and method.parameters[name].scope == "shared":
                yield (
                    place,
                    f"{name!r} is one value for the whole merge; move it from {model} to parameters: of the document",
                )
            else:
                for scalar in _scalars(value):
                    if not _fits(scalar, method.parameters[name].kind):
                        yield place, f"{name}: {scalar!r} is not a {method.parameters[name].kind}"


def _scalars(value: object) -> Iterator[Any]:
    if isinstance(value, list):
        for v in value:
            yield from _scalars(v)
    elif isinstance(value, dict):
        yield from _scalars(value["value"])
    else:
        yield value


def _fits(value: Any, kind: Kind) -> bool:
    """Whether mergekit would read the scalar as that kind (numbers may be strings: YAML reads 1e-5 as text)."""
    try:
        if kind == "str":
            return isinstance(value, str)
        if kind == "bool":
            return isinstance(value, bool) or value in (0, 1) or str(value).lower() in ("true", "false", "yes", "no")
        number = float(value)
        return number.is_integer() if kind == "int" else True
    except (TypeError, ValueError):
        return False


def _unconditional(value: object) -> bool:
    """Whether a setting has a value for every tensor."""
    rules = [value] if isinstance(value, dict) else value
    if not isinstance(rules, list) or not any(isinstance(r, dict) for r in rules):
        return True
    return any(r.get("filter") in (None, "*") for r in rules)


def _check_group(
    document: Document,
    method: Method,
    where: Location,
    inputs: tuple[ModelInput, ...],
    out: OutputSlice | Module | None,
) -> Iterator[tuple[Location, str]]:
    base = (out.base_model if isinstance(out, OutputSlice) else None) or document.base_model
    ids = [(i.model, i.mask) for i in inputs]
    base_id = (base.model, base.mask) if base else None
    is_slice = where[-1] != "models"
    added = base_id is not None and base_id not in ids
    if added and is_slice and method.base != "ignored":
        yield where, f"base_model {base and base.model} must be one of the slice's sources"
    if len(set(map(str, ids))) != len(ids):
        yield where, "the same model is given twice; a model may repeat only with different masks"
    if method.base == "required" and base is None:
        yield where, f"{document.merge_method} needs base_model:"
    total = len(ids) + (added and not is_slice)
    others = total - (base_id is not None)
    yield from ((where, m) for m in _count(document.merge_method, "models (the base included)", total, *method.inputs))
    if method.base != "ignored":
        yield from (
            (where, m) for m in _count(document.merge_method, "models besides the base", others, *method.non_base)
        )
    chain = [document.parameters, out.parameters if out else None]
    inner = (*where, "sources") if is_slice else where
    every = [((*inner, n), i) for n, i in enumerate(inputs)] + (
        [(("base_model",), base)] if added and not is_slice else []
    )
    for name, parameter in method.parameters.items():
        if parameter.default != REQUIRED:
            continue
        for place, item in every:
            is_base = base_id is not None and item is not None and (item.model, item.mask) == base_id
            if parameter.scope == "non_base" and is_base:
                continue
            own = item.parameters if isinstance(item, ModelInput) else None
            given = [s[name] for s in [*chain, own if parameter.scope != "shared" else None] if s and name in s]
            if parameter.scope == "shared":
                place = where
            whose = "" if parameter.scope == "shared" else f" for {item.model if item else ''}"
            if not given:
                yield place, f"{document.merge_method} needs the parameter {name!r}{whose}"
            elif not any(map(_unconditional, given)):
                yield place, f"{name!r}{whose} has no value for tensors that match no filter; end with '- value: ...'"
            if parameter.scope == "shared":
                break
    if is_slice and len({i.layer_range[1] - i.layer_range[0] for i in inputs if hasattr(i, "layer_range")}) > 1:
        yield where, "all sources of a slice must have equally many layers"


def _count(method: str, what: str, count: int, low: int | None, high: int | None) -> Iterator[str]:
    if low is not None and count < low:
        yield f"{method} needs at least {low} {what}, not {count}"
    if high is not None and count > high:
        yield f"{method} takes at most {high} {what}, not {count}"


def _check_own(document: Document) -> Iterator[tuple[Location, str]]:
    """What our own methods need beyond their parameters."""
    if document.merge_method == "masked":
        given = [p for p in [document.parameters, *(i.parameters for _, i in document.inputs())] if p and "mask" in p]
        if not given and not list(mask_uses(document)):
            yield ("merge_method",), "masked has nothing to do without mask: on its model"
    if document.merge_method == "emr":
        chosen = [w for w, i in document.inputs() if i.parameters and i.parameters.get("task") is True]
        if len(chosen) > 1:
            yield chosen[1], "emr rebuilds one model at a time: set task: true on one of them"
    if METHODS[document.merge_method].mask_as_parameter and not document.models and list(mask_uses(document)):
        yield ("merge_method",), f"{document.merge_method} takes masks with models: only, not with slices: or modules:"
    if document.merge_method == "select":
        masked = [w for w, i in document.inputs() if i.mask or (i.parameters and "mask" in i.parameters)]
        if not masked and "mask" not in (document.parameters or {}):
            yield ("merge_method",), "select has nothing to do without mask: on its models"


def _check_masks(document: Document) -> Iterator[tuple[Location, str]]:
    for where, use in mask_uses(document):
        yield from _check_expression(use, where)
        if use.on == "delta" and not use.base and not document.base_model:
            yield where, "on: delta needs base_model: in the recipe, or base: beside it"
        if use.on == "weights" and use.base:
            yield (*where, "base"), "base: belongs to on: delta"
    for name, expression in (document.masks or {}).items():
        yield from _check_expression(expression, ("masks", name))


def _check_expression(expression: MaskExpression, where: Location) -> Iterator[tuple[Location, str]]:
    inputs, given = expression.of or (), expression.options()
    operation = None if expression.op is None else operations.lookup(expression.op)
    if operation is None and expression.op is not None:
        close = suggestion(expression.op, operations.OPERATIONS)
        yield (*where, "op"), f"unknown operation {expression.op!r}{close}"
    else:
        for option, value in given.items():
            if problem := _option_problem(operation, option, value, where):
                yield (*where, option), problem
    if operation and operation.most is not None and len(inputs) > operation.most:
        yield (*where, "of"), f"{operation.name} takes at most {operation.most} masks"
    for i, part in enumerate(inputs):
        yield from _check_expression(part, (*where, "of", i))
    weights = given.get("weights")
    if isinstance(weights, list) and len(weights) != len(inputs):
        yield (*where, "weights"), f"{len(weights)} weights for {len(inputs)} masks"


def _option_problem(operation: Operation | None, option: str, value: object, where: Location) -> str | None:
    """What is wrong with a key beside `op:` (`operation`), or beside `file:` (None)."""
    known = {*operations.options(), *Everywhere.model_fields} if operation is None else {*operation.every_option}
    if operation is not None and option in known:
        try:
            operation.checked({option: value}) if option in operation.options else Everywhere.make({option: value})
        except BadInput as e:
            return f"{'.'.join(map(str, where))}.{e}"
        return None
    if option not in {*operations.options(), *Everywhere.model_fields}:
        close = suggestion(option, known | {*MaskUse.model_fields})
        return f"unknown key {option!r} at {'.'.join(map(str, where))}{close if 'did you' in close else ''}"
    if operation is None:
        return f"{option}: belongs to an operation; add op:"
    return f"{operation.name} has no option {option!r}; it takes {', '.join(operation.every_option)}"


# What numbers mean something for a parameter; mergekit takes others without a word.
RANGES: dict[str, tuple[float, float]] = {
    "density": (0, 1),
    "gamma": (0, 1),
    "select_topk": (0, 1),
    "slerp.t": (0, 1),
    "tall_lambda": (0, math.inf),
    "eps": (0, math.inf),
    "max_iter": (1, math.inf),
}


def out_of_range(document: Document) -> Iterator[tuple[Location, str]]:
    """Numbers that mergekit takes though they mean nothing, and a sum of weights that is 0 and divided by."""
    for where, _, settings, _ in _settings(document):
        for name, value in settings.items():
            low, high = RANGES.get(f"{document.merge_method}.{name}") or RANGES.get(name) or (-math.inf, math.inf)
            for scalar in _scalars(value):
                if not isinstance(scalar, str) and not math.isfinite(scalar):
                    yield (*where, name), f"{name} {scalar} is not a finite number"
                    continue
                if _fits(scalar, "float") and not low <= float(scalar) <= high:
                    limits = f"{low:g} to {high:g}" if high < math.inf else f"at least {low:g}"
                    hint = f"; did you mean {float(scalar) / 100:g}?" if high == 1 and 1 < float(scalar) <= 100 else ""
                    yield (*where, name), f"{name} {scalar} is out of range ({limits}){hint}"
    method = lookup(document.merge_method)
    parameter = method.parameters.get("normalize") if method else None
    normalize = (document.parameters or {}).get("normalize", parameter.default if parameter else False)
    for where, inputs, _ in groups(document):
        weights = [{**(document.parameters or {}), **(i.parameters or {})}.get("weight") for i in inputs]
        numbers = [float(w) for w in weights if isinstance(w, int | float)]
        if normalize is True and len(numbers) == len(weights) > 0 and abs(sum(numbers)) < 1e-6:
            yield where, "the weights sum to 0, by which normalize: true divides"


def _check_epsilon(document: Document) -> Iterator[tuple[Location, str]]:
    """della draws with probabilities density - epsilon to density + epsilon, which must lie between 0 and 1."""
    if not document.merge_method.startswith("della"):
        return
    for group, inputs, out in groups(document):
        inner = (*group, "sources") if group[-1] != "models" else group
        for i, item in enumerate(inputs):
            own = {"density": 1.0, "epsilon": 0.15} | (document.parameters or {})
            own |= ((out and out.parameters) or {}) | (item.parameters or {})
            densities, epsilons = (
                [float(v) for v in _scalars(own[n]) if _fits(v, "float")] for n in ("density", "epsilon")
            )
            if min(len(densities), len(epsilons)) != 1:  # of two gradients or sets of rules not every pair occurs
                continue
            for density, epsilon in itertools.product(densities, epsilons):
                if 0 < density < 1 and (density + epsilon >= 1 or density - epsilon <= 0):
                    name = "epsilon" if "epsilon" in (item.parameters or {}) else "density"
                    text = f"epsilon {epsilon:g} is too large for density {density:g}: density - epsilon and density + "
                    yield (
                        (*inner, i, "parameters", name),
                        f"{text}epsilon are probabilities and must lie between 0 and 1",
                    )
                    break

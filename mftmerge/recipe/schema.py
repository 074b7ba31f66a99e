"""What a recipe file may say: everything that mergekit 0.1.5 accepts, plus masks. Unknown keys are errors.

load.py reads and checks a file; `json_schema` describes the format to editors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

from mftmerge.operations import OPERATIONS, Everywhere, meaning, options
from mftmerge.recipe.lines import Location
from mftmerge.recipe.reference import Reference, Strict

DTYPES = ("float32", "float16", "bfloat16", "float64", "int64")  # the names that mergekit 0.1.5 knows
DType = Literal["float32", "float16", "bfloat16", "float64", "int64"]


class MaskExpression(Strict):
    """A mask: a file, a name from `masks:`, or an operation on other masks, with the operation's options beside it."""

    model_config = ConfigDict(extra="allow")  # which options there are, the operation says: see check.py

    file: str | None = Field(default=None, description="A .mask file (relative to the recipe), or a name from masks:.")
    op: str | None = Field(default=None, description=f"An operation: {', '.join(OPERATIONS)}, or one of a plug-in.")
    of: tuple[MaskExpression, ...] | None = Field(default=None, description="The operation's inputs.")

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"file": value}
        if not isinstance(value, dict | MaskExpression):
            raise ValueError("a mask is a file, a name from masks:, or a mapping with op: and of:")
        if isinstance(value, dict) and "op" in value and isinstance(value.get("set"), dict):  # as in version 0.1.0
            return {name: given for name, given in value.items() if name != "set"} | value["set"]
        return value

    @model_validator(mode="after")
    def _check(self) -> MaskExpression:
        self._require_expression()
        return self

    def _require_expression(self) -> None:
        if (self.file is None) == (self.op is None):
            raise ValueError("a mask needs either file: or op:")
        if self.op is not None and not self.of:
            raise ValueError(f"op: {self.op} needs of: with the masks that it combines")
        if self.op is None and self.of is not None:
            raise ValueError("of: belongs to an operation; add op:")

    def options(self) -> dict[str, Any]:
        """The operation's options that are set, as `combine.combine` takes them."""
        return {name: value for name, value in (self.model_extra or {}).items() if value is not None}


class Learn(Strict):
    """What a mask is to be learnt from, by `mftmerge train --recipe`."""

    data: str | tuple[str, ...] = Field(
        description="Rows of the expert's domain: a file (relative to the recipe), or several."
    )
    rows: int | None = Field(default=None, ge=1, description="How many of them, drawn by the seed; default: all.")
    eval_data: str | None = Field(
        default=None, description="Rows to validate on; default: a share of the data is held out."
    )


class MaskUse(MaskExpression):
    """A mask applied to a model: on its weights (dropped ones become 0) or its delta (they return to the base)."""

    learn: Learn | None = Field(
        default=None, description="Instead of a mask: learn it from these rows, with `mftmerge train --recipe`."
    )

    on: Literal["weights", "delta"] = Field(
        default="weights", description="What dropped weights become: 0, or the base's."
    )
    base: Reference | None = Field(default=None, description="on: delta: the model to return to; default base_model.")

    @model_validator(mode="after")
    def _check(self) -> MaskUse:
        if self.learn is None:
            self._require_expression()
        elif stray := sorted({"file", "op", "of", "base"} & self.model_fields_set | {*self.options()}):
            raise ValueError(f"{stray[0]}: has no place beside learn:")
        return self


def _setting(value: Any) -> Any:
    """A parameter: a scalar, a list of scalars (gradient over the layers), or [{filter, value}] (first match wins)."""
    scalar = (bool, int, float, str)
    if isinstance(value, scalar):
        return value
    rules = [value] if isinstance(value, dict) else value
    if not isinstance(rules, list) or not rules:
        raise ValueError("a parameter is a number, a list of numbers, or a list of {filter, value}")
    if all(isinstance(v, scalar) for v in rules):
        return value
    for rule in rules:
        if not isinstance(rule, dict) or "value" not in rule:
            raise ValueError("each rule of a parameter needs value: and may have filter:")
        if unknown := set(rule) - {"filter", "value"}:
            raise ValueError(f"unknown key {sorted(map(str, unknown))[0]!r} in a rule; a rule has filter: and value:")
        values = rule["value"] if isinstance(rule["value"], list) else [rule["value"]]
        if not values or not all(isinstance(v, scalar) for v in values):
            raise ValueError("value: is a number or a list of numbers")
        if not isinstance(rule.get("filter", ""), str):
            raise ValueError("filter: is a part of a tensor name")
    return value


_SCALAR_SCHEMA: dict[str, Any] = {"type": ["number", "boolean", "string"]}
_VALUE_SCHEMA: dict[str, Any] = {"anyOf": [_SCALAR_SCHEMA, {"type": "array", "items": _SCALAR_SCHEMA}]}
_RULE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"filter": {"type": "string"}, "value": _VALUE_SCHEMA},
    "required": ["value"],
    "additionalProperties": False,
}
_SETTING_SCHEMA = {"anyOf": [_VALUE_SCHEMA, _RULE_SCHEMA, {"type": "array", "items": _RULE_SCHEMA}]}
Setting = Annotated[Any, AfterValidator(_setting), WithJsonSchema(_SETTING_SCHEMA)]
Parameters = dict[str, Setting]


class ModelInput(Strict):
    """One model of `models:`."""

    model: Reference = Field(description="The model, a hub id, or the name of an earlier document.")
    parameters: Parameters | None = Field(default=None, description="Parameters of the merge method for this model.")
    mask: MaskUse | None = Field(default=None, description="Mask applied to this model while it is read.")


class SliceInput(ModelInput):
    """One source of a slice: layers [first, after-last) of a model."""

    layer_range: tuple[int, int] = Field(description="[first, after-last] layer that is taken, counted from 0.")

    @field_validator("layer_range", mode="before")
    @classmethod
    def _check(cls, value: Any) -> Any:
        numbers = list(value) if isinstance(value, list | tuple) else []
        if len(numbers) != 2 or not all(isinstance(v, int) or str(v).isdigit() for v in numbers):
            raise ValueError(f"layer_range is [first, after-last], two whole numbers, not {value!r}")
        if not 0 <= int(numbers[0]) <= int(numbers[1]):
            raise ValueError(f"layer_range is [first, after-last], not {value!r}")
        return value


class BaseInput(Strict):
    """`base_model:`, a model reference, or a mapping with `model:` and `mask:`."""

    model: Reference = Field(description="The base model.")
    mask: MaskUse | None = Field(default=None, description="Mask applied to the base model while it is read.")

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if isinstance(value, dict) and ("mask" in value or isinstance(value.get("model"), Reference)):
            return value
        if isinstance(value, str | dict):
            return {"model": value}
        return value


class OutputSlice(Strict):
    """Layers of the output, merged from equally many layers of each source."""

    sources: tuple[SliceInput, ...] = Field(min_length=1, description="The layers that are merged into this slice.")
    base_model: BaseInput | None = Field(
        default=None, description="Base of this slice, one of its sources; default: the document's."
    )
    residual_weight: float | None = Field(default=None, description="Accepted as mergekit does, which ignores it.")
    parameters: Parameters | None = Field(default=None, description="Parameters of the merge method for this slice.")


class Module(Strict):
    """One module (text, vision, ...) of a model with several."""

    slices: tuple[OutputSlice, ...] | None = Field(default=None, description="The module's layers, slice by slice.")
    models: tuple[ModelInput, ...] | None = Field(default=None, description="Whole models that are merged into it.")
    parameters: Parameters | None = Field(default=None, description="Parameters of the merge method for this module.")

    @model_validator(mode="after")
    def _check(self) -> Module:
        if bool(self.slices) == bool(self.models):
            raise ValueError("a module needs either slices: or models:")
        return self


class TokenSource(Strict):
    """Where a token's embedding comes from: zeros, or one token of one model."""

    kind: Literal["zero", "model_token"] = Field(description="Zeros, or one token of a model.")
    model: Reference | None = Field(default=None, description="model_token: the model whose embedding it is.")
    token_id: int | None = Field(default=None, description="model_token: the token's number there.")
    token: str | None = Field(default=None, description="model_token: the token's text there, instead of its number.")


class TokenSetting(Strict):
    """How one token of the output is embedded."""

    source: TokenSource | Reference | None = Field(
        default=None, description="Where its embedding comes from: a model, or a token source."
    )
    force: bool = Field(default=False, description="Use that embedding also for models that have one of their own.")


class Tokenizer(Strict):
    """Tokenizer of the output and how embeddings are aligned, as in mergekit."""

    source: str = Field(default="union", description="union, base, or the model whose tokenizer it is.")
    tokens: dict[str, TokenSetting] | None = Field(default=None, description="Settings of single tokens, by text.")
    pad_to_multiple_of: int | None = Field(default=None, description="Round the number of embeddings up to this.")


class Document(Strict):
    """One merge: mergekit's keys, and `masks:`, `mask:`."""

    name: str | None = Field(default=None, description="Name by which later documents use this merge as a model.")
    merge_method: str = Field(description="One of the merge methods; docs/recipe-reference.md has their parameters.")
    base_model: BaseInput | None = Field(
        default=None, description="The model that task vectors are taken from; for the others one more input."
    )
    models: tuple[ModelInput, ...] | None = Field(default=None, description="Whole models to merge.")
    slices: tuple[OutputSlice, ...] | None = Field(default=None, description="The output's layers, slice by slice.")
    modules: dict[str, Module] | None = Field(
        default=None, description="The output's modules (text, vision, ...) by name, each with models: or slices:."
    )
    parameters: Parameters | None = Field(default=None, description="Parameters of the merge method for all models.")
    dtype: DType | None = Field(default=None, description="dtype of the arithmetic.")
    out_dtype: DType | None = Field(default=None, description="dtype of the stored result.")
    tokenizer_source: str | None = Field(
        default=None, description="union, base, or a model: the short form of tokenizer:."
    )
    tokenizer: Tokenizer | None = Field(default=None, description="The output's tokenizer and embeddings.")
    chat_template: str | None = Field(
        default=None, description="auto, the name of one of mergekit's templates, or a Jinja template."
    )
    masks: dict[str, MaskExpression] | None = Field(default=None, description="Named masks, for use in mask: and of:.")
    mask: MaskUse | None = Field(default=None, description="Mask applied to the result while it is written.")

    @model_validator(mode="after")
    def _check(self) -> Document:
        if sum(bool(part) for part in (self.models, self.slices, self.modules)) != 1:
            raise ValueError("exactly one of models:, slices: or modules: is needed")
        if self.tokenizer_source and self.tokenizer:
            raise ValueError("give tokenizer_source: or tokenizer:, not both")
        return self

    def inputs(self) -> list[tuple[Location, ModelInput]]:
        """Every model input with its place in the document."""
        found: list[tuple[Location, ModelInput]] = []

        def visit(part: Document | Module, where: Location) -> None:
            found.extend(((*where, "models", i), m) for i, m in enumerate(part.models or ()))
            for i, out in enumerate(part.slices or ()):
                found.extend(((*where, "slices", i, "sources", j), s) for j, s in enumerate(out.sources))

        visit(self, ())
        for name, module in (self.modules or {}).items():
            visit(module, ("modules", name))
        return found

    def sets(self, parameter: str) -> bool:
        """Whether a parameter is set anywhere to something that is not its neutral value (density 1, rescale false)."""
        parts: list[Document | Module] = [self, *(self.modules or {}).values()]
        settings = [*(p.parameters for p in parts), *(i.parameters for _, i in self.inputs())]
        settings += [out.parameters for p in parts for out in p.slices or ()]
        return any(s is not None and s.get(parameter) not in (None, 1, 1.0, False) for s in settings)

    def parts(self) -> list[tuple[Location, ModelInput | BaseInput]]:
        """Every model input and base model with its place in the document, in this order."""
        return [*self.inputs(), *self.bases()]

    def bases(self) -> list[tuple[Location, BaseInput]]:
        """Every base model with its place in the document."""
        found: list[tuple[Location, BaseInput]] = [(("base_model",), self.base_model)] if self.base_model else []
        parts: list[tuple[Location, Document | Module]] = [((), self)]
        parts += [(("modules", name), m) for name, m in (self.modules or {}).items()]
        for where, part in parts:
            for i, out in enumerate(part.slices or ()):
                if out.base_model:
                    found.append(((*where, "slices", i, "base_model"), out.base_model))
        return found


def json_schema() -> dict[str, Any]:
    """JSON Schema of one document of a recipe, for editors (`# yaml-language-server: $schema=...`)."""
    schema = Document.model_json_schema()
    text = {"type": "string"}
    described = Everywhere.model_json_schema()["properties"]
    for name, (of, _) in options().items():
        described[name] = OPERATIONS[of[0]].settings.model_json_schema()["properties"][name]
        described[name]["description"] = meaning(name)
    definitions = schema["$defs"]
    elsewhere = {"type": "object", "properties": {"op": {"not": {"enum": [*OPERATIONS]}}}, "required": ["op"]}
    for name in ("Reference", "MaskExpression", "MaskUse", "BaseInput"):  # each may also be written as a plain string
        body = definitions[name]
        forms = [text, body]
        if name.startswith("Mask"):
            body |= {"properties": body["properties"] | described, "additionalProperties": False}
            forms.append(elsewhere)  # a plug-in's operation has options of its own
        if name == "Reference":
            forms[1] = {"type": "object", "properties": {"model": {}, "lora": {}, "override_architecture": {}}}
        definitions[name] = {"anyOf": forms, "description": body.get("description", "A model reference.")}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "mftmerge recipe"} | schema

"""How a recipe names a model."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Strict(BaseModel):
    """A part of a recipe. Keys that are not declared are errors, where mergekit ignores them."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Reference(Strict):
    """A model: `path[@revision][+lora[@revision]]`, a mapping `{model: path[@revision], lora: ...}`, or these keys."""

    path: str = Field(description="A directory, looked up beside the recipe, then here; or a hub id, owner/name.")
    revision: str | None = Field(default=None, description="Commit, branch or tag on the hub.")
    lora: str | None = Field(default=None, description="A LoRA adapter that is merged into the model first.")
    lora_revision: str | None = Field(default=None, description="The adapter's commit, branch or tag.")
    override_architecture: str | None = Field(
        default=None, description="Read the model as this transformers class, not as the one that its config names."
    )

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> object:
        if isinstance(value, Reference) or (isinstance(value, dict) and "path" in value):
            return value
        parts: dict[str, object] = {"model": value} if isinstance(value, str) else value
        if not isinstance(parts, dict) or "model" not in parts:
            raise ValueError("a model is 'path[@revision][+lora[@revision]]' or a mapping with 'model:'")
        if unknown := set(parts) - {"model", "lora", "override_architecture"}:
            raise ValueError(f"unknown key {sorted(unknown)[0]!r} in a model reference")
        if isinstance(value, str) and "+" in value:
            parts = dict(zip(("model", "lora"), value.split("+", 1), strict=True))
        path, revision = _path_and_revision(parts["model"])
        lora, lora_revision = _path_and_revision(parts.get("lora"))
        if not path:
            raise ValueError("a model reference needs a path")
        architecture = parts.get("override_architecture")
        found = {"path": path, "revision": revision, "lora": lora, "lora_revision": lora_revision}
        return found | ({"override_architecture": architecture} if architecture else {})

    def __str__(self) -> str:
        text = self.path + (f"@{self.revision}" if self.revision else "")
        return text + (f"+{self.lora}" + (f"@{self.lora_revision}" if self.lora_revision else "") if self.lora else "")

    def to_mergekit(self) -> Any:
        """The reference as mergekit's YAML writes it: text, or its parts where it would cut the text elsewhere."""
        parts = [part for part in (self.path, self.revision, self.lora, self.lora_revision) if part]
        # mergekit itself writes parts where there are spaces or quotes
        if self.override_architecture is None and not any(is_cut(p) or " " in p or '"' in p for p in parts):
            return str(self)
        lora = {"path": self.lora, "revision": self.lora_revision} if self.lora else None
        return {
            "model": {"path": self.path, "revision": self.revision},
            "lora": lora,
            "override_architecture": self.override_architecture,
        }


def is_cut(path: str) -> bool:
    """Whether mergekit, given this path as text, takes the end of it for a revision (`@`) or an adapter (`+`)."""
    return "@" in path or "+" in path


def _path_and_revision(value: object) -> tuple[str | None, str | None]:
    if value is None:
        return None, None
    if isinstance(value, dict) and set(value) <= {"path", "revision"}:
        return value.get("path"), value.get("revision")
    if not isinstance(value, str) or value.count("@") > 1 or "+" in value:
        raise ValueError(f"cannot read {value!r} as a model path")
    path, _, revision = value.partition("@")
    return path, revision or None

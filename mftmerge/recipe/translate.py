"""A document of a recipe as the data of a mergekit configuration. What becomes of masks is for subclasses to say."""

from __future__ import annotations

from typing import Any

from mftmerge.recipe.locate import MaskBook
from mftmerge.recipe.schema import BaseInput, Document, ModelInput, Module, OutputSlice, Reference


class Translation:
    """Turns one document into mergekit's terms; `absolute` and `input` decide how models are named."""

    def __init__(self, document: Document, book: MaskBook) -> None:
        self.document, self.book, self.folder = document, book, book.folder

    def absolute(self, reference: Reference) -> Reference:
        """The reference with paths that mean the same from any directory."""
        raise NotImplementedError

    def input(self, item: ModelInput | BaseInput) -> Any:
        """mergekit's reference to an input or base model, masked as the document says."""
        raise NotImplementedError

    def data(self) -> dict[str, Any]:
        """The configuration as plain values."""
        d = self.document
        data: dict[str, object] = {"merge_method": d.merge_method}
        data |= d.model_dump(include={"dtype", "out_dtype", "chat_template", "parameters"}, exclude_none=True)
        if d.base_model:
            data["base_model"] = self.input(d.base_model)
        if d.models:
            data["models"] = [self.model(m) for m in d.models]
        if d.slices:
            data["slices"] = [self.slice(s) for s in d.slices]
        if d.modules:
            data["modules"] = {name: self.module(m) for name, m in d.modules.items()}
        if d.tokenizer_source:
            data["tokenizer_source"] = self.tokenizer_source(d.tokenizer_source)
        if d.tokenizer:
            data["tokenizer"] = self.tokenizer()
        return data

    def model(self, item: ModelInput) -> dict[str, Any]:
        """One entry of `models:` or `sources:`."""
        return {"model": self.input(item)} | ({"parameters": dict(item.parameters)} if item.parameters else {})

    def slice(self, out: OutputSlice) -> dict[str, Any]:
        """One entry of `slices:`."""
        sources = [self.model(s) | {"layer_range": list(s.layer_range)} for s in out.sources]
        base = {"base_model": self.input(out.base_model)} if out.base_model else {}
        plain = out.model_dump(include={"residual_weight", "parameters"}, exclude_none=True)
        return {"sources": sources} | base | plain

    def module(self, module: Module) -> dict[str, Any]:
        """One entry of `modules:`."""
        models = {"models": [self.model(m) for m in module.models]} if module.models else {}
        slices = {"slices": [self.slice(s) for s in module.slices]} if module.slices else {}
        return models | slices | ({"parameters": module.parameters} if module.parameters else {})

    def tokenizer_source(self, text: str) -> Any:
        return text if text in ("union", "base") else self.named(Reference.model_validate(text))

    def named(self, reference: Reference) -> Any:
        """The reference by which a model goes in this merge, for the tokenizer section; unmasked if it is there so."""
        path = self.absolute(reference)
        same = [i for _, i in self.document.parts() if self.absolute(i.model) == path]
        return self.input(min(same, key=lambda i: i.mask is not None)) if same else path.to_mergekit()

    def tokenizer(self) -> dict[str, Any]:
        """The `tokenizer:` section."""
        assert self.document.tokenizer is not None
        section = self.document.tokenizer
        data = section.model_dump(exclude_none=True, exclude={"source", "tokens"})
        data["source"] = self.tokenizer_source(section.source)
        if section.tokens:
            data["tokens"] = {}
        for token, setting in (section.tokens or {}).items():
            row: dict[str, Any] = {"force": setting.force}
            if isinstance(setting.source, Reference):
                row["source"] = self.named(setting.source)
            elif setting.source is not None:
                row["source"] = setting.source.model_dump(exclude_none=True, exclude={"model"})
                if setting.source.model:
                    row["source"]["model"] = self.named(setting.source.model)
            data["tokens"][token] = row
        return data

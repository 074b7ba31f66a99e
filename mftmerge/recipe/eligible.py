"""Which merges our own executor does: those whose result it gives bit for bit as mergekit does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mftmerge.checkpoint import Checkpoint
from mftmerge.recipe.locate import WEIGHTS, model_directory
from mftmerge.recipe.schema import Document, Reference
from mftmerge.recipe.settings import layout, read_config

STREAMED = ("linear", "task_arithmetic", "ties", "passthrough", "masked")
FLOATS = {"F32", "BF16", "F16"}
# What mergekit copies from the base (or first) model when it has a complete tokenizer.
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "chat_template.json",
    "video_preprocessor_config.json",
)


def model_path(reference: Reference, folder: Path, stages: Mapping[str, Path]) -> Path:
    """Directory of a model or of an earlier document's result."""
    return stages.get(reference.path) or model_directory(reference.path, folder, reference.revision)


def why_not(document: Document, folder: Path, stages: Mapping[str, Path | None]) -> str | None:
    """Why mergekit has to do a merge; None when our executor can.

    stages: directories of earlier documents' results, by name; None for one that does not exist yet, of which nothing
    is known.
    """
    if document.merge_method not in STREAMED:
        return f"{document.merge_method} is done by mergekit's own method"
    if not document.models:
        return "slices and modules are planned by mergekit"
    if document.tokenizer or document.tokenizer_source or document.chat_template:
        return "mergekit merges the tokenizer"
    settings = [document.parameters, *(i.parameters for _, i in document.inputs())]
    given = [s for s in settings if s]
    if any("scale" in s or "mask" in s for s in given):
        return "scale and mask parameters are mergekit's"
    if document.merge_method == "ties" and any(s.get("rescale") not in (None, False) for s in given):
        return "rescale needs norms of whole tensors"
    if {document.dtype, document.out_dtype} - {None, "float32", "bfloat16", "float16"}:
        return "the dtype is not one of float32, bfloat16, float16"
    items: list[Any] = [i for _, i in document.parts()]
    if any(i.model.lora or i.model.override_architecture for i in items):
        return "mergekit merges adapters"
    checkpoints = []
    for item in items:
        path = stages.get(item.model.path)
        if path is None and item.model.path in stages:
            continue
        path = path or model_directory(item.model.path, folder, item.model.revision)
        if not any((path / name).is_file() for name in WEIGHTS[:2]):
            return f"{item.model} has no safetensors"
        checkpoints.append(Checkpoint.open(path))
    return _unlike(checkpoints)


def _unlike(checkpoints: list[Checkpoint]) -> str | None:
    """What keeps checkpoints from being read side by side."""
    if not checkpoints:
        return None
    first = checkpoints[0]
    config = read_config(first.path)
    found = layout(config)
    if found is None:
        return f"the architecture {config.get('architectures')} is not a plain list of tensors in mergekit"
    names = set(first.names)
    if names - set(found.depth) or set(found.depth) - names - found.optional:
        return "tensors differ from mergekit's list for the architecture"
    for checkpoint in checkpoints:
        if read_config(checkpoint.path).get("architectures") != config.get("architectures"):
            return "the models' architectures differ"
        if set(checkpoint.names) != names or any(checkpoint.entry(n).shape != first.entry(n).shape for n in names):
            return "the models' tensors differ"
        if any(e.dtype not in FLOATS for e in checkpoint):
            return "there are tensors that are not float32, bfloat16 or float16"
        files = {n for n in TOKENIZER_FILES if (checkpoint.path / n).exists()}
        complete = "tokenizer_config.json" in files and files & {"tokenizer.json", "tokenizer.model"}
        if not complete and any("token" in n for n in files):
            return "the tokenizer's files are incomplete, mergekit converts it"
    return None

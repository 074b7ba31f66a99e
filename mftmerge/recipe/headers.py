"""Shapes and types of a model's tensors, and files that stand for a model: a header over a hole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError

import torch
from mergekit.io.lazy_tensor_loader import ShardedTensorIndex

from mftmerge.checkpoint import SINGLE, Checkpoint, TensorEntry
from mftmerge.dtypes import of_torch
from mftmerge.errors import BadInput
from mftmerge.recipe.locate import WEIGHTS

Header = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def header(model: Path) -> Header:
    """Shapes and types of a model's tensors, of safetensors or pickled weights."""
    if any((model / name).is_file() for name in WEIGHTS[:2]):
        return {e.name: (e.shape, e.element.torch) for e in Checkpoint.open(model, follow_links=True)}
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    try:
        for shard in ShardedTensorIndex.from_disk(str(model)).shards:  # it may read the files
            tensors = torch.load(model / shard.filename, map_location="meta", weights_only=True)
            found |= {n: (tuple(t.shape), t.dtype) for n, t in tensors.items() if isinstance(t, torch.Tensor)}
    except (UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError):
        raise BadInput(f"{model}: its pickled weights cannot be read without running code in them") from None
    return found


def check_config(model: Path) -> None:
    """Raise BadInput where transformers finds a value in a model's configuration that cannot be."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        with suppress(OSError, ValueError, KeyError, ImportError):  # of a kind that it does not know: mergekit's to say
            AutoConfig.from_pretrained(model, trust_remote_code=False)
    except StrictDataclassError as e:
        raise BadInput(f"{model / 'config.json'}: {' '.join(str(e).split())[:300]}") from None


def hole(entries: Iterable[TensorEntry], path: Path) -> None:
    """A safetensors file with these tensors, whose data is a hole: it takes no room."""
    at, table = 0, {}
    for e in entries:
        nbytes = e.size * e.element.nbytes
        table[e.name] = {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def opened(model: Path, work: Path) -> Checkpoint:
    """A model's checkpoint; for pickled weights one of the same names, shapes and configuration, made in `work`."""
    if any((model / name).is_file() for name in WEIGHTS[:2]):
        return Checkpoint.open(model)
    stand_in = work / f"headers-{len(list(work.glob('headers-*')))}"
    stand_in.mkdir(parents=True)
    entries = [TensorEntry(n, of_torch(dtype).code, shape, Path(), 0, 0) for n, (shape, dtype) in header(model).items()]
    hole(entries, stand_in / SINGLE)
    shutil.copyfile(model / "config.json", stand_in / "config.json")
    return Checkpoint.open(stand_in)

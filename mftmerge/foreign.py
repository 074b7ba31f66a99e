"""Masks from other tools: the pickled float masks of the MFT release, and safetensors files of bool or 0/1 numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mftmerge import bits
from mftmerge.checkpoint import Checkpoint, read_shard, resolve
from mftmerge.dtypes import to_float32
from mftmerge.errors import BadInput
from mftmerge.mask import Mask, MaskInfo

PIECE = 1 << 20  # elements converted at a time
PICKLES = (".pt", ".pth", ".bin", ".pkl")

# One foreign tensor: its name, its shape, and a function that gives elements [start, stop) as float32.
Foreign = tuple[str, tuple[int, ...], Callable[[int, int], npt.NDArray[np.float32]]]


def import_mask(source: str | Path, model: str | None = None) -> tuple[Mask, list[str]]:
    """Read a foreign mask file (1 = keep) and say what was done, in lines.

    A pickle must be a dict of names to tensors and is loaded with `weights_only=True`. Names of modules get `.weight`;
    with `model` (checkpoint directory or hub id) names and shapes are checked against it and its fingerprints recorded.
    Raises BadInput where a value is neither 0 nor 1.
    """
    source = Path(source)
    if not source.is_file():
        raise BadInput(f"{source}: no such file")
    base = Checkpoint.open(resolve(model)) if model is not None else None
    packed: dict[str, bits.Packed] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    renamed = 0
    for foreign, shape, read in _pickle(source) if source.suffix in PICKLES else _safetensors(source):
        name = _checkpoint_name(foreign, base, source)
        renamed += name != foreign
        if name in packed:
            raise BadInput(f"{source}: {foreign!r} is there twice, with and without '.weight'")
        if base is not None and base.entry(name).shape != shape:
            raise BadInput(f"{source}: {foreign!r} has shape {shape}, in {model} it has {base.entry(name).shape}")
        packed[name], shapes[name] = _pack(source, foreign, shape, read), shape
    if not packed:
        raise BadInput(f"{source}: no tensors in it")
    prints = {n: base.fingerprint(n) for n in packed} if base else {}
    notes = [f"{renamed} of {len(packed)} names were completed with '.weight'"] if renamed else []
    if not base:
        notes.append("names and shapes were not checked; give --model to check them against a checkpoint")
    return Mask(packed, shapes, MaskInfo(base=model, fingerprints=prints, training={"imported": source.name})), notes


def _checkpoint_name(name: str, base: Checkpoint | None, source: Path) -> str:
    if base is None:
        return name if name.endswith((".weight", ".bias")) else f"{name}.weight"
    found = [n for n in (name, f"{name}.weight") if n in base]
    if not found:
        raise BadInput(f"{source}: {base.path} has no tensor {name!r} or {name + '.weight'!r}; is it another model's?")
    return found[0]


def _pack(
    source: Path, name: str, shape: tuple[int, ...], read: Callable[[int, int], npt.NDArray[np.float32]]
) -> bits.Packed:
    size = int(np.prod(shape, dtype=object)) if shape else 1
    result = np.zeros(bits.nbytes(size), np.uint8)
    for start in range(0, size, PIECE):
        values = read(start, min(start + PIECE, size)).reshape(-1)
        kept = values == 1
        wrong = ~kept & (values != 0)
        if wrong.any():
            value = values[wrong][0]
            raise BadInput(f"{source}: {name!r} holds {value}; a mask holds only 0 and 1 (cut scores to a mask first)")
        result[start // 8 : bits.nbytes(start + kept.size)] = bits.pack(kept)
    return result


def _safetensors(source: Path) -> Iterator[Foreign]:
    shard = read_shard(source)
    for entry in shard.tensors:
        width = np.dtype(entry.integer).itemsize

        def read(start: int, stop: int, entry: Any = entry, width: int = width) -> npt.NDArray[np.float32]:
            raw = shard.read(entry.start + start * width, entry.start + stop * width)
            return to_float32(np.frombuffer(raw, entry.integer), entry.dtype)

        yield entry.name, entry.shape, read


def _pickle(source: Path) -> Iterator[Foreign]:
    """The tensors of a pickle. Only here is torch imported; `weights_only` refuses code."""
    import torch

    try:
        try:
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of before torch 1.6 cannot be mapped
            content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as e:
        reason = str(e).strip().split("\n")[0][:160] or type(e).__name__
        raise BadInput(f"{source}: not a pickle that torch loads without running code ({reason})") from None
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise BadInput(f"{source}: holds a {type(content).__name__}, which is not a dict of names to 0/1 tensors")
    for name, tensor in content.items():
        if tensor.is_complex() or tensor.is_quantized or tensor.layout is not torch.strided:
            raise BadInput(f"{source}: {name!r} is not a plain tensor of real numbers")
        flat = tensor.detach().reshape(-1)

        def read(start: int, stop: int, flat: Any = flat) -> npt.NDArray[np.float32]:
            array: npt.NDArray[np.float32] = flat[start:stop].float().numpy()
            return array

        yield str(name), tuple(tensor.shape), read

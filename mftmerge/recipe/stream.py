"""Our own executor for the commonest merges: pieces of all inputs go through the arithmetic straight to the output.

For linear, task_arithmetic, ties, passthrough and masked over checkpoints with the same tensors. The result is
mergekit's bit for bit; memory does not grow with the model, and mergekit is not imported.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mftmerge import bits
from mftmerge.checkpoint import Checkpoint
from mftmerge.errors import BadInput
from mftmerge.files import open_new, write_at
from mftmerge.mask import Mask
from mftmerge.matching import match, require_base_tensors
from mftmerge.recipe import kernels
from mftmerge.recipe.catalogue import METHODS
from mftmerge.recipe.eligible import TOKENIZER_FILES, model_path
from mftmerge.recipe.locate import MaskBook
from mftmerge.recipe.schema import BaseInput, Document, MaskUse, ModelInput
from mftmerge.recipe.settings import Layout, layout, read_config, value
from mftmerge.recipe.sizes import CODES

SHARD_BYTES = 5_000_000_000
PIECE = 1 << 18  # elements; what a piece needs stays near the cache, and larger ones were not faster
TYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: code for code, dtype in TYPES.items()}
Progress = Callable[[int], None]


@dataclass
class Source:
    """One input, read in pieces with its mask applied. `names`: covered tensor -> tensor of the mask."""

    checkpoint: Checkpoint
    parameters: dict[str, Any] | None = None
    mask: Mask | None = None
    names: dict[str, str] | None = None
    base: Source | None = None

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a tensor, shape (stop - start,), in its stored dtype."""
        raw = self.checkpoint.read_range(name, start, stop)
        tensor = torch.from_numpy(raw).view(TYPES[self.checkpoint.entry(name).dtype])
        if self.mask is None or self.names is None or name not in self.names:
            return tensor
        kept = _kept(self.mask, self.names[name], start, stop)
        if self.base is None:
            return tensor.masked_fill_(~kept, 0)
        return torch.where(kept, tensor, self.base.read(name, start, stop))


def _kept(mask: Mask, name: str, start: int, stop: int) -> torch.Tensor:
    return torch.from_numpy(bits.unpack(mask.read(name, start, stop), stop - start))


class Merge:
    """One document, opened: its inputs, its method's parameters by tensor, its output mask."""

    def __init__(self, document: Document, folder: Path, stages: dict[str, Path], sort: bool) -> None:
        self.document, self.folder, self.stages, self.sort = document, folder, stages, sort
        self.method = METHODS[document.merge_method]
        self.book = MaskBook(folder, document.masks)
        base = document.base_model
        base_id = (base.model, base.mask) if base else None
        self.base = self.open(base) if base else None
        inputs = document.models or ()
        self.others = [self.open(i) for i in inputs if self.method.base == "ignored" or (i.model, i.mask) != base_id]
        if self.method.base == "ignored" and base and base_id not in [(i.model, i.mask) for i in inputs]:
            assert self.base is not None
            self.others.append(self.base)  # mergekit counts the base as one more input of such methods
        found = layout(read_config((self.base or self.others[0]).checkpoint.path))
        assert found is not None  # see eligible.why_not
        self.layout: Layout = found
        self.output = self.output_mask(document.mask) if document.mask else None

    def open(self, item: ModelInput | BaseInput) -> Source:
        """A source with its mask, matched to the checkpoint's names."""
        path = model_path(item.model, self.folder, self.stages)
        source = Source(Checkpoint.open(path), getattr(item, "parameters", None))
        if item.mask:
            source.mask = self.book.evaluate(item.mask.expression())
            source.names = match(source.mask, source.checkpoint, str(item.model))
            source.base = self.delta_base(item.mask)
            if source.base:
                require_base_tensors(source.names, source.checkpoint, source.base.checkpoint, "base")
        return source

    def delta_base(self, use: MaskUse) -> Source | None:
        """Where dropped weights of a delta mask come from."""
        if use.on == "weights":
            return None
        base = BaseInput(model=use.base) if use.base else self.document.base_model
        assert base is not None
        return self.open(base)

    def output_mask(self, use: MaskUse) -> tuple[Mask, Source | None]:
        mask = self.book.evaluate(use.expression())
        shapes = self.sources[0].checkpoint
        for name in mask.names:
            if name not in shapes or shapes.entry(name).shape != tuple(mask.shape(name)):
                raise BadInput(f"the output mask does not fit the result at {name}")
        return mask, self.delta_base(use)

    @property
    def sources(self) -> list[Source]:
        """All inputs, the base included."""
        return [*self.others, *([self.base] if self.base and self.base not in self.others else [])]

    def names(self) -> list[str]:
        """Names of the result's tensors."""
        return [n for n in self.layout.depth if n in self.sources[0].checkpoint]

    def dtype(self, name: str) -> torch.dtype:
        """dtype of the arithmetic: the recipe's, else that to which all inputs promote."""
        if self.document.dtype:
            return TYPES[CODES[self.document.dtype]]
        kinds = [TYPES[s.checkpoint.entry(name).dtype] for s in self.sources]
        wide = kinds[0]
        for kind in kinds[1:]:
            wide = torch.promote_types(wide, kind)
        return wide

    def out_dtype(self, name: str) -> torch.dtype:
        return TYPES[CODES[self.document.out_dtype]] if self.document.out_dtype else self.dtype(name)

    def shared(self, key: str, name: str) -> Any:
        """A parameter that has one value for all inputs."""
        return value(self.method.parameters[key], [self.document.parameters], key, name, self.layout.depth[name])

    def own(self, key: str, name: str) -> list[Any]:
        """A parameter's value for each of `others`."""
        parameter, t = self.method.parameters[key], self.layout.depth[name]
        return [value(parameter, [s.parameters, self.document.parameters], key, name, t) for s in self.others]

    def kernel(
        self, name: str, pieces: Sequence[kernels.Piece], run: kernels.Run
    ) -> Callable[[int, int], torch.Tensor]:
        """The function that computes a piece of a result tensor."""
        dtype, method = self.dtype(name), self.document.merge_method

        def read(source: Source, start: int, stop: int) -> torch.Tensor:
            return source.read(name, start, stop).to(dtype)

        if method in ("passthrough", "masked"):
            return lambda a, b: read(self.others[0], a, b)
        weights = self.own("weight", name)
        normalize = self.shared("normalize", name)
        if method == "linear":
            return lambda a, b: kernels.linear([read(s, a, b) for s in self.others], weights, normalize)
        base = self.base
        assert base is not None
        scale, elect = self.shared("lambda", name), method == "ties"
        densities = self.own("density", name) if elect else []
        cuts = []
        for source, density in zip(self.others, densities, strict=elect):
            delta_of = partial(_delta, read, source, base)
            cuts.append(self.cut(delta_of, density, pieces, dtype, run))

        def merged(start: int, stop: int) -> torch.Tensor:
            foundation = read(base, start, stop)
            deltas = []
            for i, source in enumerate(self.others):
                delta = read(source, start, stop) - foundation
                cut = cuts[i] if elect else None
                if cut is not None:
                    delta = delta * cut.kept(delta, start)
                elif elect and densities[i] <= 0:
                    delta = torch.zeros_like(delta)
                deltas.append(delta)
            if not deltas:
                return foundation
            return kernels.task_arithmetic(foundation, deltas, weights, normalize, scale, elect)

        return merged

    def cut(
        self,
        deltas: kernels.Deltas,
        density: float,
        pieces: Sequence[kernels.Piece],
        dtype: torch.dtype,
        run: kernels.Run,
    ) -> kernels.Cut | kernels.SortedCut | None:
        """Which elements of a task vector TIES keeps; None where it keeps all or none."""
        if not 0 < density < 1 or not pieces:
            return None
        count = max(1, int(density * pieces[-1][1]))
        found = kernels.find_cut(deltas, pieces, dtype == torch.float32, count, run)
        return kernels.sort_cut(deltas, pieces, count) if self.sort and found.ambiguous else found

    def finish(self, name: str, tensor: torch.Tensor, start: int) -> torch.Tensor:
        """A computed piece in the result's dtype, masked by the output mask."""
        tensor = tensor.to(self.out_dtype(name))
        if self.output is None or name not in self.output[0]:
            return tensor
        mask, base = self.output
        kept = _kept(mask, name, start, start + len(tensor))
        if base is None:
            return tensor.masked_fill(~kept, 0)
        return torch.where(kept, tensor, base.read(name, start, start + len(tensor)).to(tensor.dtype))


def _delta(read: Callable[..., torch.Tensor], source: Source, base: Source, start: int, stop: int) -> torch.Tensor:
    return read(source, start, stop) - read(base, start, stop)


def merge(
    document: Document,
    folder: Path,
    out: Path,
    *,
    stages: dict[str, Path] | None = None,
    sort: bool = True,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, int]:
    """Merge one document into `out`: weights, configuration, tokenizer. Gives the bytes of each tensor written.

    sort: where TIES has to choose among equal magnitudes, sort that tensor as mergekit does, to be bit-equal; False:
    keep those with the lowest index, which needs neither the time nor the tensor in memory.
    """
    work = Merge(document, folder, stages or {}, sort)
    out.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # pieces are small: threads work on different pieces instead
    try:
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1), "mftmerge-merge") as pool:
            sizes = _write(work, out, pool, progress, shard_bytes)
    finally:
        torch.set_num_threads(threads)
    _companions(work, out)
    return sizes


def _write(
    work: Merge, out: Path, pool: ThreadPoolExecutor, progress: Progress | None, shard_bytes: int
) -> dict[str, int]:
    """Write all shards, each with its header first."""
    ordered = sorted(work.names(), key=lambda n: (-work.out_dtype(n).itemsize, n))  # wide types first keep alignment
    entry = work.sources[0].checkpoint.entry
    sizes = {n: entry(n).size * work.out_dtype(n).itemsize for n in ordered}
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name in ordered:
        if shards[-1] and sizes[name] > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= sizes[name]
    weight_map: dict[str, str] = {}
    done = 0
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(names, file)
        header, at = {"__metadata__": {"format": "pt"}}, 0
        offsets = {}
        for name in names:
            offsets[name], code = at, NAMES[work.out_dtype(name)]
            header[name] = {"dtype": code, "shape": list(entry(name).shape), "data_offsets": [at, at + sizes[name]]}  # type: ignore[dict-item]
            at += sizes[name]
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded = encoded.ljust(-(-len(encoded) // 8) * 8)
        start = 8 + len(encoded)
        fd = open_new(out / file, start + at)
        try:
            write_at(fd, memoryview(len(encoded).to_bytes(8, "little") + encoded), 0)
            for name in names:
                _write_tensor(work, name, fd, start + offsets[name], pool)
                done += sizes[name]
                if progress:
                    progress(done)
            os.fsync(fd)
        finally:
            os.close(fd)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return sizes


def _write_tensor(work: Merge, name: str, fd: int, offset: int, pool: ThreadPoolExecutor) -> None:
    """Compute and write one tensor, piece by piece in parallel."""
    size = work.sources[0].checkpoint.entry(name).size
    pieces = [(a, min(a + PIECE, size)) for a in range(0, size, PIECE)]

    def run(function: Callable[[kernels.Piece], Any], todo: Sequence[kernels.Piece]) -> Iterator[Any]:
        return pool.map(function, todo) if len(todo) > 1 else map(function, todo)

    compute, width = work.kernel(name, pieces, run), work.out_dtype(name).itemsize

    def write(piece: kernels.Piece) -> None:
        tensor = work.finish(name, compute(*piece), piece[0]).contiguous()
        write_at(fd, tensor.view(torch.uint8).numpy().data, offset + piece[0] * width)

    for _ in run(write, pieces):
        pass


def _companions(work: Merge, out: Path) -> None:
    """config.json of the base (or first) model with the result's dtype, and its tokenizer's files."""
    donor = (work.base or work.others[0]).checkpoint.path
    config = read_config(donor)
    dtype = work.document.out_dtype or work.document.dtype
    if dtype:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if (donor / "tokenizer_config.json").exists():
        for name in TOKENIZER_FILES:
            if (donor / name).exists():
                shutil.copyfile(donor / name, out / name)

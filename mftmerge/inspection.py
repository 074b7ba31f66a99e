"""What is in a `.mask` file: density by layer and module, provenance, family tree. Reads and checks every bit."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mftmerge import bits
from mftmerge.errors import BadInput
from mftmerge.mask import Mask, MaskInfo, Parent
from mftmerge.maskfile import MaskFile
from mftmerge.maskheader import info_json


def layer_of(name: str) -> int | None:
    """Index of the layer that a tensor belongs to (the first number in its name), None outside the layers."""
    found = re.search(r"(?:^|\.)(\d{1,9})(?:\.|$)", name)  # int() refuses thousands of digits
    return int(found[1]) if found else None


def module_of(name: str) -> str:
    """The part of a tensor's name that is the same in all layers, such as `self_attn.q_proj` or `experts.w1`."""
    parts = name.removesuffix(".weight").split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(p for p in parts[numbers[0] + 1 if numbers else 0 :] if not p.isdigit()) or name


@dataclass(frozen=True)
class Share:
    """Weights kept out of `size`."""

    size: int
    kept: int

    @property
    def density(self) -> float:
        return self.kept / self.size if self.size else 1.0


@dataclass(frozen=True)
class Inspection:
    """A mask file's content. file_bytes includes the header; bits_per_weight counts the bits of the mask alone."""

    path: str
    file_bytes: int
    bits_per_weight: float
    archive: bool
    scores: str | None
    initial_scores: bool
    digest: str
    total: Share
    tensors: dict[str, Share]
    shapes: dict[str, tuple[int, ...]]
    info: MaskInfo

    def by_layer(self) -> dict[int | None, Share]:
        """Layer index -> weights kept there, in order; None for tensors outside the layers."""
        return group(self.tensors, layer_of)

    def by_module(self) -> dict[str, Share]:
        """Module -> weights kept in it over all layers."""
        return group(self.tensors, module_of)

    def table(self) -> tuple[list[str], list[int | None], dict[tuple[str, int | None], Share]]:
        """Modules, layers, and the share of each pair of them that there is."""
        cells: dict[tuple[str, int | None], Share] = {}
        for name, share in self.tensors.items():
            key = module_of(name), layer_of(name)
            old = cells.get(key, Share(0, 0))
            cells[key] = Share(old.size + share.size, old.kept + share.kept)
        return list(self.by_module()), list(self.by_layer()), cells

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        plain = asdict(self)
        plain["info"] = info_json(self.info)
        plain["total"] |= {"density": self.total.density}
        for name, share in self.tensors.items():
            plain["tensors"][name] |= {"density": share.density, "shape": list(self.shapes[name])}
        del plain["shapes"]
        plain["by_layer"] = {"other" if k is None else str(k): s.density for k, s in self.by_layer().items()}
        plain["by_module"] = {k: s.density for k, s in self.by_module().items()}
        return plain


def group(tensors: dict[str, Share], key: Any) -> dict[Any, Share]:
    """Shares added up by a function of the tensor's name, sorted with None last."""
    sums: dict[Any, Share] = {}
    for name, share in tensors.items():
        old = sums.get(key(name), Share(0, 0))
        sums[key(name)] = Share(old.size + share.size, old.kept + share.kept)
    return dict(sorted(sums.items(), key=lambda item: (item[0] is None, item[0] or 0)))


def inspect(path: str | Path) -> Inspection:
    """Read a mask file whole, checking each tensor's bits, count and check sum. Raises BadInput."""
    file = MaskFile(path)
    mask = Mask.from_store(file, file.header.info)
    tensors = {}
    for name in mask.names:
        kept = sum(map(bits.count, mask.pieces(name)))
        if kept != mask.count(name):
            raise BadInput(f"{path}: tensor {name!r} keeps {kept} weights, its header says {mask.count(name)}")
        mask.verify_scores(name)
        tensors[name] = Share(mask.size(name), kept)
    total = Share(sum(s.size for s in tensors.values()), sum(s.kept for s in tensors.values()))
    stored = sum(e.stop - e.start for e in file.header.entries.values())
    where = file.header.sidecar if file.header.sidecar and mask.has_scores else "embedded" if mask.has_scores else None
    return Inspection(
        path=str(path),
        file_bytes=file.path.stat().st_size,
        bits_per_weight=8 * stored / total.size if total.size else 0.0,
        archive=file.header.archive,
        scores=where,
        initial_scores=mask.has_initial_scores,
        digest=mask.digest,
        total=total,
        tensors=tensors,
        shapes={n: mask.shape(n) for n in mask.names},
        info=mask.info,
    )


def family_tree(name: str, info: MaskInfo | Parent) -> list[str]:
    """The ancestors of a mask, one line each, indented by generation."""
    made = f": {info.operation}" if info.operation else ""
    options = ", ".join(f"{k} {v}" for k, v in info.options.items() if k != "weights")
    lines = [f"{name}{made}{' (' + options + ')' if options else ''}"]
    for parent in info.parents:
        weight = "" if parent.weight is None else f" x {parent.weight:g}"
        lines += ["  " + line for line in family_tree(f"{parent.name} [{parent.digest[:12]}]{weight}", parent)]
    return lines


def provenance(info: MaskInfo) -> Iterable[tuple[str, str]]:
    """What a mask was made from and how, as (what, value)."""
    yield from ((k, str(v)) for k, v in (("base", info.base), ("keep", info.keep)) if v is not None)
    if info.fingerprints:
        yield "fingerprints", f"{len(info.fingerprints)} tensors of the base"
    for part, values in (("training", info.training), ("comparison", info.comparison)):
        yield from ((f"{part}.{k}", str(v)) for k, v in values.items() if not isinstance(v, dict | list))

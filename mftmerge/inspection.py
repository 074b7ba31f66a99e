"""What is in a `.mask` file: density by layer and module, provenance, family tree. Reads and checks every bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mftmerge import bits, notebook
from mftmerge.errors import BadInput, shown
from mftmerge.maskfile import MaskFile
from mftmerge.maskheader import info_json
from mftmerge.maskstore import MaskInfo, Parent, Store
from mftmerge.names import layer_name, layer_of, module_of

if TYPE_CHECKING:
    from mftmerge.mask import Mask

Key = TypeVar("Key", int | None, str)


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
    """A mask's content. bits_per_weight counts the bits of the mask alone.

    file_bytes includes the header; 0 for a mask in memory.
    """

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

    def _repr_html_(self) -> str:
        """In a notebook: the density of each module in each layer, and where the mask comes from."""
        modules, layers, cells = self.table()
        shares = [[cells.get((module, layer)) for layer in layers] for module in modules]
        rows = [
            [module, *(f"{s.density:.4f}" if s and s.size else "" for s in row)]
            for module, row in zip(modules, shares, strict=True)
        ]
        heads = ["module", *(layer_name(layer, "layer ") for layer in layers)]
        title = f"{self.path}: {len(self.tensors)} tensors, density {self.total.density:.4f}"
        return notebook.table(heads, rows, title, [f"{k}: {v}" for k, v in provenance(self.info)])

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        plain = asdict(self)
        plain["info"] = info_json(self.info)
        plain["total"] |= {"density": self.total.density}
        for name, share in self.tensors.items():
            plain["tensors"][name] |= {"density": share.density, "shape": list(self.shapes[name])}
        del plain["shapes"]
        plain["by_layer"] = {layer_name(k): s.density for k, s in self.by_layer().items()}
        plain["by_module"] = {k: s.density for k, s in self.by_module().items()}
        return plain


def group(tensors: Mapping[str, Share], key: Callable[[str], Key]) -> dict[Key, Share]:
    """Shares added up by a function of the tensor's name, sorted with None last."""
    sums: dict[Key, Share] = {}
    for name, share in tensors.items():
        old = sums.get(key(name), Share(0, 0))
        sums[key(name)] = Share(old.size + share.size, old.kept + share.kept)
    return dict(sorted(sums.items(), key=lambda item: (item[0] is None, item[0] or 0)))


def inspect(mask: str | Path | Mask) -> Inspection:
    """Read a mask file (or a mask) whole, checking each tensor's bits, count and check sum. Raises BadInput."""
    if not isinstance(mask, str | Path):
        return mask.inspect()
    file = MaskFile(mask)
    return inspect_store(file, file.info, str(mask))


def inspect_store(store: Store, info: MaskInfo, path: str) -> Inspection:
    """The same of an open file or of arrays in memory; path: how it is called in messages."""
    file = store if isinstance(store, MaskFile) else None
    tensors = {}
    for name in store.names:
        kept = sum(map(bits.count, store.pieces(name)))
        if kept != store.count(name):
            raise BadInput(f"{path}: tensor {name!r} keeps {kept} weights, its header says {store.count(name)}")
        store.verify_scores(name)
        tensors[name] = Share(store.size(name), kept)
    total = Share(sum(s.size for s in tensors.values()), sum(s.kept for s in tensors.values()))
    if file is not None:
        stored = sum(e.stop - e.start for e in file.header.entries.values())
    else:
        stored = sum(bits.nbytes(s.size) for s in tensors.values())
    sidecar = file.header.sidecar if file is not None else None
    return Inspection(
        path=path,
        file_bytes=file.path.stat().st_size if file is not None else 0,
        bits_per_weight=8 * stored / total.size if total.size else 0.0,
        archive=file is not None and file.header.archive,
        scores=(sidecar or "embedded") if store.has_scores else None,
        initial_scores=store.has_initial_scores,
        digest=store.digest(),
        total=total,
        tensors=tensors,
        shapes=dict(store.shapes),
        info=info,
    )


def family_tree(
    name: str, info: MaskInfo, show: Callable[[str], str] = shown, named: Callable[[str], str] = str
) -> list[str]:
    """A mask and its ancestors, one line each, indented by generation.

    show: makes a line of what files say fit to be shown; named: the same for an ancestor's name, before.
    """
    lines = [show(f"{name}{made(info)}")]
    for generation, parent in info.family():
        weight = "" if parent.weight is None else f" x {parent.weight:g}"
        lines.append("  " * generation + show(f"{named(parent.name)} [{parent.digest[:12]}]{weight}{made(parent)}"))
    return lines


def made(mask: MaskInfo | Parent) -> str:
    """How a mask of a family was made, to stand behind its name; nothing for one that no operation made."""
    given = ", ".join(f"{k} {v}" for k, v in mask.options.items() if k != "weights")
    older = f"; {mask.forgotten:.4g} older ones are not recorded" if isinstance(mask, Parent) and mask.forgotten else ""
    return (f": {mask.operation}" if mask.operation else "") + (f" ({given})" if given else "") + older


def provenance(info: MaskInfo) -> Iterable[tuple[str, str]]:
    """What a mask was made from and how, as (what, value). What files say is shown as it can be printed."""
    yield from ((k, shown(str(v))) for k, v in (("base", info.base), ("keep", info.keep)) if v is not None)
    if info.fingerprints:
        yield "fingerprints", f"{len(info.fingerprints)} tensors of the base"
    if info.on == "delta":
        other = shown(info.delta_base or "a model that is not named")
        yield "on", f"delta (a dropped weight takes its value in {other})"
    for part, values in (("training", info.training), ("comparison", info.comparison)):
        yield from ((shown(f"{part}.{k}"), shown(str(v))) for k, v in values.items() if not isinstance(v, dict | list))

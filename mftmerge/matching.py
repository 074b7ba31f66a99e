"""Which tensors of a checkpoint a mask covers, and every check that needs no weights: done before a byte is written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mftmerge.checkpoint import Checkpoint, TensorEntry, read_config, resolve
from mftmerge.errors import BadInput, shown
from mftmerge.mask import Mask

HEADS = ("lm_head.weight", "output.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "tok_embeddings.weight")


@dataclass(frozen=True)
class BaseDifference:
    """How far a checkpoint is from the one a mask was made for: covered tensors and weights in those that differ.

    of: what was compared, in the words of a message.
    """

    tensors: int
    of_tensors: int
    weights: int
    of_weights: int
    of: tuple[str, str] = ("the model", "the mask's base")

    def __str__(self) -> str:
        here, there = self.of
        if not self.tensors:
            return f"{here} is {there}: all {self.of_tensors} covered tensors are equal"
        share = self.weights / self.of_weights if self.of_weights else 0.0
        return (
            f"{here} is not {there}: {self.tensors} of {self.of_tensors} covered tensors differ "
            f"({share:.1%} of the covered weights)"
            + ("; `mftmerge rebase` fits the mask to it" if here == "the model" else "")
        )


def match(mask: Mask, checkpoint: Checkpoint, what: str) -> dict[str, str]:
    """Checkpoint tensor -> mask tensor, for all that the mask covers.

    Names match exactly, or all with the same prefix added or removed (`model.layers.0` and `layers.0`). A mask over one
    of two tied tensors covers both. what: the checkpoint's name for messages.
    Raises BadInput when a covered tensor is missing, has another shape, or a type that has no weights to drop.
    """
    names = _by_name(mask, checkpoint, what)
    for here, there in names.items():
        entry, shape = checkpoint.entry(here), mask.shape(there)
        if entry.shape != shape:
            raise BadInput(f"{what}: tensor {here!r} has shape {entry.shape}, the mask has {shape}")
        if not entry.element.floating:
            raise BadInput(f"{what}: tensor {here!r} is {entry.dtype}; masks apply to floating point weights only")
        _ = entry.integer
    return {**names, **_tied_copies(mask, checkpoint, names)}


def require_base_tensors(names: dict[str, str], checkpoint: Checkpoint, base: Checkpoint, what: str) -> None:
    """Raise BadInput unless `base` has every covered tensor with the checkpoint's shape and type."""
    for name in names:
        if name not in base:
            raise BadInput(f"{what}: has no tensor {name!r}, which the mask covers; give the model's own base")
        a, b = checkpoint.entry(name), base.entry(name)
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            raise BadInput(
                f"{what}: tensor {name!r} is {b.dtype} {b.shape}, the model has {a.dtype} {a.shape}; "
                "exact selection needs both alike"
            )
        require_same_scales(name, checkpoint, base, what)


def require_same_scales(name: str, checkpoint: Checkpoint, base: Checkpoint, what: str) -> None:
    """Raise BadInput unless an 8-bit tensor means the same numbers in both: its scales are tensors of their own.

    A base's bytes under the model's scale would be neither model's value.
    """
    if checkpoint.entry(name).element.bits > 8:
        return
    for scale in sorted({*scales_of(name, checkpoint.names), *scales_of(name, base.names)}):
        alike = scale in checkpoint and scale in base and checkpoint.fingerprint(scale) == base.fingerprint(scale)
        if not alike:
            raise BadInput(
                f"{what}: tensor {name!r} is {checkpoint.entry(name).dtype} with another scale ({scale!r}) than the "
                "model's, so its values do not fit in there; convert both to bfloat16 first"
            )


def scales_of(name: str, names: Iterable[str]) -> list[str]:
    """The tensors that say what the numbers of an 8-bit tensor are to be multiplied with, whoever wrote the file.

    `x.weight` has `x.weight_scale`, `x.weight_scale_inv`, `x.scale`, `x.scales` or `x.weight.scale...`; the scale of
    the layer's inputs is none of the weights'.
    """
    parent, _, own = name.rpartition(".")
    tails = (f"{own}_scale", f"{own}.", "scale")
    begin = f"{parent}." if parent else ""
    return [
        n for n in names if n != name and n.startswith(begin) and n[len(begin) :].startswith(tails) and "scale" in n
    ]


def base_difference(
    names: dict[str, str], mask: Mask, checkpoint: Checkpoint, *, delta: bool = False
) -> BaseDifference | None:
    """Compare the covered tensors with the mask's fingerprints; None when it has none. Reads those tensors.

    delta: `checkpoint` is not the model but what dropped weights return to, and is compared with the mask's own.
    """
    prints = mask.info.delta_fingerprints if delta else mask.info.fingerprints
    known = {here: prints.get(there) for here, there in names.items()}
    entries: list[TensorEntry] = [checkpoint.entry(n) for n, print_ in known.items() if print_]
    if not entries:
        return None
    differ = [e for e in entries if checkpoint.fingerprint(e.name) != known[e.name]]
    of = ("the base", "the one that the mask's delta was learnt from") if delta else ("the model", "the mask's base")
    return BaseDifference(len(differ), len(entries), sum(e.size for e in differ), sum(e.size for e in entries), of)


def over_delta(base: str | Path, covered: Iterable[str]) -> dict[str, Any]:
    """The fields of a MaskInfo that say that dropped weights return to `base`, a directory or hub id."""
    checkpoint = Checkpoint.open(resolve(base))
    prints = {n: checkpoint.fingerprint(n) for n in covered if n in checkpoint}
    return {"on": "delta", "delta_base": str(base), "delta_fingerprints": prints}


def delta_base(
    mask: Mask, base: str | Path | None, on: str | None, ask: str = "--base {base}, or --on weights to make them 0"
) -> str | Path | None:
    """The checkpoint whose values dropped weights take; None where they become 0.

    base, on: what the user said; without that the mask's own word holds. Where a mask over a delta names a directory
    that is here, and all its covered tensors are those that the mask was learnt over, that one is taken.
    Raises BadInput where it is not known: dropped weights of a delta are no zeros. ask: what to give then.
    """
    if on == "weights" and base is not None:
        raise BadInput("dropped weights become 0 (on weights) or the base's values (base), not both; give one of them")
    if base is not None or (on or mask.info.on) == "weights":
        return base
    own = mask.info.delta_base
    if own is not None and mask.info.delta_fingerprints and (path := local_directory(own)) is not None:
        found = Checkpoint.open(path)
        if all(n in found and found.fingerprint(n) == p for n, p in mask.info.delta_fingerprints.items()):
            return path
    named = shown(own)[:200] if own else "B"
    what = f"the difference from {named}" if own else "a difference from another model"
    raise BadInput(f"the mask is over {what}, to which its dropped weights return; give {ask.format(base=named)}")


def local_directory(reference: str) -> Path | None:
    """The directory that a foreign file's reference names, if it is here: nothing that it names is downloaded."""
    try:
        path = Path(reference).expanduser()
        if path.is_dir():
            return path
    except (OSError, ValueError, RuntimeError):  # no path at all
        return None
    repository, _, revision = reference.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or repository.startswith("."):
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision or None, local_files_only=True))
    except Exception:  # the client raises many kinds: not in the cache, no such name
        return None


def _by_name(mask: Mask, checkpoint: Checkpoint, what: str) -> dict[str, str]:
    missing = [n for n in mask.names if n not in checkpoint]
    if not missing:
        return {n: n for n in mask.names}
    renamed = [r for r in _renamings(missing[0], checkpoint) if all(r(n) in checkpoint for n in missing)]
    found = {tuple(sorted((r(n), n) for n in missing)) for r in renamed}
    if len(found) == 1:
        changed = dict(found.pop())
        same = {n: n for n in mask.names if n in checkpoint}
        if not changed.keys() & same.keys():
            return {**same, **changed}
    tied = _tied_name(missing, checkpoint)
    if tied and tied not in mask:
        return {**{n: n for n in mask.names if n in checkpoint}, tied: missing[0]}
    raise BadInput(
        f"{what}: {len(missing)} of {len(mask.names)} covered tensors are missing{_hint(missing, checkpoint)}"
    )


class _Renaming:
    """Adds or removes one prefix."""

    def __init__(self, add: str, remove: str) -> None:
        self.add, self.remove = add, remove

    def __call__(self, name: str) -> str:
        return self.add + name.removeprefix(self.remove)


def _renamings(name: str, checkpoint: Checkpoint) -> Iterator[_Renaming]:
    """The prefix changes that would turn `name` into one of the checkpoint's names."""
    for other in checkpoint.names:
        if other.endswith("." + name):
            yield _Renaming(other.removesuffix(name), "")
        elif name.endswith("." + other):
            yield _Renaming("", name.removesuffix(other))


def _tied_name(missing: list[str], checkpoint: Checkpoint) -> str | None:
    """The stored embeddings, when all that is missing is a head: a checkpoint without a head ties it to them."""
    stored = [n for n in checkpoint.names if n.endswith(EMBEDDINGS)]
    heads = [n for n in checkpoint.names if n.endswith(HEADS)]
    return stored[0] if len(missing) == len(stored) == 1 and missing[0].endswith(HEADS) and not heads else None


def _tied_copies(mask: Mask, checkpoint: Checkpoint, names: dict[str, str]) -> dict[str, str]:
    """Where head and embeddings are tied but both stored, and alike, the one that the mask does not name."""
    embeddings = [n for n in checkpoint.names if n.endswith(EMBEDDINGS)]
    heads = [n for n in checkpoint.names if n.endswith(HEADS)]
    if len(embeddings) != 1 or len(heads) != 1 or not ties_embeddings(checkpoint):
        return {}
    pair = (embeddings[0], heads[0])
    covered = [n for n in pair if n in names]
    if len(covered) != 1 or len({checkpoint.entry(n).shape for n in pair}) != 1:
        return {}
    # As transformers does: two stored copies are tied only while they are equal, whatever the configuration says.
    if checkpoint.fingerprint(pair[0]) != checkpoint.fingerprint(pair[1]):
        return {}
    other = pair[1 - pair.index(covered[0])]
    return {other: names[covered[0]]}


def ties_embeddings(checkpoint: Checkpoint) -> bool:
    """Whether config.json says that the head is the embeddings."""
    config = read_config(checkpoint.path, follow_links=checkpoint.follow_links)
    inner = config.get("text_config")
    return any(isinstance(c, dict) and c.get("tie_word_embeddings") is True for c in (config, inner))


def _hint(missing: list[str], checkpoint: Checkpoint) -> str:
    if any(".experts." in n for n in missing) and any(n.endswith("experts.gate_up_proj") for n in checkpoint.names):
        return (
            f" (first {missing[0]!r}): the checkpoint stores its experts fused; save it with "
            "save_pretrained(..., save_original_format=True), or apply the mask to the live model"
        )
    return f" (first {missing[0]!r}); was the mask made for another architecture or size?"

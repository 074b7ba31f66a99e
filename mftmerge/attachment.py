"""Which parameters of a live model masks cover: taking masks up, with the values that they drop to, and letting go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from mftmerge import naming
from mftmerge.checkpoint import Checkpoint, resolve
from mftmerge.dtypes import integer_view
from mftmerge.errors import BadInput
from mftmerge.mask import Mask
from mftmerge.maskedparameter import MaskedParameter, masked_parameter
from mftmerge.matching import delta_base, scales_of


class Attachment:
    """The masked parameters of one model. names: of the masks; parts: by parameter name.

    model: as it was given, wrappers and all; inner: the model in them, whose names the masks use.
    """

    def __init__(self, model: torch.nn.Module, covered: set[str]) -> None:
        self.model, self.inner = model, naming.model_with(model, covered)
        self.names: tuple[str, ...] = ()
        self.parts: dict[str, MaskedParameter] = {}

    def add(
        self, masks: Mapping[str, Mask], base: str | Path | None, on: Literal["weights", "delta"] | None
    ) -> list[MaskedParameter]:
        """Take up masks, all or none of them; the model must be without mask. Returns the parameters new to it."""
        before = set(self.parts)
        try:
            self._take(masks)
            self._take_bases(masks, base, on)
        except BaseException:
            for label in masks:
                self._drop(label)
            raise
        self.names = (*self.names, *masks)
        new = [part for name, part in self.parts.items() if name not in before]
        for part in new:
            part.remember()
        return new

    def remove(self, label: str) -> None:
        """Let go of one mask; the model must be without mask."""
        self._drop(label)
        self.names = tuple(name for name in self.names if name != label)

    def holders(self, parts: list[MaskedParameter]) -> list[torch.nn.Module]:
        """The modules to watch: the model, and those that hold the parameters, down to a layer of a list of layers."""
        actual = naming.live_names(self.inner)
        return list(dict.fromkeys([self.model, self.inner, *_containers(self.inner, [actual[p.name] for p in parts])]))

    def _take(self, masks: Mapping[str, Mask]) -> None:
        actual, trainable = naming.live_names(self.inner), dict(self.inner.named_parameters())
        for label, mask in masks.items():
            for name, kept in naming.iter_parameters(self.inner, mask.names, _kept_of(mask), fill=True):
                if name not in self.parts:
                    if actual.get(name) not in trainable:
                        raise BadInput(f"the mask covers {name!r}, which is no parameter of this model")
                    self.parts[name] = masked_parameter(self.inner, actual[name], name)
                self.parts[name].add(label, kept)

    def _take_bases(
        self, masks: Mapping[str, Mask], base: str | Path | None, on: Literal["weights", "delta"] | None
    ) -> None:
        bases: dict[str, list[str]] = {}  # checkpoint -> masks whose dropped weights take its values
        for label, mask in masks.items():
            if (found := delta_base(mask, base, on, 'attach(..., base="{base}"), or on="weights" for 0')) is not None:
                bases.setdefault(str(found), []).append(label)
        for reference, labels in bases.items():
            checkpoint = Checkpoint.open(resolve(reference))
            covered = {name for label in labels for name in masks[label].names}
            _require_scales(self.inner, covered, checkpoint)
            for name, values in naming.iter_parameters(self.inner, sorted(covered), _values_of(checkpoint), fill=0):
                part = self.parts[name]
                like = values.to(part.parameter.device, part.parameter.dtype).contiguous()
                part.dropped |= dict.fromkeys(labels, part.gather(integer_view(like).view(-1)))

    def _drop(self, label: str) -> None:
        for name, part in list(self.parts.items()):
            part.remove(label)
            if not part.kept:
                del self.parts[name]


def _containers(model: torch.nn.Module, names: list[str]) -> Iterator[torch.nn.Module]:
    for name in names:
        module = model
        for step in name.split(".")[:-1]:
            parent, module = module, getattr(module, step)
            if not isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict):
                yield module
            if isinstance(parent, torch.nn.ModuleList):
                break  # a hook in every matrix would cost more than it finds


def _kept_of(mask: Mask) -> Callable[[str], torch.Tensor]:
    return lambda name: torch.from_numpy(mask.kept(name))


def _values_of(checkpoint: Checkpoint) -> Callable[[str], torch.Tensor]:
    """Reads a tensor of a checkpoint as a torch tensor of its own type."""

    def read(name: str) -> torch.Tensor:
        dtype = checkpoint.entry(name).element
        if not dtype.floating:
            raise BadInput(f"{checkpoint.path}: tensor {name!r} is {dtype.code}, not floating point weights")
        return torch.from_numpy(checkpoint.read(name)).view(dtype.torch)

    return read


def _require_scales(model: torch.nn.Module, names: set[str], base: Checkpoint) -> None:
    """Raise BadInput where 8-bit weights of the base have scales that are not the model's."""
    for name in sorted(n for n in names if n in base and base.entry(n).element.bits == 8):
        state: dict[str, Any] = model.state_dict()
        for scale in scales_of(name, {*base.names, *state}):
            theirs = torch.from_numpy(base.read_float32(scale)) if scale in base else None
            if theirs is None or scale not in state or not torch.equal(theirs, state[scale].float().cpu()):
                raise BadInput(f"{base.path}: {name!r} has another scale than the model's; convert both to bfloat16")

"""Mask x live model: switch masks on and off in place, exactly, without loading anything again.

A switcher keeps each mask's bits and, once, the original values of all weights that any of its masks drops. Switching
puts stored originals back and writes dropped values; it never adds or subtracts, so the model is bit for bit what it
was after any number of switches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mftmerge import naming
from mftmerge.checkpoint import Checkpoint, resolve
from mftmerge.dtypes import integer_view
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.mask import Mask
from mftmerge.select import select

UNKNOWN = "\0unknown"  # what is active after an interrupted switch; no mask can be called that
CACHED = 1 << 17  # weights that fit the processor's cache
PIECE = 1 << 20  # weights handled at a time on the CPU; a multiple of 8
GPU_PIECE = 1 << 25  # on an accelerator, where the launches cost more than the memory


@dataclass
class _Part:
    """One parameter: packed bits by mask (absent: the mask keeps all of it), and values of weights dropped by any mask.

    originals, dropped: integer views, in the order of the flattened parameter; dropped is None for zeros.
    stamp: the parameter's memory and version after this module's last write.
    """

    name: str
    parameter: torch.nn.Parameter
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    originals: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    dropped: torch.Tensor | None = None
    stamp: tuple[Any, ...] = ()

    def flat(self) -> torch.Tensor:
        """The parameter's own memory as integers; writes count as changes, so autograd notices them."""
        return _integers(self.parameter)

    def pieces(self) -> Iterator[tuple[int, int]]:
        size = self.parameter.numel()
        step = PIECE if _on_cpu(self.parameter) else GPU_PIECE
        return ((start, min(start + step, size)) for start in range(0, size, step))

    def bits(self, mask: str | None, start: int, stop: int) -> torch.Tensor | None:
        """Packed bits of the weights [start, stop), or None where the mask keeps them all."""
        return self.kept[mask][start // 8 : (stop + 7) // 8] if mask is not None and mask in self.kept else None

    def dropped_by_any(self, start: int, stop: int) -> torch.Tensor:
        """Positions in [start, stop), relative to start, that at least one mask drops: those with a stored original."""
        first, *others = (packed[start // 8 : (stop + 7) // 8] for packed in self.kept.values())
        for packed in others:
            first = first & packed
        dropped = _unpack(~first, stop - start)
        if _on_cpu(dropped):  # numpy's is six times faster than torch's there
            return torch.from_numpy(np.flatnonzero(dropped.numpy()))
        return dropped.nonzero().view(-1)


class Switcher:
    """Masks attached to one model, of which at most one is active. Made by `attach`.

    `use` and `switch` fail with a clear error while another `use`, a switch or a forward pass is going on, and so does
    a forward pass in a thread other than the one inside `use`. Calls on submodules (`model.model(...)`) and compiled
    graphs are not watched.
    """

    def __init__(self, model: torch.nn.Module, names: tuple[str, ...], parts: list[_Part]) -> None:
        self.names = names
        self._parts = parts
        self._active: str | None = None
        self._certain = True  # False after an interrupted switch: the next one rewrites every stored weight
        self._attached = True
        self._guard = threading.Lock()  # held only while the three fields below are looked at or set
        self._switching = False
        self._user: tuple[int, str] | None = None
        self._running: dict[int, int] = {}  # thread -> forward passes it is in
        self._hooks = [
            model.register_forward_pre_hook(self._entering),
            model.register_forward_hook(self._leaving, always_call=True),
        ]

    @property
    def active(self) -> str | None:
        """Name of the mask that is switched on, or None."""
        return self._active

    @property
    def nbytes(self) -> int:
        """Bytes kept beside the model: bits of all masks, and the originals of the weights that any of them drops."""
        tensors = [t for p in self._parts for t in (*p.kept.values(), p.originals, p.dropped) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    def switch(self, name: str | None) -> int:
        """Make mask `name` the active one, None for the model without mask. Returns the number of weights written.

        Raises BadInput for an unknown name; MftmergeError inside `use`, while the model is running, after `detach`, and
        when the parameters were changed by someone else since the masks were attached.
        """
        with self._exclusively(name):
            return self._switch(name)

    @contextmanager
    def use(self, name: str | None) -> Iterator[Switcher]:
        """Mask `name` for the length of a `with` block, then whatever was active before. Blocks do not nest."""
        with self._exclusively(name):
            before = self._active
            self._switch(name)
            self._user = (threading.get_ident(), str(name))
        try:
            yield self
        finally:
            self._user = None
            with self._exclusively(before):
                self._switch(before)

    def detach(self) -> None:
        """Put all originals back and let go of the model. The switcher cannot be used afterwards."""
        with self._exclusively(None):
            self._switch(None)
            self._attached = False
            for hook in self._hooks:
                hook.remove()
            self._parts = []

    @contextmanager
    def _exclusively(self, name: str | None) -> Iterator[None]:
        """For the length of a switch: nobody else switches or runs the model. Says who does, otherwise."""
        if name is not None and name not in self.names:
            raise BadInput(f"no mask {name!r} is attached; there are {', '.join(self.names)}")
        with self._guard:
            if not self._attached:
                raise MftmergeError("this switcher is detached; attach the masks again")
            if self._switching:
                raise MftmergeError("another thread is switching this model's masks; switch from one thread at a time")
            if self._user is not None:
                raise MftmergeError(f"mask {self._user[1]!r} is in use; leave its `with` block before switching")
            if self._running:
                raise MftmergeError("the model is running; switch masks when its forward pass has finished")
            self._switching = True
        try:
            yield
        finally:
            self._switching = False

    @torch.no_grad()
    def _switch(self, name: str | None) -> int:
        if name == self._active and self._certain:
            return 0
        for part in self._parts:
            if part.stamp != _stamp(part.parameter):
                raise MftmergeError(
                    f"parameter {part.name!r} was changed or moved since the masks were attached; "
                    "detach before training, loading or moving a model, and attach again afterwards"
                )
        before, self._certain = (self._active if self._certain else UNKNOWN), False
        parts = [p for p in self._parts if before is UNKNOWN or before in p.kept or name in p.kept]
        on_cpu = [p for p in parts if _on_cpu(p.parameter)]
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            written = sum(pool.map(lambda part: _write(part, before, name), on_cpu))
        written += sum(_write(p, before, name) for p in parts if not _on_cpu(p.parameter))
        self._active, self._certain = name, True
        return written

    def _entering(self, model: torch.nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        thread = threading.get_ident()
        with self._guard:
            if self._switching:
                raise MftmergeError("the model was called while another thread switches its masks")
            if self._user is not None and self._user[0] != thread:
                raise MftmergeError(f"the model was called while another thread uses its mask {self._user[1]!r}")
            self._running[thread] = self._running.get(thread, 0) + 1

    def _leaving(self, model: torch.nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        thread = threading.get_ident()
        with self._guard:
            left = self._running.pop(thread, 0) - 1
            if left > 0:
                self._running[thread] = left


def attach(
    model: torch.nn.Module, masks: Mapping[str, Mask | str | Path], *, base: str | Path | None = None
) -> Switcher:
    """Attach masks to a live model; nothing changes until one is switched on.

    masks: name -> Mask or .mask file, over checkpoint names (see `naming`); a tensor that a mask does not cover keeps
    all its weights under that mask. base: checkpoint whose values dropped weights take, cast to the model's type;
    without it they become 0. Memory: one bit a weight and mask, and one value for each weight that any mask drops
    (two with a base).

    with switcher.use("code"):
        model.generate(...)

    Raises BadInput when a mask does not fit the model, and for parameters that are not plain dense floating point
    tensors in memory (quantised, offloaded, sharded).
    """
    if not masks:
        raise BadInput("no masks to attach; give at least one, like attach(model, {'code': mask})")
    loaded = {label: m if isinstance(m, Mask) else Mask.load(m) for label, m in masks.items()}
    parameters = dict(model.named_parameters())
    parts: dict[str, _Part] = {}
    for label, mask in loaded.items():
        for name, kept in naming.iter_parameters(model, mask.names, _kept_of(mask), fill=True):
            part = parts.setdefault(name, _Part(name, _plain(name, parameters.get(name))))
            packed = np.packbits(kept.reshape(-1).numpy(), bitorder="little")
            part.kept[label] = torch.from_numpy(packed).to(part.parameter.device)
    for part in parts.values():
        part.originals = _gather(part, part.flat())
        part.stamp = _stamp(part.parameter)
    if base is not None:
        checkpoint = Checkpoint.open(resolve(base))
        covered = {name for mask in loaded.values() for name in mask.names}
        for name, values in naming.iter_parameters(model, sorted(covered), _values_of(checkpoint), fill=0):
            part = parts[name]
            like = values.to(part.parameter.device, part.parameter.dtype).contiguous()
            part.dropped = _gather(part, _integers(like))
    return Switcher(model, tuple(loaded), list(parts.values()))


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


@torch.no_grad()
def _write(part: _Part, before: str | None, after: str | None) -> int:
    """Change one parameter from mask `before` to mask `after`; returns the number of weights that differ between them.

    First the stored originals go back, unless the parameter has them already, then the dropped values are written.
    """
    flat, taken, changed = part.flat(), 0, 0
    try:
        for start, stop in part.pieces():
            old, new = part.bits(before, start, stop), part.bits(after, start, stop)
            piece = flat[start:stop]
            if before is UNKNOWN or old is not None or (new is not None and part.dropped is not None):
                known = part.dropped_by_any(start, stop)
                slot = slice(taken, taken + len(known))
                taken += len(known)
                values = part.originals[slot]
                if new is not None and part.dropped is not None:
                    values = torch.where(_unpack(new, stop - start)[known], values, part.dropped[slot])
                piece.scatter_(0, known, values)
            if new is not None and part.dropped is None:
                _zero(piece, new)
            changed += _count_differing(old, new, stop - start)
    finally:
        flat[:0].zero_()  # some writes go past torch: this counts as one, so that autograd notices them
        part.stamp = _stamp(part.parameter)
    return changed


def _zero(piece: torch.Tensor, kept: torch.Tensor) -> None:
    """Set to 0, in place, what `kept` (packed) drops."""
    if not _on_cpu(piece):
        piece.masked_fill_(~_unpack(kept, len(piece)), 0)
        return
    unsigned = piece.numpy().view(f"u{piece.element_size()}")
    for start in range(0, len(unsigned), CACHED):
        part = unsigned[start : start + CACHED]
        select(part, kept[start // 8 : (start + len(part) + 7) // 8].numpy())


def _count_differing(old: torch.Tensor | None, new: torch.Tensor | None, size: int) -> int:
    """Number of bits in which two packed masks differ; None keeps everything. Padding bits are 0 in both."""
    if old is None and new is None:
        return 0
    if old is None or new is None:
        given = new if old is None else old
        assert given is not None
        return size - _ones(given)
    return _ones(old ^ new)


def _ones(packed: torch.Tensor) -> int:
    if _on_cpu(packed):
        return int(np.bitwise_count(packed.numpy()).sum(dtype=np.int64))
    return int(_unpack(packed, 8 * len(packed)).sum())


def _gather(part: _Part, source: torch.Tensor) -> torch.Tensor:
    """The values of `source`, flat, at all positions that any of the part's masks drops."""
    return torch.cat([source[start:stop][part.dropped_by_any(start, stop)] for start, stop in part.pieces()])


def _integers(values: torch.Tensor) -> torch.Tensor:
    return integer_view(values).view(-1)


def _on_cpu(tensor: torch.Tensor) -> bool:
    """Whether numpy sees the tensor's memory, and is faster than torch on it."""
    return tensor.device.type == "cpu"


def _unpack(packed: torch.Tensor, size: int) -> torch.Tensor:
    """The first `size` bits as booleans, on the device of the bytes."""
    if _on_cpu(packed):
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=size, bitorder="little")).view(torch.bool)
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(1) >> shifts & 1).view(-1)[:size].bool()


def _plain(name: str, parameter: torch.nn.Parameter | None) -> torch.nn.Parameter:
    """The parameter, if it can be changed in place."""
    if parameter is None:
        raise BadInput(f"the mask covers {name!r}, which is no parameter of this model")
    if parameter.device.type == "meta":
        raise BadInput(f"parameter {name!r} is offloaded; load the whole model into memory to attach masks")
    if type(parameter.data) is not torch.Tensor or not parameter.is_floating_point():
        raise BadInput(f"parameter {name!r} is quantised or sharded; masks attach to plain floating point weights")
    if parameter.is_inference():
        raise BadInput(
            f"parameter {name!r} was made in inference mode, which forbids changing it; load the model outside"
        )
    if not parameter.is_contiguous():
        raise BadInput(f"parameter {name!r} is not contiguous in memory; make it so before attaching masks")
    return parameter


def _stamp(parameter: torch.nn.Parameter) -> tuple[Any, ...]:
    """Changes when someone writes to the parameter or replaces its memory."""
    return parameter.data_ptr(), parameter.dtype, parameter.device, parameter._version

"""One live parameter under several masks: their bits, the values that they drop, and writing one mask after another.

Weights are moved as integers, so every bit comes back. All work is done in pieces; on the CPU numpy does it, which is
several times faster than torch there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import xxhash

from mftmerge.dtypes import integer_view
from mftmerge.errors import BadInput
from mftmerge.select import Integers, select

UNKNOWN = "\0unknown"  # what is active after an interrupted switch; no mask can be called that
# Weights handled at a time on the CPU; a multiple of 8. With pieces that fit a core's cache a single thread is a tenth
# faster, but several wait for each other's turn at the interpreter.
PIECE = 1 << 20
HASHED = 1 << 22  # words hashed at a time on an accelerator: its memory may be nearly full
GPU_PIECE = 1 << 25  # on an accelerator, where the launches cost more than the memory
_ROOM = threading.local()


@dataclass
class MaskedParameter:
    """A parameter and, by mask, its packed bits (absent: that mask keeps all of it).

    name: the parameter's, for messages. module, leaf: where the model holds it.
    originals: integer views of the weights, flat; None before the first of them is written over. dropped: by mask, the
    values that weights take when it drops them; a mask that is not there makes them 0. On an accelerator both are those
    of the weights that any mask drops alone, in their order. On the CPU they are whole: finding the positions takes ten
    times as long as writing whole rows.
    """

    name: str
    module: torch.nn.Module
    leaf: str
    parameter: torch.nn.Parameter
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    originals: torch.Tensor | None = None
    dropped: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dtype, self.place = self.parameter.dtype, self._place()
        self.whole = on_cpu(self.parameter)  # originals and dropped values are stored for all weights
        self._checks: dict[str | None, int] = {}  # mask (None: no mask) -> checksum of the contents under it
        self._differing: dict[
            tuple[str | None, str | None], int
        ] = {}  # two masks -> weights that only one of them drops

    def add(self, mask: str, kept: torch.Tensor) -> None:
        """Take up a mask: booleans of the parameter's shape, on the CPU. No mask may be on."""
        packed = np.packbits(kept.reshape(-1).numpy(), bitorder="little")
        with self._regathered():
            self.kept[mask] = torch.from_numpy(packed).to(self.parameter.device)

    def remove(self, mask: str) -> None:
        """Forget a mask, where it is known. No mask may be on."""
        if mask in self.kept:
            with self._regathered():
                del self.kept[mask]
                self.dropped.pop(mask, None)
            self._checks.pop(mask, None)
            self._differing = {pair: n for pair, n in self._differing.items() if mask not in pair}

    @contextmanager
    def _regathered(self) -> Iterator[None]:
        """Around a change of the masks: what is stored by position follows the positions that any mask drops."""
        # By identity: masks of one base share its values, which are to be spread and gathered once and stay shared.
        dense = {id(t): self.spread(t) for t in self.dropped.values()}
        keys = {mask: id(t) for mask, t in self.dropped.items()}
        yield
        self.originals = None
        if self.kept:
            again = {key: self.gather(values) for key, values in dense.items()}
            self.dropped = {mask: again[key] for mask, key in keys.items() if mask in self.dropped}

    def remember(self) -> None:
        """Take the contents without mask as what they are to be again."""
        self._checks = {None: self.checksum()}

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """The reverse of `gather`, 0 elsewhere."""
        if self.whole:
            return values
        flat, taken = torch.zeros_like(self.flat()), 0
        for start, stop in self.pieces():
            known = self.dropped_by_any(start, stop)
            flat[start:stop].scatter_(0, known, values[taken : taken + len(known)])
            taken += len(known)
        return flat

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Of a flat integer view what is stored of it: all, or those at positions that any mask drops."""
        if self.whole:
            return values.clone()
        return torch.cat([values[start:stop][self.dropped_by_any(start, stop)] for start, stop in self.pieces()])

    def flat(self) -> torch.Tensor:
        """The parameter's own memory as integers, shape (n,)."""
        return integer_view(self.parameter).view(-1)

    def pieces(self) -> Iterator[tuple[int, int]]:
        size = self.parameter.numel()
        step = PIECE if on_cpu(self.parameter) else GPU_PIECE
        return ((start, min(start + step, size)) for start in range(0, size, step))

    def bits(self, mask: str | None, start: int, stop: int) -> torch.Tensor | None:
        """Packed bits of the weights [start, stop), or None where the mask keeps them all."""
        return self.kept[mask][start // 8 : (stop + 7) // 8] if mask is not None and mask in self.kept else None

    def dropped_by_any(self, start: int, stop: int) -> torch.Tensor:
        """Positions in [start, stop), relative to start, that at least one mask drops."""
        first, *others = (packed[start // 8 : (stop + 7) // 8] for packed in self.kept.values())
        for packed in others:
            first = first & packed
        dropped = _unpack(~first, stop - start)
        if on_cpu(dropped):  # numpy's is six times faster than torch's there
            return torch.from_numpy(np.flatnonzero(dropped.numpy()))
        return dropped.nonzero().view(-1)

    @property
    def nbytes(self) -> int:
        shared = {id(t): t for t in self.dropped.values()}  # one for all masks of one base
        tensors = [*self.kept.values(), *shared.values()]
        tensors += [] if self.originals is None else [self.originals]
        return sum(t.numel() * t.element_size() for t in tensors)

    # -- noticing what others do -------------------------------------------------------------------------------------

    def moved(self) -> bool:
        """Whether the model holds another parameter here by now, or this one has other memory, dtype or shape."""
        return getattr(self.module, self.leaf, None) is not self.parameter or self._place() != self.place

    def changed(self, mask: str | None) -> bool:
        """Whether somebody else wrote to the weights since `mask` was switched on.

        Their contents are compared, not version counters: writes through `.data` (peft's merging, weight
        synchronisation, moving averages) do not count there.
        """
        state = mask if mask in self.kept else None
        known = mask is not UNKNOWN and state in self._checks
        return self.moved() or (known and self.checksum() != self._checks[state])

    def checksum(self) -> int:
        """Of all bits of the parameter."""
        if on_cpu(self.parameter):
            return xxhash.xxh3_64_intdigest(self.flat().numpy().data.cast("B")) if self.parameter.numel() else 0
        flat = self.flat()
        packed = 8 // flat.element_size()  # weights in a 64-bit word
        whole = flat.numel() % packed == 0 and flat.storage_offset() % packed == 0
        words = flat.view(torch.int64) if whole else flat
        total = torch.zeros((), dtype=torch.int64, device=flat.device)
        for start in range(0, len(words), HASHED):  # by position, so that exchanged values count; sums wrap at 2^64
            here = words[start : start + HASHED].long()
            at = torch.arange(start, start + len(here), dtype=torch.int64, device=flat.device)
            # The place decides what a word is multiplied by; the shift brings the product's upper bits, which depend on
            # all lower ones, down to where the sum keeps them apart.
            mixed = (at * 0x9E3779B97F4A7C1 + 1) * (here + 0x632BE59BD9B4E01)
            total = total * 1000003 + (mixed ^ (mixed >> 29)).sum()
        return int(total)

    def _place(self) -> tuple[int, torch.dtype, torch.device, torch.Size]:
        return self.parameter.data_ptr(), self.parameter.dtype, self.parameter.device, self.parameter.shape

    # -- writing -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def write(self, before: str | None, after: str | None) -> int:
        """Change from mask `before` to mask `after`; returns the number of weights that differ between them.

        First the stored originals go back, unless the parameter has them already, then the dropped values are written.
        """
        flat = self.flat()
        if self.originals is None:  # nothing was written yet
            self.originals = self.gather(flat)
        dropped = None if after is None else self.dropped.get(after)
        try:
            self._put(flat, self.originals, dropped, before, after)
        finally:
            _mark_written(flat)
        state = after if after in self.kept else None
        if state not in self._checks:  # the same every time: reckoned at the first
            self._checks[state] = self.checksum()
        return self._count_differing(before, after)

    def _count_differing(self, before: str | None, after: str | None) -> int:
        """Number of weights that one of two masks drops and the other keeps; counted once."""
        if (before, after) not in self._differing:
            sizes = ((self.bits(before, *piece), self.bits(after, *piece), piece) for piece in self.pieces())
            self._differing[before, after] = sum(
                _differing(old, new, stop - start) for old, new, (start, stop) in sizes
            )
        return self._differing[before, after]

    def _put(
        self,
        flat: torch.Tensor,
        originals: torch.Tensor,
        dropped: torch.Tensor | None,
        before: str | None,
        after: str | None,
    ) -> None:
        taken = 0
        for start, stop in self.pieces():
            old, new = self.bits(before, start, stop), self.bits(after, start, stop)
            piece = flat[start:stop]
            if self.whole:  # one pass, in which every weight is written
                # Where neither mask covers anything here, the piece holds its originals already.
                if before is UNKNOWN or old is not None or new is not None:
                    base = None if dropped is None else dropped[start:stop]
                    _select(piece, new, base, originals[start:stop])
            else:  # stored values stand for the weights that any mask drops, in their order
                if before is UNKNOWN or old is not None or (new is not None and dropped is not None):
                    known = self.dropped_by_any(start, stop)
                    slot = slice(taken, taken := taken + len(known))
                    values = originals[slot]
                    if new is not None and dropped is not None:
                        values = torch.where(_unpack(new, stop - start)[known], values, dropped[slot])
                    piece.scatter_(0, known, values)
                if new is not None and dropped is None:
                    _select(piece, new)

    @torch.no_grad()
    def masked(self, mask: str, dropped: torch.Tensor | None) -> torch.Tensor:
        """A new tensor: the parameter under `mask`, which may not be on. dropped: flat integers; None: 0."""
        made = self.parameter.detach().clone()
        flat = integer_view(made).view(-1)
        for start, stop in self.pieces():
            bits = self.bits(mask, start, stop)
            if bits is not None:
                _select(flat[start:stop], bits, None if dropped is None else dropped[start:stop])
        return made

    @torch.no_grad()
    def give_back(self, mask: str | None) -> bool:
        """After others changed the weights: those that `mask` drops get their originals, the rest stays as it is.

        The originals are turned into the dtype and moved to the device that the parameter has by now. mask: UNKNOWN
        gives back all that are stored. Returns False where the parameter is another one, of another size.
        """
        now = getattr(self.module, self.leaf, None)
        if not isinstance(now, torch.nn.Parameter) or now.numel() != self.parameter.numel() or now.is_meta:
            return False
        if self.originals is None or (mask is not UNKNOWN and mask not in self.kept):
            return True
        # Cast as numbers, unlike everywhere else: in another dtype the weights' bits mean nothing.
        values = self.originals.view(self.dtype).to(now.device, now.dtype)
        flat, taken = now.detach().view(-1) if now.is_contiguous() else None, 0
        if flat is None or type(now.data) is not torch.Tensor:
            return False
        for start, stop in self.pieces():
            known = self.dropped_by_any(start, stop)
            mine = values[start:stop][known] if self.whole else values[taken : taken + len(known)]
            taken += len(known)
            bits = self.bits(None if mask is UNKNOWN else mask, start, stop)
            if bits is not None:
                wanted = ~_unpack(bits, stop - start)[known]
                known, mine = known[wanted], mine[wanted.to(mine.device)]
            integer_view(flat[start:stop]).scatter_(0, known.to(flat.device), integer_view(mine))
        _mark_written(flat)
        return True


def masked_parameter(model: torch.nn.Module, name: str, shown: str) -> MaskedParameter:
    """The model's parameter of this name, if it can be changed in place. shown: its name for messages."""
    module_name, _, leaf = name.rpartition(".")
    parameter = model.get_parameter(name)
    if parameter.device.type == "meta":
        raise BadInput(f"parameter {shown!r} is offloaded; load the whole model into memory to attach masks")
    if type(parameter.data) is not torch.Tensor or not parameter.is_floating_point():
        raise BadInput(f"parameter {shown!r} is quantised or sharded; masks attach to plain floating point weights")
    if parameter.is_inference():
        raise BadInput(
            f"parameter {shown!r} was made in inference mode, which forbids changing it; load the model outside"
        )
    if not parameter.is_contiguous():
        raise BadInput(f"parameter {shown!r} is not contiguous in memory; make it so before attaching masks")
    return MaskedParameter(shown, model.get_submodule(module_name), leaf, parameter)


def on_cpu(tensor: torch.Tensor) -> bool:
    """Whether numpy sees the tensor's memory, and is faster than torch on it."""
    return tensor.device.type == "cpu"


def _mark_written(flat: torch.Tensor) -> None:
    """Some writes go past torch: this one, of nothing, counts as one, so that autograd notices them."""
    flat[:0].zero_()


def _select(
    piece: torch.Tensor,
    kept: torch.Tensor | None,
    dropped: torch.Tensor | None = None,
    originals: torch.Tensor | None = None,
) -> None:
    """What `kept` (packed) drops becomes 0 or its value in `dropped`, in place; what it keeps, first its original."""
    if not on_cpu(piece):
        assert kept is not None
        others = ~_unpack(kept, len(piece))
        if dropped is None:
            piece.masked_fill_(others, 0)
        else:
            piece.copy_(torch.where(others, dropped, piece))
        return
    kind = f"u{piece.element_size()}"
    unsigned, values, source = (None if t is None else t.numpy().view(kind) for t in (piece, dropped, originals))
    assert unsigned is not None
    if kept is not None:
        select(unsigned, kept.numpy(), values, _scratch(unsigned), source)
    elif source is not None:
        unsigned[:] = source


def _scratch(values: Integers) -> bytearray:
    """Room for the masks of so many values, this thread's own: new memory costs as much as the work."""
    needed = (len(values) + 7) // 8 * 8 * values.itemsize
    if len(getattr(_ROOM, "bytes", b"")) < needed:
        _ROOM.bytes = bytearray(needed)
    room: bytearray = _ROOM.bytes
    return room


def _differing(old: torch.Tensor | None, new: torch.Tensor | None, size: int) -> int:
    """Number of bits in which two packed masks differ; None keeps everything. Padding bits are 0 in both."""
    if old is None and new is None:
        return 0
    if old is None or new is None:
        given = new if old is None else old
        assert given is not None
        return size - _ones(given)
    return _ones(old ^ new)


def _ones(packed: torch.Tensor) -> int:
    if on_cpu(packed):
        return int(np.bitwise_count(packed.numpy()).sum(dtype=np.int64))
    return int(_unpack(packed, 8 * len(packed)).sum())


def _unpack(packed: torch.Tensor, size: int) -> torch.Tensor:
    """The first `size` bits as booleans, on the device of the bytes."""
    if on_cpu(packed):
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=size, bitorder="little")).view(torch.bool)
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(1) >> shifts & 1).view(-1)[:size].bool()

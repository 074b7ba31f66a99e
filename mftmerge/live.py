"""Mask x live model: switch masks on and off in place, exactly, without loading anything again.

A switcher keeps each mask's bits and, once, the original values of the weights. Switching
puts stored originals back and writes dropped values; it never adds or subtracts, so the model is bit for bit what it
was after any number of switches.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import torch

from mftmerge.attachment import Attachment
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.mask import Mask
from mftmerge.maskedparameter import UNKNOWN, MaskedParameter, on_cpu
from mftmerge.modelcalls import Block, ModelCalls, inside, owners
from mftmerge.rowmasks import RowMasks

R = TypeVar("R")


class Switcher:
    """Masks attached to one model, of which at most one is active. Made by `attach`.

    `switch` changes the model for everybody; `use` is for the thread or task inside its block, and for those that run
    in a copy of its context (tasks, `asyncio.to_thread`; a `Thread` through `contextvars.copy_context().run`): a
    forward pass of any other meanwhile is an error, and so are switches while the model runs.
    """

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._active: str | None = None
        self._certain = True  # False after an interrupted switch: the next one rewrites every stored weight
        self._calls = ModelCalls(self, lambda: self._certain)
        self._calls.watch(attachment.holders(self._parts))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the attached masks."""
        return self._attachment.names

    @property
    def _parts(self) -> list[MaskedParameter]:
        return list(self._attachment.parts.values())

    @property
    def active(self) -> str | None:
        """Name of the mask that is switched on, or None."""
        return self._active

    @property
    def nbytes(self) -> int:
        """Bytes kept beside the model: bits of all masks; once one was on, also the originals of the covered weights
        (on an accelerator, of those that any mask drops)."""
        return sum(part.nbytes for part in self._parts)

    def switch(self, name: str | None) -> int:
        """Make mask `name` the active one, None for the model without mask. Returns the number of weights written.

        Raises BadInput for an unknown name; MftmergeError inside `use`, while the model is running, after `detach`, and
        when the weights were changed by someone else since the masks were attached: then `detach` is the way out.
        """
        with self._exclusively(name):
            return self._switch(name)

    @contextmanager
    def use(self, name: str | None) -> Iterator[Switcher]:
        """Mask `name` for the length of a `with` block, then whatever was active before. Blocks do not nest.

        The block's end always takes the mask off, whatever ended it. Were the weights changed inside, it does as
        `detach` does and raises MftmergeError.
        """
        with self._used(name, f"mask {name!r}"):
            yield self

    @contextmanager
    def batch(self, masks: Sequence[str | None]) -> Iterator[RowMasks]:
        """Every row of a batch under its own mask, for the length of a `with` block; see `use`. For inference only.

        masks: one name a row, None for no mask. Not bit for bit what switching gives: sums are taken in another order.
        The block's value can be given other masks between two forward passes (`assign`).

        with switcher.batch(["code", "math", None]):
            model.generate(...)

        Raises BadInput for unknown names, and for models whose covered layers do not see the batch's rows.
        """
        if self._calls.compiled:
            raise BadInput("the model is compiled, which fixes its layers; give batches to the model that is not")
        rows = RowMasks(self._attachment, masks)
        with self._used(None, "a batch of masks"), rows:
            yield rows

    @contextmanager
    def _used(self, name: str | None, shown: str) -> Iterator[None]:
        with self._exclusively(name):
            before = self._active
            self._switch(name)
            block = self._calls.begin(shown)
        inside(block)
        try:
            yield
        except BaseException:
            self._end(block, before, told=True)
            raise
        self._end(block, before, told=False)

    def add(
        self,
        name: str,
        mask: Mask | str | Path,
        *,
        base: str | Path | None = None,
        on: Literal["weights", "delta"] | None = None,
    ) -> None:
        """Attach one more mask, as `attach` does. No mask may be on. Raises as `attach` and `switch`."""
        loaded = mask if isinstance(mask, Mask) else Mask.load(mask)
        with self._exclusively(None):
            self._require_bare(f"attaching {name!r}")
            if name in self.names:
                raise BadInput(f"a mask {name!r} is attached already; remove it first, or choose another name")
            self._attachment.add({name: loaded}, base, on)
            self._calls.watch(self._attachment.holders(self._parts))

    def remove(self, name: str) -> None:
        """Let go of one mask. No mask may be on. Raises as `switch`."""
        with self._exclusively(name):
            self._require_bare(f"removing {name!r}")
            self._attachment.remove(name)

    def _require_bare(self, what: str) -> None:
        if self._state is not None:
            raise MftmergeError(f"a mask is on; switch to None before {what}")
        if changed := self._changed(None, self._parts):
            raise MftmergeError(f"parameter {changed[0].name!r} was changed since masks were attached; detach first")

    def detach(self) -> None:
        """Put all originals back and let go of the model. The switcher cannot be used afterwards.

        Always possible, also after somebody else changed the weights: then those that the active mask drops get their
        values from before, all others stay as they are found, and a warning says so. Raises MftmergeError inside `use`
        and while the model runs.
        """
        with self._exclusively(None):
            said = self._release()
        if said is not None:
            warnings.warn(said, stacklevel=2)

    def _release(self) -> str | None:
        """`detach`, without asking whether it may be. Returns what there is to say, if anything."""
        state = self._state
        changed = self._changed(state, self._parts)
        lost = [p.name for p in changed if not p.give_back(state)]
        self._certain = bool(changed)  # interrupted from here on, all is written again
        self._write(state, None, [p for p in self._parts if p not in changed])
        self._active, self._certain = None, True
        self._attachment.parts.clear()
        self._calls.close()
        if lost:
            return f"parameter {lost[0]!r} was replaced since the masks were attached; it stays as it is, masked or not"
        if changed and state is not None:
            return (
                f"parameter {changed[0].name!r} was changed while a mask was on: its dropped weights have their values "
                "from before, the others stay as they are"
            )
        return None

    def _end(self, block: Block, before: str | None, *, told: bool) -> None:
        """Take a block's mask off, come what may. told: an exception is on its way that should not be replaced."""
        said = None
        with self._calls.ended(block) as interrupted:
            try:
                if self._changed(self._state, self._parts):
                    said = f"{self._release()}; the masks are detached, attach them again"
                else:
                    self._switch(before, check=False)
            except BaseException as e:  # another one, in the middle of it: `_switch` has gone back, so once more
                interrupted = e
                if not self._calls.closed:
                    self._switch(before, check=False)
        if interrupted is not None:
            raise interrupted
        if said is not None and not told:
            raise MftmergeError(said)
        if said is not None:
            warnings.warn(said, stacklevel=4)

    @contextmanager
    def _exclusively(self, name: str | None) -> Iterator[None]:
        """For the length of a switch to a mask: nobody else switches or runs the model, see `ModelCalls.kept_out`."""
        if name is not None and name not in self.names:
            raise BadInput(f"no mask {name!r} is attached; there are {', '.join(self.names)}")
        with self._calls.kept_out():
            yield

    @property
    def _state(self) -> str | None:
        """The mask whose weights the model has now; UNKNOWN where that could be any mixture."""
        return self._active if self._certain else UNKNOWN

    def _switch(self, name: str | None, check: bool = True) -> int:
        if name == self._active and self._certain:
            return 0
        before = self._state
        parts = [p for p in self._parts if before is UNKNOWN or before in p.kept or name in p.kept]
        if check and (changed := self._changed(before, parts)):
            raise MftmergeError(
                f"parameter {changed[0].name!r} was changed or moved since the masks were attached; "
                "detach before training, loading or moving a model, and attach again afterwards"
            )
        self._certain = False
        try:
            written = self._write(before, name, parts)
        except BaseException:  # not half of one mask and half of another: what was there before
            self._write(UNKNOWN, self._active, self._parts)
            self._certain = True
            raise
        self._active, self._certain = name, True
        return written

    def _changed(self, state: str | None, parts: list[MaskedParameter]) -> list[MaskedParameter]:
        """Those that somebody else has written to, moved or replaced."""
        return [p for p, found in zip(parts, _each(parts, lambda p: p.changed(state)), strict=True) if found]

    def _write(self, before: str | None, after: str | None, parts: list[MaskedParameter]) -> int:
        try:
            here = [p for p in parts if on_cpu(p.parameter)]
            written = sum(_each(here, lambda p: p.write(before, after)))
            return written + sum(p.write(before, after) for p in parts if not on_cpu(p.parameter))
        finally:
            torch.clear_autocast_cache()  # it holds the weights in the other dtype, as they were

    def __reduce__(self) -> NoReturn:
        raise MftmergeError("a switcher belongs to one model in one process; attach the masks to the copy again")


def _each(parts: list[MaskedParameter], work: Callable[[MaskedParameter], R]) -> list[R]:
    """What `work` gives for each part, on as many threads as torch has.

    A thread gets its share at once: parts are small, and handing over each of hundreds takes as long as the work.
    """
    threads = max(1, min(torch.get_num_threads(), len(parts)))
    found: list[Any] = [None] * len(parts)

    def share(first: int) -> None:
        for number in range(first, len(parts), threads):
            found[number] = work(parts[number])

    if threads == 1:
        share(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(share, range(threads)))
    return found


def attach(
    model: torch.nn.Module,
    masks: Mapping[str, Mask | str | Path],
    *,
    base: str | Path | None = None,
    on: Literal["weights", "delta"] | None = None,
) -> Switcher:
    """Attach masks to a live model; nothing changes until one is switched on.

    model: may be wrapped by torch.compile, data parallel or peft; the masks are those of the model inside.
    masks: name -> Mask or .mask file, over checkpoint names (see `naming`); a tensor that a mask does not cover keeps
    all its weights under that mask. base: checkpoint whose values dropped weights take, cast to the model's type;
    without it they become 0 or, where a mask is over a delta, take the values of the model that this mask names.
    on="weights": 0 whatever the masks say. Memory: one bit a weight and mask, and one value for each weight that any
    mask drops (one more for each base).

    with switcher.use("code"):
        model.generate(...)

    Raises BadInput when a mask does not fit the model, and for parameters that are not plain dense floating point
    tensors in memory (quantised, offloaded, sharded).
    """
    if not masks:
        raise BadInput("no masks to attach; give at least one, like attach(model, {'code': mask})")
    loaded = {label: Mask.of(m) for label, m in masks.items()}
    attachment = Attachment(model, {name for mask in loaded.values() for name in mask.names})
    attachment.add(loaded, base, on)
    ours = {id(part.parameter) for part in attachment.parts.values()}
    for other in attached(model):
        if other._state is not None and ours & {id(part.parameter) for part in other._parts}:
            raise BadInput(
                f"mask {other.active!r} of an earlier attach() is on, and would count as the model; switch it off first"
                " (`for s in mftmerge.live.attached(model): s.detach()` where that switcher is gone)"
            )
    return Switcher(attachment)


def attached(model: torch.nn.Module) -> list[Switcher]:
    """The switchers that are attached to a model or to parts of it, for those who no longer hold them."""
    return [owner for owner in owners(model) if isinstance(owner, Switcher)]

"""Mask x live model: switch masks on and off in place, exactly, without loading anything again.

A switcher keeps each mask's bits and, once, the original values of all weights that any of its masks drops. Switching
puts stored originals back and writes dropped values; it never adds or subtracts, so the model is bit for bit what it
was after any number of switches.
"""

from __future__ import annotations

import contextvars
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

from mftmerge import naming
from mftmerge.checkpoint import Checkpoint, resolve
from mftmerge.dtypes import integer_view
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.mask import Mask
from mftmerge.maskedparameter import UNKNOWN, MaskedParameter, masked_parameter, on_cpu
from mftmerge.matching import delta_base, scales_of

# The `use` blocks that this thread or task is inside of, or was started from. Each block is an object of its own.
_BLOCKS: contextvars.ContextVar[tuple[object, ...]] = contextvars.ContextVar("mftmerge_blocks", default=())


class Switcher:
    """Masks attached to one model, of which at most one is active. Made by `attach`.

    `switch` changes the model for everybody; `use` is for the thread or task inside its block, and those started from
    there: a forward pass of any other meanwhile is an error, and so are switches while the model runs.
    """

    def __init__(self, names: tuple[str, ...], parts: list[MaskedParameter], watched: list[torch.nn.Module]) -> None:
        self.names = names
        self._parts = parts
        self._active: str | None = None
        self._certain = True  # False after an interrupted switch: the next one rewrites every stored weight
        self._attached = True
        self._guard = threading.Lock()  # held only while the fields below are looked at or set
        self._switching = False
        self._block: _Block | None = None
        self._watched = watched
        self._hooks = [m.register_forward_pre_hook(_Watch(self)) for m in watched]
        # A module compiled in place (`model.compile()`) runs no hooks outside its graph.
        self._compiled = [(m, m._compiled_call_impl) for m in watched if m._compiled_call_impl is not None]
        for module, call in self._compiled:
            module._compiled_call_impl = _CompiledCall(self, call)  # type: ignore[assignment]

    @property
    def active(self) -> str | None:
        """Name of the mask that is switched on, or None."""
        return self._active

    @property
    def nbytes(self) -> int:
        """Bytes kept beside the model: bits of all masks, and the originals of the weights that any of them drops."""
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
        block = _Block(str(name), threading.get_ident())
        with self._exclusively(name):
            before = self._active
            self._switch(name)
            self._block = block
        _BLOCKS.set((*_BLOCKS.get(), block))
        try:
            yield self
        except BaseException:
            self._end(block, before, told=True)
            raise
        self._end(block, before, told=False)

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
        self._active, self._certain, self._attached, self._parts = None, True, False, []
        for hook in self._hooks:
            hook.remove()
        for module, call in self._compiled:
            module._compiled_call_impl = call
        if lost:
            return f"parameter {lost[0]!r} was replaced since the masks were attached; it stays as it is, masked or not"
        if changed and state is not None:
            return (
                f"parameter {changed[0].name!r} was changed while a mask was on: its dropped weights have their values "
                "from before, the others stay as they are"
            )
        return None

    def _end(self, block: _Block, before: str | None, *, told: bool) -> None:
        """Take a block's mask off, come what may. told: an exception is on its way that should not be replaced."""
        _BLOCKS.set(tuple(b for b in _BLOCKS.get() if b is not block))
        interrupted: BaseException | None = None
        try:
            while self._running(but=threading.get_ident()):
                time.sleep(0.002)  # a thread started inside the block: its forward pass must not see a mixture
        except BaseException as e:  # Ctrl-C while waiting: the mask goes all the same
            interrupted = e
        with self._guard:
            self._block, self._switching = None, True
        said = None
        try:
            if self._changed(self._state, self._parts):
                said = f"{self._release()}; the masks are detached, attach them again"
            else:
                self._switch(before, check=False)
        except BaseException as e:  # another one, in the middle of it: `_switch` has gone back, so once more
            interrupted = e
            if self._attached:
                self._switch(before, check=False)
        finally:
            self._switching = False
        if interrupted is not None:
            raise interrupted
        if said is not None and not told:
            raise MftmergeError(said)
        if said is not None:
            warnings.warn(said, stacklevel=4)

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
            if self._block is not None:
                raise MftmergeError(f"mask {self._block.name!r} is in use; leave its `with` block before switching")
            if self._running():
                raise MftmergeError("the model is running; switch masks when its forward pass has finished")
            self._switching = True
        try:
            yield
        finally:
            self._switching = False

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
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:  # hashing lets go of the interpreter's lock
            return [p for p, found in zip(parts, pool.map(lambda p: p.changed(state), parts), strict=True) if found]

    def _write(self, before: str | None, after: str | None, parts: list[MaskedParameter]) -> int:
        try:
            with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
                here = [p for p in parts if on_cpu(p.parameter)]
                written = sum(pool.map(lambda part: part.write(before, after), here))
            return written + sum(p.write(before, after) for p in parts if not on_cpu(p.parameter))
        finally:
            torch.clear_autocast_cache()  # it holds the weights in the other dtype, as they were

    def _running(self, but: int | None = None) -> bool:
        """Whether a thread (other than `but`) is inside a call of the model.

        Read off the threads' stacks and not counted by hooks: a forward pass that ends in a KeyboardInterrupt runs no
        hook, and would count as running for ever.
        """
        watched = {id(m) for m in self._watched} | {id(m._compiled_call_impl) for m, _ in self._compiled}
        for thread, top in sys._current_frames().items():
            frame = None if thread == but else top
            while frame is not None:
                if frame.f_code in _CALLS and id(frame.f_locals.get("self")) in watched:
                    return True
                frame = frame.f_back
        return False

    def _entering(self) -> None:
        """Called before each forward pass."""
        with self._guard:
            if self._switching:
                raise MftmergeError("the model was called while another thread switches its masks")
            if self._block is not None and self._block not in _BLOCKS.get():
                other = "thread" if self._block.thread != threading.get_ident() else "task"
                raise MftmergeError(f"the model was called while another {other} uses its mask {self._block.name!r}")
            if not self._certain:
                raise MftmergeError("switching this model's masks was interrupted; switch again, or detach")

    def __reduce__(self) -> NoReturn:
        raise MftmergeError("a switcher belongs to one model in one process; attach the masks to the copy again")


class _Block:
    """A `use` block: the mask's name, and the thread that began it."""

    def __init__(self, name: str, thread: int) -> None:
        self.name, self.thread = name, thread


class _Watch:
    """The hook on a model. A copy of the model, or a pickle, gets one that does nothing: it has its own weights."""

    def __init__(self, switcher: Switcher | None) -> None:
        self.switcher = switcher

    def __call__(self, module: torch.nn.Module, args: object) -> None:
        if self.switcher is not None and not torch.compiler.is_compiling():
            self.switcher._entering()

    def __reduce__(self) -> tuple[type[_Watch], tuple[None]]:
        return _Watch, (None,)


class _CompiledCall:
    """Stands before the compiled call of a module that was compiled in place."""

    def __init__(self, switcher: Switcher, call: Callable[..., Any]) -> None:
        self.switcher, self.call = switcher, call

    def __call__(self, *arguments: Any, **named: Any) -> Any:  # a module's arguments and result: anything
        self.switcher._entering()
        return self.call(*arguments, **named)


# The frames of a call of a module, by which a running one is known.
_CALLS = (torch.nn.Module._call_impl.__code__, _CompiledCall.__call__.__code__)


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
    loaded = {label: m if isinstance(m, Mask) else Mask.load(m) for label, m in masks.items()}
    inner = naming.model_with(model, {name for mask in loaded.values() for name in mask.names})
    actual, trainable = naming.live_names(inner), dict(inner.named_parameters())
    parts: dict[str, MaskedParameter] = {}
    for label, mask in loaded.items():
        for name, kept in naming.iter_parameters(inner, mask.names, _kept_of(mask), fill=True):
            if name not in parts:
                if actual.get(name) not in trainable:
                    raise BadInput(f"the mask covers {name!r}, which is no parameter of this model")
                parts[name] = masked_parameter(inner, actual[name], name)
            parts[name].add(label, kept)
    for part in parts.values():
        part.remember()
    bases: dict[str, list[str]] = {}  # checkpoint -> masks whose dropped weights take its values
    for label, mask in loaded.items():
        if (found := delta_base(mask, base, on, 'attach(..., base="{base}"), or on="weights" for 0')) is not None:
            bases.setdefault(str(found), []).append(label)
    for reference, labels in bases.items():
        checkpoint = Checkpoint.open(resolve(reference))
        covered = {name for label in labels for name in loaded[label].names}
        _require_scales(inner, covered, checkpoint)
        for name, values in naming.iter_parameters(inner, sorted(covered), _values_of(checkpoint), fill=0):
            part = parts[name]
            like = values.to(part.parameter.device, part.parameter.dtype).contiguous()
            part.dropped |= dict.fromkeys(labels, part.gather(integer_view(like).view(-1)))
    watched = list(dict.fromkeys([model, inner, *_containers(inner, [actual[n] for n in parts])]))
    return Switcher(tuple(loaded), list(parts.values()), watched)


def _containers(model: torch.nn.Module, names: list[str]) -> Iterator[torch.nn.Module]:
    """The modules to watch: those that hold masked parameters, from the model down to a layer of a list of layers."""
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

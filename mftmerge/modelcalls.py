"""Who is inside a model and who may be: its calls, and switches of its masks, keep out of each other's way."""

from __future__ import annotations

import contextvars
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from mftmerge.errors import MftmergeError


@dataclass(frozen=True, eq=False)
class Block:
    """A `with` block that has the model to itself: what is in use, in words, and the thread that began it."""

    name: str
    thread: int


# The blocks that this thread or task is inside of, or was started from.
_BLOCKS: contextvars.ContextVar[tuple[Block, ...]] = contextvars.ContextVar("mftmerge_blocks", default=())


class ModelCalls:
    """The calls of a model's modules, watched for one owner.

    certain: says, before each call, whether the weights are all of one mask; an interrupted switch leaves a mixture.
    """

    def __init__(self, owner: object, certain: Callable[[], bool]) -> None:
        self.owner, self._certain = owner, certain
        self.closed = False  # the owner has let go of the model
        self._guard = threading.Lock()  # held only while the fields below are looked at or set
        self._switching = False
        self._block: Block | None = None
        self._watched: list[torch.nn.Module] = []
        self._hooks: list[RemovableHandle] = []
        self._compiled: list[tuple[torch.nn.Module, Callable[..., object]]] = []

    def watch(self, modules: Iterable[torch.nn.Module]) -> None:
        """Put a watch on every module that has none yet."""
        for module in modules:
            if module in self._watched:
                continue
            self._watched.append(module)
            self._hooks.append(module.register_forward_pre_hook(_Watch(self)))
            if (call := module._compiled_call_impl) is not None:  # compiled in place: no hooks run outside its graph
                self._compiled.append((module, call))
                module._compiled_call_impl = _CompiledCall(self, call)  # typed as a method

    def close(self) -> None:
        """Take the watches away again."""
        self.closed = True
        for hook in self._hooks:
            hook.remove()
        for module, call in self._compiled:
            module._compiled_call_impl = call

    @property
    def compiled(self) -> bool:
        """Whether a watched module is compiled, in place or inside another."""
        return bool(self._compiled) or any(hasattr(m, "_orig_mod") for m in self._watched)

    @contextmanager
    def kept_out(self) -> Iterator[None]:
        """For the length of a switch: nobody else switches or runs the model. Raises MftmergeError where one does."""
        with self._guard:
            if self.closed:
                raise MftmergeError("this switcher is detached; attach the masks again")
            if self._switching:
                raise MftmergeError("another thread is switching this model's masks; switch from one thread at a time")
            if self._block is not None:
                raise MftmergeError(f"{self._block.name} is in use; leave its `with` block before switching")
            # A call that begins after this look is stopped by `entering`, which waits for the guard.
            if self._running():
                raise MftmergeError("the model is running; switch masks when its forward pass has finished")
            self._switching = True
        try:
            yield
        finally:
            self._switching = False

    def begin(self, name: str) -> Block:
        """From here on only this thread or task, and what it starts, may call the model. Inside `kept_out`."""
        self._block = Block(name, threading.get_ident())
        return self._block

    @contextmanager
    def ended(self, block: Block) -> Iterator[BaseException | None]:
        """For the length of taking a block's mask off: the block is over, its last calls too, and others are kept out.

        Gives what interrupted the waiting, if anything did.
        """
        _BLOCKS.set(tuple(b for b in _BLOCKS.get() if b is not block))
        interrupted: BaseException | None = None
        try:
            while self._running(but=threading.get_ident()):
                time.sleep(0.002)  # a thread started inside the block: its forward pass must not see a mixture
        except BaseException as e:  # Ctrl-C while waiting: the mask goes all the same
            interrupted = e
        with self._guard:
            self._block, self._switching = None, True
        try:
            yield interrupted
        finally:
            self._switching = False

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

    def entering(self) -> None:
        """Called before each forward pass. Raises MftmergeError where it may not begin now."""
        with self._guard:
            if self._switching:
                raise MftmergeError("the model was called while another thread switches its masks")
            if self._block is not None and self._block not in _BLOCKS.get():
                other = "thread" if self._block.thread != threading.get_ident() else "task"
                raise MftmergeError(
                    f"the model was called while another {other} uses its {self._block.name}; of what a block "
                    "starts, tasks and asyncio.to_thread belong to it, and a Thread with contextvars.copy_context().run"
                )
            if not self._certain():
                raise MftmergeError("switching this model's masks was interrupted; switch again, or detach")


def inside(block: Block) -> None:
    """This thread or task is in the block from here on."""
    _BLOCKS.set((*_BLOCKS.get(), block))


def owners(model: torch.nn.Module) -> list[object]:
    """The owners of the watches on a model and its parts, each once."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    found = [hook.calls.owner for hook in hooks if isinstance(hook, _Watch) and hook.calls is not None]
    return list({id(owner): owner for owner in found}.values())


class _Watch:
    """The hook on a module. A copy of the model, or a pickle, gets one that does nothing: it has its own weights."""

    def __init__(self, calls: ModelCalls | None) -> None:
        self.calls = calls

    def __call__(self, module: torch.nn.Module, args: object) -> None:
        if self.calls is not None and not torch.compiler.is_compiling():
            self.calls.entering()

    def __reduce__(self) -> tuple[type[_Watch], tuple[None]]:
        return _Watch, (None,)


class _CompiledCall:
    """Stands before the compiled call of a module that was compiled in place."""

    def __init__(self, calls: ModelCalls, call: Callable[..., object]) -> None:
        self.calls, self.call = calls, call

    def __call__(self, *arguments: object, **named: object) -> Any:  # a module's arguments and result: anything
        self.calls.entering()
        return self.call(*arguments, **named)


# The frames of a call of a module, by which a running one is known.
_CALLS = (torch.nn.Module._call_impl.__code__, _CompiledCall.__call__.__code__)

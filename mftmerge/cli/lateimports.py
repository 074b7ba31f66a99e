"""What mergekit and transformers import and a merge does not need is imported when it is first used.

mergekit imports peft for adapters, and three names of transformers for an annotation and for architectures that it has
no description of; a model's configuration imports transformers' kernels. Behind them come models and losses, torch's
compiler and its distributed tensors, scipy and sympy: half of the processor time and a third of the memory of starting
a build. While one of the modules below is executed, stand-ins take the place of what they name; afterwards nothing of
them is left in `sys.modules`, and whoever holds one gets the real thing when it is called. Only commands that merge do
this, and before they have threads: the whole process sees a stand-in.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# By the module that imports them: of mergekit 0.1.5, and of transformers 5.
LATER = {
    "transformers.integrations.hub_kernels": (
        "transformers.conversion_mapping",
        "transformers.integrations.flash_attention",
    ),
    "mergekit.common": ("peft", "transformers.modeling_utils"),
    "mergekit.architecture.conversion": ("transformers.conversion_mapping", "transformers.core_model_loading"),
    "mergekit.architecture.auto": ("transformers.modeling_utils",),
}


def postpone() -> None:
    """From now on, when mergekit is imported. What is loaded already stays as it is."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class Postponed:
    """A function or class of a module that is imported when this is called, asked for an attribute or for its kind."""

    def __init__(self, module: str, name: str) -> None:
        self.__module, self.__name = module, name

    @property
    def __real(self) -> Any:
        return getattr(importlib.import_module(self.__module), self.__name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__real(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the interpreter asks of any object
            raise AttributeError(name)
        return getattr(self.__real, name)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self.__real)


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Postponed(self.__name__, name)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in LATER:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Executing(spec.loader)
        return spec


class _Executing(Loader):
    """The module's own loader, with stand-ins while it executes the module."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:  # `inspect` asks loaders for sources
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        importlib.import_module("transformers")  # a parent is there before its modules are
        try:
            with _standing_in(LATER[module.__name__]):
                self.loader.exec_module(module)
        except Exception:  # a version that wants more of them at once than to hold them
            self.loader.exec_module(module)


@contextmanager
def _standing_in(names: Sequence[str]) -> Iterator[None]:
    transformers = sys.modules["transformers"]
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update({name: _StandIn(name) for name in absent})
    before = set(vars(transformers))
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
        for name in set(vars(transformers)) - before:  # transformers keeps what it has once given
            if isinstance(vars(transformers)[name], Postponed):
                delattr(transformers, name)

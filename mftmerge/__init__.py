"""mftmerge: learn, combine, apply and export weight masks. Names are loaded when first used."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module that holds it. Importing mftmerge imports none of them.
_PUBLIC = {
    "Mask": "mask",
    "MaskInfo": "mask",
    "Parent": "mask",
    "apply_mask": "apply",
    "attach": "live",
    "MftmergeError": "errors",
    "BadInput": "errors",
}

__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"mftmerge.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'mftmerge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

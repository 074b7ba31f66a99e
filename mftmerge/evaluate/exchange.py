"""How values travel between a program's process and its tests', standard library only.

The program (`playing`) and its tests (`judging`) are each in a jail of their own, so that the program reaches neither
the expected values nor the verdict: they are in another process's memory. The tests call the program's functions
through a socket. Plain values travel as copies (lists and dictionaries that a function changed are changed in the tests
too); functions, classes, instances and iterators stay where they are and travel as references. What comes from the
program is read as data, never as code.

A reference is never equal to a plain value and has no order with one, and what is computed from the two is a reference
that turns into no number: an object whose `__eq__`, `__sub__` or `__abs__` says what the tests want to hear passes
nothing, while `vector * 3` is one more vector.
"""

from __future__ import annotations

import builtins
import collections
import datetime
import decimal
import fractions
import importlib
import json
import pathlib
import socket
import sys
import threading
import types
import uuid
from typing import Any

LARGEST = 64 << 20  # bytes of one message
BY_TEXT = {
    **{"Decimal": decimal.Decimal, "Fraction": fractions.Fraction, "UUID": uuid.UUID},
    **{"PosixPath": pathlib.PosixPath, "PurePosixPath": pathlib.PurePosixPath},
}
VIEWS = {type({}.keys()): "keys", type({}.values()): "values", type({}.items()): "items"}
BY_ISO: dict[str, Any] = {"date": datetime.date, "datetime": datetime.datetime, "time": datetime.time}
CHANGED = (list, dict, set, bytearray)  # arguments that a function may change
# Operators of references, by the names of their methods: that compare; of one operand; that make a number; of two
# operands, as they are, reflected and in place.
COMPARED = ("eq", "lt", "le", "gt", "ge")
ALONE = ("neg", "pos", "invert")
CONVERTED = ("abs", "int", "float", "complex", "round", "trunc", "floor", "ceil")
COMPUTED = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
    *("and", "or", "xor", "lshift", "rshift"),
)


class Gone(Exception):
    """The other side closed the channel."""


class Channel:
    """Messages, one JSON document each after its length, and the values in them."""

    def __init__(self, fd: int) -> None:
        self.file = socket.socket(fileno=fd).makefile("rwb", buffering=1 << 16)
        self.mine: list[Any] = []  # what the other side has references to
        self.numbers: dict[int, int] = {}
        self.lock = threading.RLock()

    def send(self, message: list[object]) -> None:
        text = json.dumps(message).encode()
        if len(text) > LARGEST:
            raise ValueError("a value is too large to leave its process")
        try:
            self.file.write(len(text).to_bytes(8, "big") + text)
            self.file.flush()
        except OSError:
            raise Gone from None

    def receive(self) -> list[Any]:
        try:
            length = int.from_bytes(self.file.read(8), "big")
            text = self.file.read(length) if 0 < length <= LARGEST else b""
        except OSError:
            text = b""
        if not text or len(text) != length:
            raise Gone
        found = json.loads(text)
        if not isinstance(found, list):
            raise Gone
        return found

    def refer(self, value: object) -> int:
        """The number under which the other side knows a value of this one; the value lives as long as the channel."""
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.mine)
            self.mine.append(value)
        return self.numbers[id(value)]

    def encode(self, value: Any) -> Any:
        """A value as JSON: plain values by content, the rest by `reference`."""
        kind: type[object] = type(value)
        if value is None or kind in (bool, int, float, str):
            return value
        if value is Ellipsis:
            return ["..."]
        if kind in (list, tuple, set, frozenset, collections.deque):
            return [kind.__name__, [self.encode(v) for v in value]]
        if kind in (dict, collections.OrderedDict, collections.Counter, collections.defaultdict):
            return [kind.__name__, [[self.encode(k), self.encode(v)] for k, v in value.items()]]
        if kind in VIEWS:
            return [VIEWS[kind], [self.encode(v) for v in value]]
        if kind in (bytes, bytearray):
            return [kind.__name__, value.hex()]
        if kind in (complex, range, slice):
            parts = (value.real, value.imag) if kind is complex else (value.start, value.stop, value.step)
            return [kind.__name__, [self.encode(p) for p in parts]]
        if kind in BY_TEXT.values():
            return ["text", kind.__name__, str(value)]
        if kind in BY_ISO.values():
            return ["iso", kind.__name__, value.isoformat()]
        if kind is datetime.timedelta:
            return ["timedelta", [value.days, value.seconds, value.microseconds]]
        if isinstance(value, type) and vars(builtins).get(kind_name := getattr(value, "__name__", "")) is value:
            return ["builtin", kind_name]
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__]
        if type(value).__module__ == "numpy" and hasattr(value, "dtype") and value.dtype.kind in "biufc":
            return ["numpy", value.dtype.str, list(value.shape), value.tobytes().hex()]
        return self.reference(value)

    def decode(self, value: object) -> Any:
        """What `encode` of the other side meant. Makes plain values only, whatever was sent."""
        if not isinstance(value, list):
            return value
        kind, *parts = value
        if kind == "...":
            return Ellipsis
        if kind in ("list", "tuple", "set", "frozenset"):
            return getattr(builtins, kind)([self.decode(v) for v in parts[0]])
        if kind == "deque":
            return collections.deque(self.decode(v) for v in parts[0])
        if kind in ("dict", "OrderedDict", "Counter", "defaultdict"):
            pairs = {self.decode(k): self.decode(v) for k, v in parts[0]}
            if kind == "defaultdict":
                return collections.defaultdict(None, pairs)
            return pairs if kind == "dict" else getattr(collections, kind)(pairs)
        if kind in VIEWS.values():
            inside = [self.decode(v) for v in parts[0]]
            pairs = dict(
                inside if kind == "items" else enumerate(inside) if kind == "values" else ((k, k) for k in inside)
            )
            return getattr(pairs, kind)()
        if kind in ("bytes", "bytearray"):
            return getattr(builtins, kind).fromhex(parts[0])
        if kind in ("complex", "range", "slice"):
            return getattr(builtins, kind)(*(self.decode(p) for p in parts[0]))
        if kind == "text":
            return BY_TEXT[parts[0]](parts[1])
        if kind == "iso":
            return BY_ISO[parts[0]].fromisoformat(parts[1])
        if kind == "timedelta":
            return datetime.timedelta(*parts[0])
        if kind == "builtin" and isinstance(getattr(builtins, parts[0], None), type):
            return getattr(builtins, parts[0])
        if kind == "module" and parts[0].split(".")[0] in (*sys.stdlib_module_names, "numpy"):
            return importlib.import_module(parts[0])
        if kind == "numpy":
            import numpy

            flat = numpy.frombuffer(bytes.fromhex(parts[2]), numpy.dtype(parts[0]))
            return flat.reshape(parts[1]).copy() if parts[1] else flat[0]
        if kind == "back":  # the other side's reference to a value of this side
            return self.mine[parts[0]]
        return self.dereference(kind, parts)

    def reference(self, value: object) -> Any:
        raise NotImplementedError

    def dereference(self, kind: str, parts: list[object]) -> Any:
        raise TypeError(f"a value of kind {kind!r} cannot cross over")

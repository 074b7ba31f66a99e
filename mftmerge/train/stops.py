"""Signals that end a run: what must not be cut in two is finished, the rest stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(BaseException):
    """SIGINT or SIGTERM came; what can be continued is saved. number: the signal."""

    def __init__(self, number: int, step: int = 0) -> None:
        super().__init__(signal.Signals(number).name)
        self.number, self.step = number, step


class Stops:
    """SIGINT and SIGTERM between `with` and its end: `Interrupted` at once, or, inside `deferred()`, at its end.

    At once means between two instructions of Python: in the middle of a forward pass or of a validation, which may
    take minutes. A second SIGINT is Ctrl-C as everywhere. Outside of the main thread signals are left alone.
    """

    def __init__(self, wait: bool) -> None:
        self.number: int | None = None
        self._wait = wait  # several ranks must stop at the same step, or the others wait for them for ever
        self._deferred = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stops:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number
        if not self._deferred and not self._wait:
            raise Interrupted(self.number)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """What must not be cut in two: an optimiser's step, the writing of a checkpoint."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
        if self.number is not None and not self._deferred and not self._wait:
            raise Interrupted(self.number)

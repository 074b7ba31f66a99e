"""Starting the server and stopping it: after SIGTERM answers are finished and new requests are refused."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from socket import socket
from types import FrameType

import uvicorn

from mftmerge.errors import MftmergeError
from mftmerge.serve.app import create_app
from mftmerge.serve.service import Service


class _Server(uvicorn.Server):
    """uvicorn's server, which after the first signal goes on until the answers are written."""

    def __init__(self, config: uvicorn.Config, service: Service, models: str, say: Callable[[str], None]) -> None:
        super().__init__(config)
        self.service, self.models, self.say = service, models, say

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            address, port = self.servers[0].sockets[0].getsockname()[:2]
            host = f"[{address}]" if ":" in address else address
            self.say(f"http://{host}:{port}/v1 serves {self.models}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.engine.stopping:  # a second SIGTERM changes nothing (`timeout` sends two); a second Ctrl-C does
            self.should_exit = self.should_exit or sig == signal.SIGINT
            return
        self.service.engine.drain()
        threading.Thread(target=self._exit_when_idle, daemon=True).start()

    def _exit_when_idle(self) -> None:
        end = time.monotonic() + self.service.settings.drain
        # Until the last answer is written, and its client has read it.
        while not (self.service.engine.idle and not self.server_state.tasks) and time.monotonic() < end:
            time.sleep(0.02)
        self.should_exit = True


def serve(service: Service, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C; with `check` say what would be served.

    say: told the address, and what is worth knowing about the masks.
    Raises MftmergeError where the address cannot be had.
    """
    settings = service.settings
    for note in service.notes:
        say(note)
    models = ", ".join((service.name, *service.masks))
    if settings.check:
        say(f"would serve {models}")
        return
    config = uvicorn.Config(
        create_app(service),
        host=settings.host,
        port=settings.port,
        log_level="warning",
        timeout_graceful_shutdown=5,
        server_header=False,
    )
    server = _Server(config, service, models, say)
    service.engine.start()
    try:
        server.run()
    except SystemExit:
        if server.started:
            raise
        raise MftmergeError(f"cannot listen at {settings.host}:{settings.port}; choose another --port") from None
    finally:
        service.engine.close(seconds=1.0)

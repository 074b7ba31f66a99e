"""The endpoints: OpenAI's models, chat and text completions; masks added and removed; health and metrics."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from mftmerge.errors import BadInput, MftmergeError
from mftmerge.serve.answers import Answers
from mftmerge.serve.engine import Busy, Event, Job, Stopping
from mftmerge.serve.metrics import Metrics
from mftmerge.serve.requests import Asked, ChatRequest, TextRequest, asked, parse
from mftmerge.serve.service import Service

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class Refused(Exception):
    """A request that gets this status, as OpenAI words its errors."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code

    def response(self) -> JSONResponse:
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        headers |= {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        error = {"message": self.message, "type": kind, "param": None, "code": self.code}
        return JSONResponse({"error": error}, self.status, headers)


def create_app(service: Service) -> FastAPI:
    """The server's application. The engine of the service is to be started by the caller."""
    app = FastAPI(title="mftmerge", docs_url=None, redoc_url=None, openapi_url=None)
    metrics = Metrics(service.engine)
    answering = _Answering(service, metrics)
    key = service.settings.api_key or os.environ.get("MFTMERGE_API_KEY")

    def authorised(request: Request, admin: bool = False) -> None:
        if key is None:
            if admin:
                raise Refused(403, "masks are changed with a key only: start the server with --api-key", "no_api_key")
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), key.encode()):
            raise Refused(401, "this server wants its API key, as 'Authorization: Bearer KEY'", "invalid_api_key")

    async def complete(request: Request, chat: bool) -> Response:
        authorised(request)
        return await answering.answer(request, chat)

    @app.post(CHAT)
    async def chat_completions(request: Request) -> Response:
        return await complete(request, True)

    @app.post(TEXT)
    async def completions(request: Request) -> Response:
        return await complete(request, False)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        authorised(request)
        return {"object": "list", "data": [_model(name) for name in (service.name, *service.masks)]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        authorised(request)
        if name not in (service.name, *service.masks):
            raise _unknown(name)
        return _model(name)

    @app.put("/v1/masks/{name:path}")
    async def add_mask(request: Request, name: str) -> dict[str, Any]:
        """The body is the .mask file itself."""
        authorised(request, admin=True)
        with tempfile.TemporaryDirectory(prefix="mftmerge-serve-") as folder:
            file = Path(folder) / "sent.mask"
            with open(file, "wb") as f:
                async for chunk in _chunks(request, service.settings.max_mask):
                    f.write(chunk)
            try:
                notes = await asyncio.to_thread(service.add, name, file)
            except BadInput as e:
                raise Refused(400, str(e).replace(str(file), "the mask")) from None
        return {**_model(name), "notes": notes}

    @app.delete("/v1/masks/{name:path}")
    async def remove_mask(request: Request, name: str) -> dict[str, Any]:
        authorised(request, admin=True)
        try:
            await asyncio.to_thread(service.remove, name)
        except KeyError:
            raise _unknown(name) from None
        return {"id": name, "object": "model", "deleted": True}

    @app.get("/health")
    async def health() -> Response:
        engine = service.engine
        running, waiting = engine.load
        status = "broken" if engine.broken else "stopping" if engine.stopping else "ok"
        return JSONResponse({"status": status, "running": running, "waiting": waiting}, 200 if status == "ok" else 503)

    @app.get("/metrics")
    async def prometheus(request: Request) -> Response:
        authorised(request)
        return StreamingResponse(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    _say_errors(app)
    return app


def _say_errors(app: FastAPI) -> None:
    """Every error in OpenAI's form, ours in their own words."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return error.response()

    @app.exception_handler(MftmergeError)
    async def ours(request: Request, error: MftmergeError) -> Response:
        status = {Busy: 429, Stopping: 503, BadInput: 400}.get(type(error), 500)
        return Refused(status, str(error), "queue_full" if status == 429 else None).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return Refused(500, f"unexpected {type(error).__name__}").response()


class _Answering:
    """From a request to its answer, through the engine."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self.service, self.metrics = service, metrics

    async def answer(self, request: Request, chat: bool) -> Response:
        began, model = time.monotonic(), "?"
        try:
            asked = await self._asked(request, chat)
            model = asked.model
            answers = Answers(asked, self.service.tokenizer)
            events, jobs = self._submit(asked)
            seen = self._seen(events, answers, began)
            if asked.stream:
                self.metrics.requests.labels(model, 200).inc()
                return _Stream(self._pieces(seen, answers), jobs)
            response = await self._whole(request, seen, answers, jobs)
        except (Refused, MftmergeError) as e:
            status = e.status if isinstance(e, Refused) else {Busy: 429, Stopping: 503, BadInput: 400}.get(type(e), 500)
            self.metrics.requests.labels(model, status).inc()
            raise
        self.metrics.requests.labels(model, response.status_code).inc()
        return response

    async def _asked(self, request: Request, chat: bool) -> Asked:
        """The request, checked against the model and the limits."""
        service = self.service
        if service.engine.stopping:
            raise Stopping("the server is stopping; ask another one, or again later")
        parsed = parse(ChatRequest if chat else TextRequest, await _json(request, service.settings.max_body))
        try:
            service.mask_of(parsed.model)
        except KeyError:
            raise _unknown(parsed.model) from None
        found = await asyncio.to_thread(
            asked, parsed, service.tokenizer, service.settings.max_tokens, service.vocabulary
        )
        longest = max(map(len, found.prompts))
        if longest > service.settings.max_prompt:
            message = f"a prompt of {longest} tokens; this server takes {service.settings.max_prompt}"
            raise Refused(400, message, "context_length_exceeded")
        room = service.room - longest
        if chat and isinstance(parsed, ChatRequest) and not (parsed.max_tokens or parsed.max_completion_tokens):
            found = replace(found, max_tokens=min(found.max_tokens, max(room, 1)))
        if found.max_tokens > room:
            message = (
                f"{longest} tokens of prompt and {found.max_tokens} new ones; the model has {service.room} positions"
            )
            raise Refused(400, message, "context_length_exceeded")
        if len(found.prompts) * found.count > service.settings.max_queue + service.settings.max_rows:
            raise Refused(400, f"{len(found.prompts)} prompts x n={found.count}: more answers than this server queues")
        return found

    def _submit(self, asked: Asked) -> tuple[asyncio.Queue[Event], list[Job]]:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event] = asyncio.Queue()

        def emit_from(first: int) -> Callable[[Event], None]:
            def emit(event: Event) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(queue.put_nowait, replace(event, index=first + event.index))

            return emit

        mask, n = self.service.mask_of(asked.model), asked.count
        jobs = [
            Job(mask, prompt, asked.max_tokens, emit_from(i * n), asked.sampling, asked.stop, n)
            for i, prompt in enumerate(asked.prompts)
        ]
        self.service.engine.submit(jobs)
        return queue, jobs

    async def _seen(self, events: asyncio.Queue[Event], answers: Answers, began: float) -> AsyncIterator[Event]:
        """The events up to the last, counted. Raises Refused where an answer failed."""
        model, first = answers.asked.model, True
        self.metrics.read.labels(model).inc(sum(map(len, answers.asked.prompts)))
        while not answers.done:
            event = await events.get()
            if event.error is not None:
                raise Refused(500, event.error)
            if first:
                self.metrics.first.observe(time.monotonic() - began)
                first = False
            answers.take(event)
            self.metrics.written.labels(model).inc(len(event.tokens))
            yield event
        self.metrics.seconds.observe(time.monotonic() - began)

    async def _whole(
        self, request: Request, events: AsyncIterator[Event], answers: Answers, jobs: list[Job]
    ) -> Response:
        async def finish() -> None:
            async for _ in events:
                pass

        async def gone() -> None:
            while not await request.is_disconnected():
                await asyncio.sleep(0.1)

        tasks = [asyncio.create_task(finish()), asyncio.create_task(gone())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                return Response(status_code=499)  # nobody reads it
            tasks[0].result()
            return JSONResponse(answers.whole())
        finally:
            for job in jobs:
                job.cancelled = True
            for task in tasks:
                task.cancel()

    async def _pieces(self, events: AsyncIterator[Event], answers: Answers) -> AsyncIterator[str]:
        def data(value: dict[str, Any]) -> str:
            return f"data: {json.dumps(value)}\n\n"

        if answers.asked.chat:
            for index in range(answers.choices):
                yield data(answers.opening(index))
        try:
            async for event in events:
                if event.text or event.tokens or event.last:
                    yield data(answers.piece(event))
        except Refused as e:
            yield f"data: {bytes(e.response().body).decode()}\n\n"
            return
        if answers.asked.include_usage:
            yield data(answers.closing())
        yield "data: [DONE]\n\n"


class _Stream(StreamingResponse):
    """Server-sent events; however the response ends, its answers are then wanted no more."""

    def __init__(self, content: AsyncIterator[str], jobs: list[Job]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.jobs = jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for job in self.jobs:
                job.cancelled = True


async def _chunks(request: Request, most: int) -> AsyncIterator[bytes]:
    """The body, up to `most` bytes. Raises Refused beyond that."""
    length, size = request.headers.get("content-length", "0"), 0
    too_large = Refused(413, f"the body has more than the {most:,} bytes that this server takes")
    if length.isdecimal() and int(length) > most:
        raise too_large
    async for chunk in request.stream():
        size += len(chunk)
        if size > most:
            raise too_large
        yield chunk


async def _json(request: Request, most: int) -> Any:
    """The body as JSON. Its type must be said: without that a page in a browser could send it from anywhere."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the body must be JSON, with 'Content-Type: application/json'")
    body = b"".join([chunk async for chunk in _chunks(request, most)])
    try:
        return json.loads(body, parse_constant=lambda text: int(text))  # NaN and infinities are no JSON
    except (ValueError, RecursionError) as e:
        raise Refused(400, f"the body is no JSON ({str(e)[:100]})") from None


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "mftmerge"}


def _unknown(name: str) -> Refused:
    return Refused(404, f"no model {name[:100]!r} here; GET /v1/models lists them", "model_not_found")

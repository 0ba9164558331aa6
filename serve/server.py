"""An OpenAI-compatible HTTP server over an LLM: FastAPI for the routes, a Driver for the work.

Handlers run in the event loop and only wait; parsing, chat templates and tokenization run in threads, steps in
the driver's. FastAPI and uvicorn come with the extra `tokenloom[serve]` and are imported on use.
"""

from __future__ import annotations

import asyncio
import hmac
import importlib
import signal
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from .driver import Driver, Handle, Update
from .metrics import Metrics
from .openai import (
    CHAT,
    COMPLETIONS,
    Call,
    Refusal,
    dumps,
    error_object,
    error_status,
    loads,
    parse,
    served_names,
)
from .openai_answers import Chunks, response
from .outputs import RequestOutput

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

    from .llm import LLM

EXTRA = ("fastapi", "uvicorn", "prometheus_client")
DONE = b"data: [DONE]\n\n"
MAX_DRAIN = 64 << 20  # bytes of an overlong body that are read, and dropped, before the refusal is sent
RETRY_SECONDS = 1
GONE = 499  # nobody reads this status: the client left


def serve(
    llm: LLM, *, host: str = "127.0.0.1", port: int = 8000, api_key: str | None = None,
    max_body_bytes: int = 4 << 20, max_waiting: int = 256, shutdown_seconds: int = 30,
    served_model_names: Sequence[str] = (),
) -> None:  # fmt: skip
    """Serve until SIGINT or SIGTERM; requests then have `shutdown_seconds` to finish and are aborted after that."""
    uvicorn = need("uvicorn")
    app = create_app(
        llm, api_key=api_key, max_body_bytes=max_body_bytes, max_waiting=max_waiting,
        served_model_names=served_model_names,
    )  # fmt: skip
    config = uvicorn.Config(
        app, host=host, port=port, access_log=False, timeout_graceful_shutdown=shutdown_seconds, lifespan="on"
    )
    # uvicorn shuts down at a signal and then raises it again, for the handler that was there before: none here.
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = [signal.signal(number, lambda number, frame: None) for number in numbers]
    try:
        uvicorn.Server(config).run()
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def create_app(
    llm: LLM, *, api_key: str | None = None, max_body_bytes: int = 4 << 20, max_waiting: int = 256,
    served_model_names: Sequence[str] = (),
) -> FastAPI:  # fmt: skip
    """The application; its driver runs from startup to shutdown, and `llm` stays open.

    api_key: what clients send as "Authorization: Bearer ...", for everything under /v1; None: nothing. max_waiting:
    with so many generations waiting for a place in the batch, requests get 429. served_model_names: what a request's
    "model" may be; default: the name that the LLM was opened by, and its last part.
    """
    fastapi, _, _ = map(need, EXTRA)
    service = Service(llm, api_key, max_body_bytes, max_waiting, served_names(llm, served_model_names))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = fastapi.FastAPI(title="Tokenloom", lifespan=lifespan, openapi_url=None)
    for path, method, handler in (
        (COMPLETIONS, "POST", partial(service.generate, COMPLETIONS)),
        (CHAT, "POST", partial(service.generate, CHAT)),
        ("/v1/models", "GET", service.models),
        ("/v1/models/{name:path}", "GET", service.model),
        ("/health", "GET", service.health),
        ("/metrics", "GET", service.show_metrics),
    ):
        app.router.add_route(path, service.guarded(handler), methods=[method])
    return app


Handler = Callable[["Request"], Awaitable["Response"]]


class Service:
    """The handlers and what they share."""

    def __init__(
        self, llm: LLM, api_key: str | None, max_body_bytes: int, max_waiting: int, names: Sequence[str]
    ):
        self.llm, self.names = llm, names
        self.api_key, self.max_body_bytes, self.max_waiting = api_key, max_body_bytes, max_waiting
        self.started = int(time.time())

    def start(self) -> None:
        self.driver = Driver(self.llm)
        self.metrics = Metrics(self.driver)

    def stop(self) -> None:
        self.driver.stop()

    def guarded(self, handler: Handler) -> Handler:
        """The handler behind the API key; what it raises becomes OpenAI's error object."""

        async def run(request: Request) -> Response:
            try:
                if request.url.path.startswith("/v1/"):
                    self._authorize(request)
                return await handler(request)
            except Exception as error:
                status = error_status(error)
                if request.method == "POST":
                    outcome = {GONE: "cancelled"}.get(status, "refused" if status < 500 else "error")
                    self.metrics.requests.labels(outcome).inc()
                return _json({"error": error_object(error)}, status)

        return run

    # -- routes --------------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        """200 while the engine works, 503 after it failed."""
        group = self.llm.group
        failure = self.driver.failure or (None if group is None else group.lost)
        return _json(
            {"status": "ok" if failure is None else f"failed: {failure}"}, 200 if failure is None else 503
        )

    async def show_metrics(self, request: Request) -> Response:
        from fastapi import Response

        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model(name) for name in self.names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.names:
            raise Refusal(
                f"model {name!r} is not served here", status=404, code="model_not_found", param="model"
            )
        return _json(self._model(name))

    async def generate(self, url: str, request: Request) -> Response:
        """A completion or a chat completion, whole or as a stream of server-sent events."""
        from fastapi.concurrency import run_in_threadpool

        arrival = time.perf_counter()
        self._check_room()
        body = await self._body(request)
        answer = Answer(self, asyncio.get_running_loop(), arrival)
        try:
            call = await run_in_threadpool(answer.start, url, body)
            if not call.stream:
                outputs = await _unless_gone(request, answer.outputs())
                return _json(response(call, answer.name, answer.created, outputs))
            await answer.accepted()
        except BaseException:
            answer.cancel()
            raise
        return _event_stream(answer)

    # -- checks --------------------------------------------------------------------------------------------

    def _authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.api_key is not None and not hmac.compare_digest(given.encode(), self.api_key.encode()):
            raise Refusal("the API key is missing or wrong; send Authorization: Bearer <key>", status=401,
                          code="invalid_api_key")  # fmt: skip

    def _check_room(self) -> None:
        waiting = self.driver.waiting
        if waiting >= self.max_waiting:
            raise Refusal(
                f"{waiting} generations wait already (the limit is {self.max_waiting}); try again later",
                status=429, code="rate_limit_exceeded",
            )  # fmt: skip

    async def _body(self, request: Request) -> bytes:
        """The body; one that is too long is read on, within reason, so that the client hears of it."""
        from starlette.requests import ClientDisconnect

        parts, size = [], 0
        try:
            async for part in request.stream():
                size += len(part)
                if size <= self.max_body_bytes:
                    parts.append(part)
                elif size > MAX_DRAIN:
                    break
        except ClientDisconnect:
            raise _gone() from None
        if size > self.max_body_bytes:
            raise Refusal(
                f"the body is longer than {self.max_body_bytes} bytes; shorten it",
                status=413,
                code="body_too_long",
            )
        return b"".join(parts)

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name, "object": "model", "created": self.started, "owned_by": "tokenloom",
            "max_model_len": self.llm.engine.max_model_len,
        }  # fmt: skip


class Answer:
    """One request on its way through the driver: its updates arrive in a queue of the event loop."""

    def __init__(self, service: Service, loop: asyncio.AbstractEventLoop, arrival: float):
        self.service, self.arrival = service, arrival
        self.name, self.created = uuid.uuid4().hex, int(time.time())
        self.call: Call | None = None
        self._loop = loop
        self._updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._held: deque[tuple[int, Update]] = deque()
        self._handles: list[Handle] = []
        self._outputs: dict[int, RequestOutput] = {}
        self._counted = False

    def start(self, url: str, body: bytes) -> Call:
        """Translate and submit; runs in a thread."""
        service = self.service
        self.call = call = parse(url, loads(body), service.llm, service.names)
        service._check_room()
        for place, prompt in enumerate(call.prompts):
            listen = service.metrics.watch(
                self.arrival, len(prompt["prompt_token_ids"]), partial(self._arrive, place)
            )
            self._handles.append(service.driver.submit(prompt, call.params, listen))
        return call

    def _arrive(self, place: int, update: Update) -> None:
        """Hand an update to the event loop (called by the driver); only a stream wants every token."""
        assert self.call is not None
        if update.last or self.call.stream:
            self._loop.call_soon_threadsafe(self._updates.put_nowait, (place, update))

    async def _next(self) -> tuple[int, Update]:
        """The next update; what refused or broke the request is raised."""
        place, update = self._held.popleft() if self._held else await self._updates.get()
        if update.error is not None:
            raise update.error
        if update.output is not None:
            self._outputs[place] = update.output
        return place, update

    async def accepted(self) -> None:
        """Wait until the engine took every prompt."""
        held, taken = [], set()
        while len(taken) < len(self._handles):
            place, update = await self._next()
            taken.add(place)
            held.append((place, update))
        self._held.extend(held)

    async def outputs(self) -> list[RequestOutput]:
        """Wait for the results, in the order of the prompts."""
        while len(self._outputs) < len(self._handles):
            await self._next()
        outputs = [self._outputs[place] for place in range(len(self._handles))]
        if any(completion.finish_reason == "abort" for output in outputs for completion in output.outputs):
            raise Refusal("the server is shutting down; try again later", status=503, code="shutting_down")
        self._count("finished")
        return outputs

    async def events(self) -> AsyncIterator[bytes]:
        """The stream's events, as the tokens come."""
        call = self.call
        assert call is not None
        chunks = Chunks(call, self.name, self.created)
        for chunk in chunks.first():
            yield _event(chunk)
        try:
            while len(self._outputs) < len(self._handles):
                place, update = await self._next()
                for delta in update.deltas:
                    chunk = chunks.delta(place, delta)
                    if chunk is not None:
                        yield _event(chunk)
        except Exception as error:
            self._count("error")
            yield _event({"error": error_object(error)})
        else:
            self._count("finished")
            if call.include_usage:
                yield _event(chunks.usage([self._outputs[place] for place in range(len(self._handles))]))
        yield DONE

    def cancel(self) -> None:
        """Abort what still runs."""
        for handle in self._handles:
            self.service.driver.cancel(handle)

    def close(self) -> None:
        """The stream ends, perhaps because the client left."""
        self._count("cancelled")
        self.cancel()

    def _count(self, outcome: str) -> None:
        """Count the request once. A finished one counts under the finish reason of its last sample to end."""
        if self._counted:
            return
        self._counted = True
        if outcome == "finished":
            outcome = self._outputs[len(self._outputs) - 1].outputs[-1].finish_reason or "stop"
        self.service.metrics.requests.labels(outcome).inc()


async def _unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`, which is cancelled when the client disconnects."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _gone()
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


def _gone() -> Refusal:
    return Refusal("the client disconnected", status=GONE, code="client_disconnected")


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event_stream(answer: Answer) -> Response:
    """A streaming response that closes its answer however it ends, also before its first event."""
    from fastapi.responses import StreamingResponse

    class EventStream(StreamingResponse):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            try:
                await super().__call__(scope, receive, send)
            finally:
                answer.close()

    return EventStream(answer.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + dumps(value) + b"\n\n"


def _json(value: dict[str, Any], status: int = 200) -> Response:
    from fastapi import Response

    headers = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else None
    return Response(dumps(value), status, headers, media_type="application/json")


def need(name: str) -> Any:
    """A module of the extra; ValueError says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"the server needs {name}: pip install 'tokenloom[serve]'") from error

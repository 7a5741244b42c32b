"""The endpoint: requests over HTTP, their texts from the worker, errors in the API's shape.

Everything here runs on the event loop, but for tokenising, which has a thread of its own.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from zconvert.serving.answers import Answer, Usage, event
from zconvert.serving.encoding import Served, encode, unknown_model
from zconvert.serving.metrics import Metrics
from zconvert.serving.protocol import MAX_BODY, MOST_NAME, ApiError, Asked, Chat, Completion, parse
from zconvert.serving.worker import Job, Piece, Worker

_RETRY_SECONDS = 1
_CLIENT_LEFT = 499


@dataclass(frozen=True)
class Limits:
    """What the server puts up with."""

    places: int
    """texts that run or wait at a time"""
    timeout: float
    """seconds from a request to the end of its texts"""
    grace: float
    """seconds that running texts have when the server is to stop"""


@dataclass(eq=False)
class _Texts:
    """The texts of one request, as they come."""

    jobs: list[Job] = field(default_factory=list)
    prompt_tokens: int = 0
    pieces: asyncio.Queue[tuple[int, Piece]] = field(default_factory=asyncio.Queue)
    last: dict[int, Piece] = field(default_factory=dict)
    """of each job, that the client was told of"""
    status: int = 200
    """what the metrics say of the request"""

    @property
    def usage(self) -> Usage:
        told = self.last.values()
        return Usage(self.prompt_tokens, sum(piece.tokens for piece in told), sum(piece.forwards for piece in told))


class Service:
    """The endpoint's state."""

    def __init__(self, served: Served, worker: Worker, limits: Limits, api_key: str | None = None) -> None:
        """Starts nothing yet; the app's lifespan does.

        Args:
            served: the checkpoint.
            worker: with its engine, not started.
            limits: see there.
            api_key: that requests to /v1 must bear; None: none.
        """
        self._served, self._worker, self._limits = served, worker, limits
        self._api_key = None if api_key is None else api_key.encode()
        self._metrics = Metrics(lambda: worker.state)
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="zconvert-tokenizer")
        self._taken = 0  # places
        self._stopping = False
        self._started = int(time.time())

    def app(self) -> Starlette:
        """The ASGI application."""

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            self._worker.start()
            yield
            await asyncio.to_thread(self._worker.close)
            self._encoder.shutdown()

        return Starlette(
            routes=[
                Route("/v1/models", self._guarded(self._models)),
                Route("/v1/models/{name:path}", self._guarded(self._model)),
                Route("/v1/completions", self._guarded(partial(self._complete, kind=Completion)), methods=["POST"]),
                Route("/v1/chat/completions", self._guarded(partial(self._complete, kind=Chat)), methods=["POST"]),
                Route("/health", self._health),
                Route("/metrics", self._tell_metrics),
            ],
            exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _unexpected},
            lifespan=lifespan,
        )

    def stop_soon(self) -> None:
        """Takes no more requests, and ends the texts that still run after the time of grace. Called on the loop."""
        self._stopping = True
        asyncio.get_running_loop().call_later(self._limits.grace, self._worker.cancel_all)

    def _guarded(self, endpoint: Callable[..., Awaitable[Response]]) -> Callable[[HttpRequest], Awaitable[Response]]:
        """The endpoint behind the API key."""

        async def guarded(request: HttpRequest) -> Response:
            if self._api_key is not None:
                scheme, _, key = request.headers.get("authorization", "").partition(" ")
                if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode("latin-1"), self._api_key):
                    raise ApiError(
                        "the API key is missing or wrong: send it as `Authorization: Bearer KEY`",
                        status=401,
                        code="invalid_api_key",
                        headers={"WWW-Authenticate": "Bearer"},
                    )
            return await endpoint(request)

        return guarded

    async def _health(self, request: HttpRequest) -> Response:
        if self._stopping or not self._worker.state.alive:
            return JSONResponse({"status": "stopping" if self._stopping else "the engine has failed"}, 503)
        return JSONResponse({"status": "ok"})

    async def _tell_metrics(self, request: HttpRequest) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: HttpRequest) -> Response:
        if (name := request.path_params["name"]) != self._served.name:
            raise unknown_model(name, self._served)
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {"id": self._served.name, "object": "model", "created": self._started, "owned_by": "zconvert"}

    async def _complete(self, request: HttpRequest, kind: type[Asked]) -> Response:
        """Both kinds of completions, streamed or not."""
        start = time.monotonic()
        texts = _Texts()
        streaming = False
        try:
            async with asyncio.timeout(self._limits.timeout):
                asked = await self._submit(request, kind, texts)
                answer = Answer(self._served.name, kind.chat, asked.wants_usage)
                if asked.stream:
                    streaming = True
                    events = self._events(answer, texts, start)
                    return _Events(events, lambda: self._leave(request, texts, start))
                return await _while_connected(request, self._whole(answer, texts, start))
        except TimeoutError:
            texts.status = 504
            raise self._too_late() from None
        except ApiError as error:
            texts.status = error.status
            raise
        except ClientDisconnect:
            texts.status = _CLIENT_LEFT
            return Response(status_code=_CLIENT_LEFT)  # nobody reads it
        except BaseException:
            texts.status = 500
            raise
        finally:
            if not streaming:
                self._leave(request, texts, start)

    async def _submit(self, request: HttpRequest, kind: type[Asked], texts: _Texts) -> Asked:
        """Reads a request and hands its texts to the worker."""
        held = self._take(1)  # before anything is read: those that are read take memory too
        try:
            asked = parse(await _body(request), kind)
            if asked.choices > self._limits.places:
                raise ApiError(
                    f"{asked.choices} texts in one request: this server takes {self._limits.places} at a time",
                    param="n",
                    code="invalid_value",
                )
            held += self._take(asked.choices - 1)
            encoded = await asyncio.get_running_loop().run_in_executor(self._encoder, encode, asked, self._served)
            self._refuse_when_closed()  # nobody would tell how these end
            for index, (engine_request, text) in enumerate(encoded):
                job = Job(engine_request, text, self._on_piece(texts, index))
                self._worker.submit(job)
                texts.jobs.append(job)
                held -= 1  # given back with the text's last piece
        finally:
            self._taken -= held
        prompts = [job.request.prompt for job in texts.jobs[:: asked.n or 1]]
        texts.prompt_tokens = sum(map(len, prompts))
        self._metrics.prompt_tokens.inc(texts.prompt_tokens)
        return asked

    def _refuse_when_closed(self) -> None:
        if self._stopping or not self._worker.state.alive:
            what = "the server is stopping" if self._stopping else "the engine has failed"
            raise ApiError(what, status=503, code="unavailable")

    def _take(self, places: int) -> int:
        self._refuse_when_closed()
        if self._taken + places > self._limits.places:
            raise ApiError(
                f"{self._limits.places} texts run or wait already: try again later",
                status=429,
                code="queue_full",
                headers={"Retry-After": str(_RETRY_SECONDS)},
            )
        self._taken += places
        return places

    def _on_piece(self, texts: _Texts, index: int) -> Callable[[Piece], None]:
        """What the worker calls, in its own thread."""
        loop = asyncio.get_running_loop()

        def deliver(piece: Piece) -> None:
            texts.pieces.put_nowait((index, piece))
            if piece.finish is not None:
                self._taken -= 1

        def on_piece(piece: Piece) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server was stopped by force
                loop.call_soon_threadsafe(deliver, piece)

        return on_piece

    def _leave(self, request: HttpRequest, texts: _Texts, start: float) -> None:
        """The request is over, one way or another."""
        for index, job in enumerate(texts.jobs):
            if index not in texts.last or texts.last[index].finish is None:
                self._worker.cancel(job)
        self._metrics.requests.labels(request.scope["path"], str(texts.status)).inc()
        self._metrics.seconds.observe(time.monotonic() - start)

    async def _pieces(self, texts: _Texts, start: float) -> AsyncIterator[tuple[int, Piece]]:
        """What the worker tells, until all texts have ended.

        Raises:
            ApiError: the engine failed, or the server stops.
            TimeoutError: it takes too long.
        """
        ended = 0
        while ended < len(texts.jobs):
            left = start + self._limits.timeout - time.monotonic()
            index, piece = await asyncio.wait_for(texts.pieces.get(), left)
            if piece.finish in ("cancelled", "failed"):
                what = "the server is stopping" if piece.finish == "cancelled" else "the engine failed"
                status = 503 if piece.finish == "cancelled" else 500
                raise ApiError(what, status=status, code=f"text_{piece.finish}")
            if not texts.last:
                self._metrics.first_text_seconds.observe(time.monotonic() - start)
            texts.last[index] = piece
            ended += piece.finish is not None
            yield index, piece

    async def _whole(self, answer: Answer, texts: _Texts, start: float) -> Response:
        written = [""] * len(texts.jobs)
        async for index, piece in self._pieces(texts, start):
            written[index] += piece.text
        ends = [str(texts.last[index].finish) for index in range(len(written))]
        return JSONResponse(answer.whole(list(zip(written, ends, strict=True)), texts.usage))

    async def _events(self, answer: Answer, texts: _Texts, start: float) -> AsyncIterator[bytes]:
        """The events of a stream. Its status is sent by now, so that an error is an event too."""
        texts.status = _CLIENT_LEFT  # unless it comes to its end
        error = None
        try:
            for index in range(len(texts.jobs) if answer.chat else 0):
                yield answer.opening(index)
            async for index, piece in self._pieces(texts, start):
                if piece.text:
                    yield answer.piece(index, piece.text)
                if piece.finish is not None:
                    yield answer.closing(index, piece.finish)
        except ApiError as raised:
            error = raised
        except TimeoutError:
            error = self._too_late()
        if error is None:
            yield answer.end(texts.usage)
        else:
            yield event(error.body)
        texts.status = 200 if error is None else error.status

    def _too_late(self) -> ApiError:
        # Those who ask again at once would only add to what made it late.
        return ApiError(
            f"the texts were not done within {self._limits.timeout:g} seconds",
            status=504,
            code="timeout",
            headers={"x-should-retry": "false"},
        )


class _Events(StreamingResponse):
    """A stream of events that tells when it is over, also where the client left."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


async def _body(request: HttpRequest) -> bytes:
    """A request's body, of bounded size."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # Not a formality: a web page may send forms to this machine unasked, but no JSON.
        raise ApiError("the body must be JSON: send `Content-Type: application/json`", status=415)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY:
            raise ApiError(f"the body has more than {MAX_BODY} bytes", status=413, headers={"Connection": "close"})
        parts.append(part)
    return b"".join(parts)


async def _while_connected(request: HttpRequest, work: Awaitable[Response]) -> Response:
    """Waits for an answer as long as somebody waits for it.

    Raises:
        ClientDisconnect: nobody does.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        answer.cancel()
        gone.cancel()


async def _api_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, headers=error.headers)


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.scope['path'][:MOST_NAME]}: {error.detail}"
    return JSONResponse(ApiError(what, status=error.status_code).body, error.status_code, headers=error.headers)


async def _unexpected(request: HttpRequest, error: Exception) -> Response:
    return JSONResponse(ApiError("something went wrong on the server", status=500).body, 500)

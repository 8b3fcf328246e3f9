"""HTTP interface of an engine: OpenAI's chat completions and completions, health, metrics and a page."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import hmac
import io
import json
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import anyio
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..model.image import decode_image
from ..model.lm import MambaLM
from ..model.prompt import PromptTemplate
from ..model.tokenizer import require_tokenizer
from ..model.vlm import VLM
from . import engine as engines
from .config import ServeConfig
from .metrics import Metrics
from .page import PAGE, PAGE_HEADERS
from .prompts import Prompt, chat_prompt, text_prompt
from .protocol import ApiError, Call, Conversation, Texts, parse_chat, parse_completion, parse_json
from .responses import ChatForm, CompletionForm, Form

logger = logging.getLogger(__name__)

STREAM_SECONDS = 0.05
"""Interval at which the text of streams is sent, of all at the same times. First text and end never wait."""


CHARACTERS_PER_TOKEN = 16
"""Characters of a prompt for each token that it may have. A tokenizer takes some 0.7 s of processor time for a million
characters, and Python runs nothing else meanwhile. Texts have 4 or 5 a token."""


class Interface(NamedTuple):
    """One of OpenAI's interfaces to the engine."""

    parse: Callable[[dict[str, Any], ServeConfig], Call]
    form: type[Form]
    field: str
    """Name of the field that has the question."""


INTERFACES = {
    "/v1/chat/completions": Interface(parse_chat, ChatForm, "messages"),
    "/v1/completions": Interface(parse_completion, CompletionForm, "prompt"),
}
"""By path."""


class Service:
    """A model, its engine, and everything that handlers share.

    Args:
        model: with a tokenizer, in evaluation mode.
        name: of the model, which clients give.
        config: sizes and limits.
        keys: API keys that are accepted; without any, everyone is.
        template: of conversations with a language model; a VLM has its own.
    """

    def __init__(
        self,
        model: VLM | MambaLM,
        name: str,
        config: ServeConfig,
        keys: Sequence[str] = (),
        template: PromptTemplate | None = None,
    ):
        self.model, self.name, self.config = model, name, config
        self.tokenizer = require_tokenizer(model)
        self.template = model.template if isinstance(model, VLM) else template
        self.keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self.engine = engines.Engine(model, config, self._deliver)
        self.metrics = Metrics(self.engine)
        self.draining = False
        """Whether new requests are refused because the server is about to stop."""
        self.n_calls = 0
        """Calls that are being answered."""
        self.body_bytes = 0
        """Size of the bodies that are being read."""
        self.started = int(time.time())
        self._loop: asyncio.AbstractEventLoop | None = None
        self._answers: dict[engines.Request, Answers] = {}
        self._due: deque[Answers] = deque()
        """Calls whose handlers are to be woken."""
        self._is_waking = False
        """Whether the loop was told, and has not looked yet."""
        self._preparing = ThreadPoolExecutor(2, thread_name_prefix="prepare")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the engine for the duration of a block."""
        self._loop = asyncio.get_running_loop()
        self.engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.engine.stop)
            self._preparing.shutdown(wait=False)

    @property
    def is_busy(self) -> bool:
        """Whether a call is being read or answered."""
        return bool(self.n_calls or self._answers)

    def _deliver(self, events: list[tuple[engines.Request, engines.Event]]) -> None:
        """Hand events from the engine's thread to the handlers, at most at one call of the loop a step."""
        now = time.perf_counter()
        for request, event in events:
            answers = self._answers.get(request)
            if answers is not None and answers.put(request, event, now):
                self._due.append(answers)
        if self._loop is None or not self._due or self._is_waking:
            return
        self._is_waking = True
        # The loop is closed where the process ends before the engine.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        # First, so that what comes while the rest is woken is a call of its own.
        self._is_waking = False
        while self._due:
            self._due.popleft().wake.set()

    def user(self, authorization: str | None) -> bytes:
        """Check an API key, in a time that does not depend on it. Return the secret that salts the user's states.

        Raises:
            ApiError: the key is missing or not known.
        """
        if not self.keys:
            return b""
        scheme, _, key = (authorization or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # All keys are compared, whichever matches.
        known = [hmac.compare_digest(digest, other) for other in self.keys]
        if scheme.lower() != "bearer" or not any(known):
            message = "the header Authorization must be: Bearer, and an API key that this server knows"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return digest

    def submit(self, requests: list[engines.Request], stream: bool) -> Answers:
        """Start requests.

        Args:
            requests: of one call.
            stream: see `Answers`.

        Raises:
            ApiError: too many wait, or the server is stopping.
        """
        answers = Answers(self, requests, stream)
        self._answers.update(dict.fromkeys(requests, answers))
        try:
            self.engine.submit(*requests)
        except BaseException as e:
            answers.close()
            if isinstance(e, engines.Busy):
                raise busy() from e
            if isinstance(e, engines.Stopping):
                raise stopping() from e
            raise
        return answers

    def forget(self, requests: Sequence[engines.Request]) -> None:
        """Drop the events of requests from now on."""
        for request in requests:
            self._answers.pop(request, None)

    async def prepare(self, interface: Interface, body: bytes, salt: bytes) -> tuple[Call, list[Prompt]]:
        """Read a body, tokenize its texts and decode its images, in a thread.

        Raises:
            ApiError: it is not a call of the interface, an image cannot be read, or a prompt is too long or does not
                fit the model.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._preparing, self._prepare, interface, body, salt)

    def _prepare(self, interface: Interface, body: bytes, salt: bytes) -> tuple[Call, list[Prompt]]:
        fields = parse_json(body)
        _check_model(self, fields.get("model"))
        call = interface.parse(fields, self.config)
        self._check_length(call.question, interface.field)
        try:
            prompts = self._prompts(call.question, salt)
        except (ValueError, TypeError) as e:
            raise ApiError(400, str(e), interface.field) from e
        longest = max(len(p.ids) for p in prompts)
        if longest > self.config.max_prompt_tokens:
            message = f"the prompt has {longest} tokens, where {self.config.max_prompt_tokens} are the most"
            raise ApiError(400, message, interface.field, "context_length_exceeded")
        return call, prompts

    def _check_length(self, question: Conversation | Texts, field: str) -> None:
        """Refuse a text that is too long for its tokens to be counted, which would hold up every other request."""
        most = CHARACTERS_PER_TOKEN * self.config.max_prompt_tokens
        if isinstance(question, Conversation):
            length = sum(len(turn.text) for turn in question.turns)
        else:
            length = max(len(text) for text in question)
        if length > most:
            message = f"the prompt has {length:,} characters, where {most:,} are the most"
            raise ApiError(400, message, field, "context_length_exceeded")

    def _prompts(self, question: Conversation | Texts, salt: bytes) -> list[Prompt]:
        if not isinstance(question, Conversation):
            return [text_prompt(self.model, text, salt) for text in question]
        if self.template is None:
            raise ValueError("the model has no template of conversations: use /v1/completions")
        if len(question.turns) > 1 and not self.template.has_turns:
            raise ValueError("the model's template has a single question and no further turns")
        images = [decode_image(io.BytesIO(data), f"image {i}") for i, data in enumerate(question.images)]
        return [chat_prompt(self.model, self.template, question.turns, images, salt)]


class Answers:
    """Events of the requests of one call, from the engine's thread to the call's handler.

    An asynchronous iterator of lists of (index, event), until all requests are finished or the client is gone.

    Args:
        service: runs the requests.
        requests: of the call.
        stream: pass events on while the requests run; else all of a request at its end.
    """

    def __init__(self, service: Service, requests: list[engines.Request], stream: bool):
        self.service, self.requests = service, requests
        self.indices = {request: i for i, request in enumerate(requests)}
        self.arrived: deque[tuple[int, engines.Event]] = deque()
        self.due = [-math.inf if stream else math.inf] * len(requests)
        """Time from which the next event of each request is passed on. The engine's thread alone uses it."""
        self.wake = asyncio.Event()
        self.open = set(range(len(requests)))
        self.is_gone = False
        """Whether the client left."""
        self.started = time.perf_counter()
        self.has_text = False

    def put(self, request: engines.Request, event: engines.Event, now: float) -> bool:
        """Add an event, in the engine's thread. Return whether the handler is to be woken."""
        index = self.indices[request]
        self.arrived.append((index, event))
        if not self.has_text and not event.error:
            self.has_text = True
            self.service.metrics.first_token.observe(now - self.started)
        if event.finish is not None:
            self.service.metrics.duration.observe(now - self.started)
            return True
        # Text may be withheld until a stop string is decided, or a character complete.
        if now < self.due[index] or not (event.text or event.logprobs):
            return False
        # All streams have the same times, so that the loop is woken once for them.
        self.due[index] = (now // STREAM_SECONDS + 1) * STREAM_SECONDS
        return True

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, engines.Event]]]:
        while self.open:
            await self.wake.wait()
            self.wake.clear()
            if self.is_gone:
                return
            arrived: dict[int, list[engines.Event]] = {}
            while self.arrived:
                index, event = self.arrived.popleft()
                arrived.setdefault(index, []).append(event)
            joined = [(index, engines.join_events(events)) for index, events in arrived.items()]
            self.open.difference_update(index for index, event in joined if event.finish is not None)
            yield joined

    async def watch(self, receive: Receive) -> None:
        """Wait until the client leaves, and end the iteration then."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.is_gone = True
        self.wake.set()

    def close(self) -> None:
        """Cancel what is not finished."""
        for index in self.open:
            self.service.engine.cancel(self.requests[index])
        self.service.forget(self.requests)


class EventStream(Response):
    """Server-sent events of a call. It ends early when the client leaves, or does not read in time.

    Args:
        answers: events of the call.
        form: of the chunks.
    """

    media_type = "text/event-stream"

    def __init__(self, answers: Answers, form: Form):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.answers, self.form = answers, form
        self.sending_since = math.inf
        """Time at which the part that is being sent was begun."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        async with _watched(self.answers, receive):
            # The server waits in `send` while the client's buffers are full.
            with anyio.CancelScope() as patience:
                timer = asyncio.create_task(self._limit(patience))
                try:
                    await self._send_all(send)
                finally:
                    timer.cancel()
            if patience.cancelled_caught:
                logger.warning("a client did not read its answer in time and was left")

    async def _limit(self, patience: anyio.CancelScope) -> None:
        """Cancel where a part takes too long. One timer serves all parts: most of them take no time at all."""
        seconds = self.answers.service.config.client_seconds
        left = seconds
        while left > 0:
            await asyncio.sleep(left)
            left = seconds - max(time.monotonic() - self.sending_since, 0)
        patience.cancel()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for chunks, more in self._chunks():
            # What came together is sent together.
            body = b"".join([b"data: %s\n\n" % chunk for chunk in chunks])
            self.sending_since = time.monotonic()
            await send({"type": "http.response.body", "body": body, "more_body": more})
            self.sending_since = math.inf

    async def _chunks(self) -> AsyncIterator[tuple[list[bytes], bool]]:
        """Yield chunks of the body, and whether others follow."""
        chunks = self.form.opening(len(self.answers.requests))
        async for events in self.answers:
            for index, event in events:
                if event.error:
                    error = json.dumps(ApiError(500, event.error).body()).encode()
                    yield [*chunks, error, b"[DONE]"], False
                    return
                if event.text or event.logprobs or event.finish:
                    chunks.append(self.form.chunk(index, event))
            if not self.answers.open:
                if self.form.include_usage:
                    chunks.append(self.form.usage_chunk(self.answers.requests))
                yield [*chunks, b"[DONE]"], False
            elif chunks:
                yield chunks, True
            chunks = []


@contextlib.asynccontextmanager
async def _watched(answers: Answers, receive: Receive) -> AsyncIterator[None]:
    """Watch whether the client leaves for the duration of a block, and cancel at its end what is not finished."""
    watching = asyncio.create_task(answers.watch(receive))
    try:
        yield
    finally:
        watching.cancel()
        answers.close()


def busy() -> ApiError:
    """Return the error of a server that has as many requests as it takes."""
    return ApiError(429, "too many requests wait; try again later", code="server_busy", headers={"Retry-After": "1"})


def stopping() -> ApiError:
    """Return the error of a server that is about to stop."""
    return ApiError(503, "the server is stopping", code="server_stopping", headers={"Retry-After": "10"})


def create_app(service: Service) -> FastAPI:
    """Build the application.

    Args:
        service: the model with its engine, which runs while the application does.

    Returns:
        an ASGI application.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    # FastAPI's pages of documentation load scripts from another site.
    app = FastAPI(title="vlmamba", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return _json(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        found = f"there is no {request.method} {request.url.path} here"
        message = found if error.status_code in (404, 405) else str(error.detail)
        return _json(ApiError(error.status_code, message).body(), error.status_code, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def on_error(request: Request, error: Exception) -> Response:
        return _json(ApiError(500, "internal error; the server's log has it").body(), 500)

    app.add_middleware(_CountResponses, service=service)

    @app.get("/")
    async def page() -> Response:
        return Response(PAGE, media_type="text/html", headers=PAGE_HEADERS)

    @app.get("/health")
    async def health() -> Response:
        if service.draining:
            return _json({"status": "stopping"}, 503)
        return _json({"status": "ok", "model": service.name})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def card() -> dict[str, Any]:
        config = service.config
        return {
            "id": service.name,
            "object": "model",
            "created": service.started,
            "owned_by": "vlmamba",
            "images": config.max_images if isinstance(service.model, VLM) else 0,
            "chat": service.template is not None,
            "max_prompt_tokens": config.max_prompt_tokens,
            "max_new_tokens": config.max_new_tokens,
        }

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        service.user(request.headers.get("authorization"))
        return _json({"object": "list", "data": [card()]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        service.user(request.headers.get("authorization"))
        _check_model(service, name)
        return _json(card())

    # Plain routes: `protocol` checks the bodies, and nothing is left for FastAPI to do.
    for path, interface in INTERFACES.items():
        app.add_route(path, functools.partial(_answer, service, interface), methods=["POST"])
    return app


class _CountResponses:
    """Middleware that counts responses by path and status."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Unknown paths count as one: else a client could fill the memory with them.
                other = scope["path"] if scope["path"] in INTERFACES else "other"
                path = getattr(scope.get("route"), "path", other)
                self.service.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        await self.app(scope, receive, counted)


async def _answer(service: Service, interface: Interface, request: Request) -> Response:
    """Check a call, run it, and answer it at once or as a stream."""
    salt = service.user(request.headers.get("authorization"))
    if service.draining:
        raise stopping()
    # Before the body is read: what waits here has it in memory.
    if service.n_calls >= service.config.slots + service.config.max_waiting:
        raise busy()
    service.n_calls += 1
    try:
        call, prompts = await service.prepare(interface, await _read_body(service, request), salt)
        requests = [engines.Request(p, call.sampling, call.logprobs, call.ignore_eos) for p in prompts]
        form = interface.form(service.name, service.tokenizer, call.logprobs is not None, call.include_usage)
        answers = service.submit(requests, call.stream)
    except ClientDisconnect:
        return GONE
    finally:
        service.n_calls -= 1
    if call.stream:
        return EventStream(answers, form)
    whole: list[list[engines.Event]] = [[] for _ in requests]
    async with _watched(answers, request.receive):
        async for events in answers:
            for index, event in events:
                if event.error:
                    raise ApiError(500, event.error)
                whole[index].append(event)
    if answers.is_gone:
        return GONE
    return _json(form.whole([engines.join_events(events) for events in whole], requests))


GONE = Response(status_code=499)
"""Answer that nobody reads: the client left."""


async def _read_body(service: Service, request: Request) -> bytes:
    """Read a body, at most as many bytes as a body may have, in bounded time and memory.

    Raises:
        ApiError: it is too large, too slow, or not JSON by its header.
    """
    limit = int(service.config.max_body_mb * 2**20)
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    # A page of another site may send a form or plain text here without asking, but no JSON.
    if kind != "application/json":
        raise ApiError(415, f"the header Content-Type must be application/json, got {kind!r}")
    # The rest of such a body is not read: the connection cannot be used again.
    close = {"Connection": "close"}
    too_large = ApiError(413, f"the body may have at most {limit:,} bytes", None, "request_too_large", close)
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        raise too_large
    data = bytearray()
    try:
        with anyio.fail_after(service.config.client_seconds):
            async for part in request.stream():
                data += part
                service.body_bytes += len(part)
                if len(data) > limit:
                    raise too_large
                if service.body_bytes > MAX_BODIES * limit:
                    raise busy()
    except TimeoutError:
        message = f"the body did not come within {service.config.client_seconds:g} seconds"
        raise ApiError(408, message, None, "request_timeout", close) from None
    finally:
        service.body_bytes -= len(data)
    return bytes(data)


MAX_BODIES = 8
"""Bodies of the largest size that may be read at the same time."""


def _check_model(service: Service, name: Any) -> None:
    if name is not None and name != service.name:
        message = f"there is no model {str(name)[:100]!r} here; the model is {service.name!r}"
        raise ApiError(404, message, "model", "model_not_found")


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # In ASCII: a text that a client sent, and an error repeats, may have halves of surrogate pairs.
    return Response(json.dumps(content, allow_nan=False), status, headers, media_type="application/json")

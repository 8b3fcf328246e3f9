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
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import anyio
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
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
from .protocol import ApiError, Call, parse_chat, parse_completion, parse_json
from .responses import Answer, ChatForm, CompletionForm

logger = logging.getLogger(__name__)

Form = ChatForm | CompletionForm


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
        self._preparing = anyio.CapacityLimiter(2)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the engine for the duration of a block."""
        await asyncio.to_thread(self.engine.warm_up)
        self._loop = asyncio.get_running_loop()
        self.engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.engine.stop)

    @property
    def is_busy(self) -> bool:
        """Whether a call is being read or answered."""
        return bool(self.n_calls or self._answers)

    def _deliver(self, events: list[tuple[engines.Request, engines.Event]]) -> None:
        """Hand events from the engine's thread to the handlers, at one call a step."""
        # The loop is closed where the process ends before the engine.
        with contextlib.suppress(RuntimeError):
            if self._loop is not None and events:
                self._loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: list[tuple[engines.Request, engines.Event]]) -> None:
        for request, event in events:
            answers = self._answers.get(request)
            if answers is not None:
                answers.queue.put_nowait((answers.requests.index(request), event))

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

    def submit(self, requests: list[engines.Request]) -> Answers:
        """Start requests.

        Raises:
            ApiError: too many wait, or the server is stopping.
        """
        answers = Answers(self, requests)
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

    async def prompts(self, call: Call, salt: bytes) -> list[Prompt]:
        """Tokenize a call and read its images, in a thread.

        Raises:
            ApiError: an image cannot be read, or a prompt is too long or does not fit the model.
        """
        make = self._chat_prompts if call.turns else self._text_prompts
        try:
            prompts = await anyio.to_thread.run_sync(functools.partial(make, call, salt), limiter=self._preparing)
        except (ValueError, TypeError) as e:
            raise ApiError(400, str(e), "messages" if call.turns else "prompt") from e
        longest = max(len(p.ids) for p in prompts)
        if longest > self.config.max_prompt_tokens:
            message = f"the prompt has {longest} tokens, where {self.config.max_prompt_tokens} are the most"
            raise ApiError(400, message, "messages" if call.turns else "prompt", "context_length_exceeded")
        return prompts

    def _chat_prompts(self, call: Call, salt: bytes) -> list[Prompt]:
        if self.template is None:
            raise ValueError("the model has no template of conversations: use /v1/completions")
        if len(call.turns) > 1 and not self.template.has_turns:
            raise ValueError("the model's template has a single question and no further turns")
        images = [
            (decode_image(io.BytesIO(data), f"image {i}"), hashlib.sha256(data).digest())
            for i, data in enumerate(call.images)
        ]
        return [chat_prompt(self.model, self.template, call.turns, images, salt)]

    def _text_prompts(self, call: Call, salt: bytes) -> list[Prompt]:
        return [text_prompt(self.model, text, salt) for text in call.prompts]


class Answers:
    """Events of the requests of one call; an asynchronous iterator of (index, event) until all are finished."""

    def __init__(self, service: Service, requests: list[engines.Request]):
        self.service, self.requests = service, requests
        self.queue: asyncio.Queue[tuple[int, engines.Event]] = asyncio.Queue()
        self.open = set(range(len(requests)))
        self.started = time.perf_counter()

    async def __aiter__(self) -> AsyncIterator[tuple[int, engines.Event]]:
        first = True
        while self.open:
            index, event = await self.queue.get()
            # A handler that fell behind gets several events as one.
            while event.finish is None and len(self.requests) == 1 and not self.queue.empty():
                event = event.followed_by(self.queue.get_nowait()[1])
            seconds = time.perf_counter() - self.started
            if first and not event.error:
                self.service.metrics.first_token.observe(seconds)
                first = False
            if event.finish is not None:
                self.open.discard(index)
                self.service.metrics.duration.observe(seconds)
            yield index, event

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
        include_usage: whether the last chunk has the numbers of tokens.
    """

    media_type = "text/event-stream"

    def __init__(self, answers: Answers, form: Form, include_usage: bool):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.answers, self.form, self.include_usage = answers, form, include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await unless_gone(receive, self._send_all(send))
        except TimeoutError:
            logger.warning("a client did not read its answer in time and was left")
            raise
        finally:
            self.answers.close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for data in self._chunks():
            # The server waits here while the client's buffers are full.
            with anyio.fail_after(self.answers.service.config.client_seconds):
                await send({"type": "http.response.body", "body": b"data: %s\n\n" % data, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _chunks(self) -> AsyncIterator[bytes]:
        for index in range(len(self.answers.requests)):
            if (chunk := self.form.first(index)) is not None:
                yield json.dumps(chunk).encode()
        async for index, event in self.answers:
            if event.error:
                yield json.dumps(ApiError(500, event.error).body()).encode()
                break
            # Text may be withheld until a stop string is decided, or a character complete.
            if event.text or event.logprobs or event.finish:
                yield json.dumps(self.form.chunk(index, event)).encode()
        else:
            if self.include_usage:
                yield json.dumps(self.form.usage_chunk(self.answers.requests)).encode()
        yield b"[DONE]"


async def unless_gone(receive: Receive, work: Any) -> Any:
    """Run a coroutine to its end, or cancel it when the client disconnects. Return its result, or None."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


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

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(service, request, parse_chat, ChatForm)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await _answer(service, request, parse_completion, CompletionForm)

    return app


class _CountResponses:
    """Middleware that counts responses by path and status."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Unknown paths count as one: else a client could fill the memory with them.
                path = getattr(scope.get("route"), "path", "other")
                self.service.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        await self.app(scope, receive, counted)


async def _answer(
    service: Service, request: Request, parse: Callable[[dict[str, Any], ServeConfig], Call], form_class: type[Form]
) -> Response:
    """Check a call, run it, and answer it at once or as a stream."""
    salt = service.user(request.headers.get("authorization"))
    if service.draining:
        raise stopping()
    # Before the body is read: what waits here has it in memory.
    if service.n_calls >= service.config.slots + service.config.max_waiting:
        raise busy()
    service.n_calls += 1
    try:
        body = parse_json(await _read_body(service, request))
        _check_model(service, body.get("model"))
        call = parse(body, service.config)
        del body  # an image is many bytes
        prompts = await service.prompts(call, salt)
        requests = [engines.Request(p, call.sampling, call.logprobs, call.ignore_eos) for p in prompts]
        form = form_class(service.name, service.tokenizer, call.logprobs is not None)
        answers = service.submit(requests)
    finally:
        service.n_calls -= 1
    if call.stream:
        return EventStream(answers, form, call.include_usage)
    try:
        whole = await unless_gone(request.receive, _collect(answers))
    finally:
        answers.close()
    # Nobody reads what a client that left would get.
    return Response(status_code=499) if whole is None else _json(form.whole(whole, requests))


async def _collect(answers: Answers) -> list[Answer]:
    """Wait for the answers of a call.

    Raises:
        ApiError: one of them ended with an error.
    """
    whole = [Answer() for _ in answers.requests]
    async for index, event in answers:
        if event.error:
            raise ApiError(500, event.error)
        whole[index].add(event)
    return whole


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
    return JSONResponse(content, status, headers)

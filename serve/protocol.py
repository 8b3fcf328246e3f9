"""Requests of OpenAI's HTTP interface, checked field by field. Imports no web framework.

A field that is not known, or known but not offered, is an error that names it: it is never ignored, since the answer
would be another one than the client asked for.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..model.generation.config import GenerationConfig
from ..model.prompt import IMAGE_MARK, Turn
from .config import ServeConfig
from .engine import MAX_LOGPROBS

DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
"""Characters of a stop string. Every token is compared with all of them."""
MAX_MESSAGE = 1000
"""Characters of an error's message, of which its middle is left out beyond."""
MAX_PARAM = 200
MAX_PROMPTS = 64
"""Prompts of one call of the completions interface."""

NO_EFFECT = {"user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier"}
"""Fields that do not change an answer."""
ONLY = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "store": (False,),
}
"""Fields of which only these values, and null, are offered."""


class ApiError(Exception):
    """An error that a client is told of.

    Args:
        status: HTTP status.
        message: explanation for the client's developer.
        param: name of the field.
        code: OpenAI's code for the kind of error.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        # An error may repeat what a client sent, which may be as long as a body.
        message = _shortened(message, MAX_MESSAGE)
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.param = None if param is None else _shortened(param, MAX_PARAM)
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the error in OpenAI's form."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _shortened(text: str, most: int) -> str:
    """Leave out the middle of a text of more than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[len(text) - most // 2 :]}"


@dataclass(frozen=True)
class Conversation:
    """Question of a call to the chat interface."""

    turns: list[Turn]
    """With marks at the places of images."""
    images: list[bytes]
    """Image files, in the order of their marks."""


Texts = list[str | list[int]]
"""Question of a call to the completions interface: texts or tokens to continue."""


@dataclass(frozen=True)
class Call:
    """One call of either interface."""

    question: Conversation | Texts
    sampling: GenerationConfig
    logprobs: int | None
    """Number of alternatives of each token; None for no log-probabilities."""
    ignore_eos: bool
    stream: bool
    include_usage: bool
    """Whether a stream ends with the numbers of tokens."""


def parse_json(data: bytes) -> dict[str, Any]:
    """Read a request's body.

    Raises:
        ApiError: it is not a JSON object.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        body = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as e:
        raise ApiError(400, f"the body is not valid JSON: {e}", code="invalid_json") from e
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object, got {_kind(body)}", code="invalid_json")
    return body


def parse_chat(body: dict[str, Any], config: ServeConfig) -> Call:
    """Check a call of `/v1/chat/completions`.

    Args:
        body: the JSON object.
        config: limits.

    Raises:
        ApiError: a field is unknown, not offered, or out of its range.
    """

    def take(fields: _Fields) -> _OwnFields:
        question = _conversation(fields.take("messages", list, None), config)
        wants = fields.take("logprobs", bool, False)
        n = fields.take("top_logprobs", int, 0)
        if n and not wants:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        name = "max_completion_tokens"
        new_tokens = _new_tokens(fields.take(name, int, config.max_new_tokens), name, config)
        return _OwnFields(question, _logprobs(n, "top_logprobs") if wants else None, new_tokens)

    return _parse(body, config, take)


def parse_completion(body: dict[str, Any], config: ServeConfig) -> Call:
    """Check a call of `/v1/completions`.

    Args:
        body: the JSON object.
        config: limits.

    Raises:
        ApiError: a field is unknown, not offered, or out of its range.
    """

    def take(fields: _Fields) -> _OwnFields:
        texts = _texts(fields.take("prompt", object, None))
        n = fields.take("logprobs", int, None)
        return _OwnFields(texts, None if n is None else _logprobs(n, "logprobs"), min(16, config.max_new_tokens))

    return _parse(body, config, take)


class _Fields:
    """Fields of a body that are taken one by one, so that the unknown ones are left."""

    def __init__(self, body: dict[str, Any]):
        self.left = {name: value for name, value in body.items() if value is not None and name not in NO_EFFECT}

    def take(self, name: str, kind: type, default: Any) -> Any:
        """Remove and return a field; the default if it is absent or null."""
        value = self.left.pop(name, None)
        if value is None:
            return default
        # True is an int in Python.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind in (int, float)):
            raise ApiError(400, f"{name} must be {_NAMES[kind]}, got {_kind(value)}", name)
        return value

    def number(self, name: str, default: float) -> float:
        """Take a number with or without a fraction."""
        value = self.left.pop(name, None)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ApiError(400, f"{name} must be a number, got {_kind(value)}", name)
        try:
            return float(value)
        except OverflowError:
            raise ApiError(400, f"{name} must be a finite number", name) from None


_NAMES = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    list: "an array",
    dict: "an object",
    object: "a value",
}


def _kind(value: Any) -> str:
    return "null" if value is None else next(name for kind, name in _NAMES.items() if isinstance(value, kind))


class _OwnFields(NamedTuple):
    """Fields that each interface has in a form of its own."""

    question: Conversation | Texts
    logprobs: int | None
    new_tokens: int
    """Most tokens of an answer where `max_tokens` is not given."""


def _parse(body: dict[str, Any], config: ServeConfig, take_own: Callable[[_Fields], _OwnFields]) -> Call:
    """Take an interface's own fields, then those that both have, and refuse what is left."""
    fields = _Fields(body)
    own = take_own(fields)
    fields.take("model", str, None)
    stream = fields.take("stream", bool, False)
    options = fields.take("stream_options", dict, {})
    if unknown := set(options) - {"include_usage", "include_obfuscation"}:
        raise ApiError(400, f"stream_options has no field {min(unknown)!r}", "stream_options")
    for name, value in options.items():
        if value is not None and not isinstance(value, bool):
            at = f"stream_options.{name}"
            raise ApiError(400, f"{at} must be true or false, got {_kind(value)}", at)
    if options and not stream:
        raise ApiError(400, "stream_options needs stream: true", "stream_options")
    new_tokens = _new_tokens(fields.take("max_tokens", int, own.new_tokens), "max_tokens", config)
    stop = fields.take("stop", object, [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > MAX_STOPS or not all(isinstance(s, str) for s in stop):
        raise ApiError(400, f"stop must be a string or an array of at most {MAX_STOPS} strings", "stop")
    for i, text in enumerate(stop):
        if len(text) > MAX_STOP_LENGTH:
            message = f"stop[{i}] must have at most {MAX_STOP_LENGTH} characters, got {len(text):,}"
            raise ApiError(400, message, "stop")
    # Without a seed, every call draws its own noise.
    seed = fields.take("seed", int, None)
    settings = {
        "temperature": fields.number("temperature", 1.0),
        "top_p": fields.number("top_p", 1.0),
        "top_k": max(fields.take("top_k", int, 0), 0),  # -1 stands for all in some clients
        "repetition_penalty": fields.number("repetition_penalty", 1.0),
        "seed": secrets.randbits(62) if seed is None else seed % 2**63,
        "stop": tuple(stop),
    }
    ignore_eos = fields.take("ignore_eos", bool, False)
    _refuse_rest(fields.left)
    try:
        sampling = GenerationConfig(new_tokens, **settings)
    except ValueError as e:
        raise ApiError(400, str(e), str(e).split(" ")[0]) from e
    include_usage = options.get("include_usage") is True
    return Call(own.question, sampling, own.logprobs, ignore_eos, stream, include_usage)


def _refuse_rest(left: Mapping[str, Any]) -> None:
    for name, value in left.items():
        if name not in ONLY:
            raise ApiError(400, f"unknown field {name!r}", name, "unknown_parameter")
        # 0 == False in Python, and not in JSON.
        if not any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in ONLY[name]):
            offered = " or ".join(json.dumps(allowed) for allowed in ONLY[name])
            raise ApiError(400, f"{name} is not offered, other than {offered}", name, "unsupported_parameter")


def _new_tokens(n: int, name: str, config: ServeConfig) -> int:
    if not 1 <= n <= config.max_new_tokens:
        raise ApiError(400, f"{name} must be in [1, {config.max_new_tokens}], got {n}", name)
    return n


def _logprobs(n: int, name: str) -> int:
    if not 0 <= n <= MAX_LOGPROBS:
        raise ApiError(400, f"{name} must be in [0, {MAX_LOGPROBS}], got {n}", name)
    return n


def _texts(prompt: Any) -> Texts:
    """Read the prompts of a call: a text, an array of texts, tokens, or an array of tokens."""

    def is_tokens(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(t, int) and not isinstance(t, bool) for t in value)

    if isinstance(prompt, str) or (is_tokens(prompt) and prompt):
        return [prompt]
    if not isinstance(prompt, list) or not prompt or not all(isinstance(p, str) or is_tokens(p) for p in prompt):
        raise ApiError(400, "prompt must be a string, an array of strings, tokens, or an array of tokens", "prompt")
    if len(prompt) > MAX_PROMPTS:
        raise ApiError(400, f"prompt must have at most {MAX_PROMPTS} entries, got {len(prompt)}", "prompt")
    return prompt


def _conversation(messages: Sequence[Any] | None, config: ServeConfig) -> Conversation:
    """Read a conversation, with marks at the places of its images."""
    if not messages:
        raise ApiError(400, "messages must have at least one message", "messages")
    turns: list[Turn] = []
    images: list[bytes] = []
    for i, message in enumerate(messages):
        at = f"messages[{i}]"
        if not isinstance(message, dict):
            raise ApiError(400, f"{at} must be an object, got {_kind(message)}", at)
        if unknown := {k for k, v in message.items() if v is not None} - {"role", "content", "name", "refusal"}:
            raise ApiError(400, f"{at}.{min(unknown)} is not offered", f"{at}.{min(unknown)}", "unsupported_parameter")
        role = message.get("role")
        if role not in ("user", "assistant"):
            reason = ": the model's template has turns of users and assistants alone"
            raise ApiError(400, f"{at}.role must be 'user' or 'assistant', got {role!r}{reason}", f"{at}.role")
        text = _content(message.get("content"), f"{at}.content", role, images)
        turns.append(Turn(role, text))
    if turns[-1].role != "user":
        raise ApiError(400, "the last of messages must be the user's", "messages")
    if len(images) > config.max_images:
        raise ApiError(
            400,
            f"messages must have at most {config.max_images} images, got {len(images)}",
            "messages",
            "too_many_images",
        )
    return Conversation(turns, images)


def _content(content: Any, at: str, role: str, images: list[bytes]) -> str:
    """Read the content of a message; its images are appended to the list."""
    if isinstance(content, str):
        return _unmarked(content, at)
    if not isinstance(content, list):
        raise ApiError(400, f"{at} must be a string or an array of parts, got {_kind(content)}", at)
    texts = []
    for i, part in enumerate(content):
        here = f"{at}[{i}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(_unmarked(part["text"], f"{here}.text"))
        elif kind == "image_url" and role == "user":
            images.append(_image(part.get("image_url"), f"{here}.image_url"))
            texts.append(IMAGE_MARK)
        else:
            parts = "text or image_url" if role == "user" else "text"
            raise ApiError(400, f"{here} must be a part of type {parts}, got {kind!r}", here)
    return "\n".join(texts)


def _unmarked(text: str, at: str) -> str:
    """Refuse a text that has the mark of an image: it would move the images that were sent."""
    if IMAGE_MARK in text:
        raise ApiError(400, f"{at} must not have the text {IMAGE_MARK}, which stands for an image", at)
    return text


def _image(value: Any, at: str) -> bytes:
    """Decode the data URL of an image."""
    if not isinstance(value, dict) or not isinstance(value.get("url"), str):
        raise ApiError(400, f"{at} must be an object with a url", at)
    if value.get("detail") not in (None, "auto"):
        raise ApiError(400, f"{at}.detail is not offered, other than 'auto'", f"{at}.detail", "unsupported_parameter")
    url = value["url"]
    match = DATA_URL.match(url)
    if match is None:
        scheme = url.split(":", 1)[0][:20] if ":" in url else "none"
        raise ApiError(
            400,
            f"{at}.url must be a data URL, data:image/...;base64,..., got the scheme {scheme!r}: the server fetches no "
            "address",
            f"{at}.url",
            "unsupported_image_url",
        )
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except binascii.Error as e:
        raise ApiError(400, f"{at}.url is not valid base64: {e}", f"{at}.url", "invalid_image") from e

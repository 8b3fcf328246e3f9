"""Load test of a server: many clients at once, beside one after the other in the same run."""

from __future__ import annotations

import asyncio
import base64
import colorsys
import io
import json
import math
import random
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from PIL import Image, ImageDraw


@dataclass(frozen=True)
class Outcome:
    """One request as its client saw it."""

    first_token: float
    """Seconds until the first text."""
    seconds: float
    """Seconds until the end."""
    tokens: int
    """Tokens of the answer."""
    error: str = ""


@dataclass(frozen=True)
class LoadReport:
    """Requests of a number of clients."""

    clients: int
    requests: int
    errors: int
    """Requests that got another answer than a complete one."""
    first_error: str
    seconds: float
    requests_per_second: float
    tokens_per_second: float
    first_token_p50: float
    """Seconds, as the three below."""
    first_token_p99: float
    request_p50: float
    request_p99: float


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share of the values does not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)] if ordered else math.nan


def summarize(clients: int, outcomes: Sequence[Outcome], seconds: float) -> LoadReport:
    """Sum up the requests of a load."""
    good = [o for o in outcomes if not o.error]
    bad = [o.error for o in outcomes if o.error]
    first, whole = [o.first_token for o in good], [o.seconds for o in good]
    return LoadReport(
        clients,
        len(outcomes),
        len(bad),
        bad[0] if bad else "",
        seconds,
        len(good) / seconds,
        sum(o.tokens for o in good) / seconds,
        percentile(first, 0.5),
        percentile(first, 0.99),
        percentile(whole, 0.5),
        percentile(whole, 0.99),
    )


def draw_question(seed: int, with_image: bool) -> list[dict[str, Any]]:
    """Make a conversation that no other seed has: a question, and an image of a shape."""
    rng = random.Random(seed)
    text = rng.choice(("what color is the shape?", "what shape is in the image?", "is there a circle?"))
    if not with_image:
        return [{"role": "user", "content": f"{text} ({seed})"}]
    color = tuple(int(255 * v) for v in colorsys.hsv_to_rgb(rng.random(), 1, 0.9))
    image = Image.new("RGB", (64, 64), (seed % 256, seed // 256 % 256, 250))
    left, top, size = rng.randrange(20), rng.randrange(20), rng.randrange(16, 40)
    box = (left, top, left + size, top + size)
    draw = ImageDraw.Draw(image)
    rng.choice((draw.rectangle, draw.ellipse))(box, fill=color)
    file = io.BytesIO()
    image.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]}
    ]


class Connection:
    """One client's connection, kept open between requests. It costs less processor time than a library's client.

    Args:
        url: of the server.
        key: API key, if the server asks for one.
    """

    def __init__(self, url: str, key: str | None):
        self.address = urlsplit(url)
        self.key = key
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: bytes) -> Outcome:
        """Send one request, and read its stream to the end."""
        try:
            return await asyncio.wait_for(self._ask(body), REQUEST_SECONDS)
        except (OSError, EOFError, ValueError, asyncio.TimeoutError) as e:
            self.close()
            return Outcome(math.nan, math.nan, 0, f"{type(e).__name__}: {e}")

    async def _ask(self, body: bytes) -> Outcome:
        started = time.perf_counter()
        host, is_tls = self.address.hostname or "", self.address.scheme == "https"
        if self.streams is None:
            port = self.address.port or (443 if is_tls else 80)
            self.streams = await asyncio.open_connection(host, port, ssl=is_tls or None)
        reader, writer = self.streams
        lines = [
            "POST /v1/chat/completions HTTP/1.1",
            f"Host: {host}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            *([] if self.key is None else [f"Authorization: Bearer {self.key}"]),
        ]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status = head.split(" ", 2)[1]
        if status != "200":
            length = re.search(r"\r\ncontent-length: *(\d+)", head)
            # Closing the connection ends what can be read from it.
            text = (await reader.readexactly(int(length[1]) if length else 0)).decode(errors="replace")
            self.close()
            return Outcome(math.nan, math.nan, 0, f"status {status}: {text}")
        first, tokens, reason = math.nan, 0, ""
        # The body is chunked: a size in hexadecimal digits, then as many bytes, up to the size 0.
        while size := int(await reader.readline(), 16):
            for line in (await reader.readexactly(size + 2)).splitlines():
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    self.close()
                    return Outcome(math.nan, math.nan, 0, chunk["error"]["message"])
                for choice in chunk["choices"]:
                    if math.isnan(first) and (choice["delta"].get("content") or choice["finish_reason"]):
                        first = time.perf_counter() - started
                    reason = choice["finish_reason"] or reason
                if chunk.get("usage"):
                    tokens = chunk["usage"]["completion_tokens"]
        await reader.readline()
        if not reason or not tokens:
            return Outcome(math.nan, math.nan, 0, "the stream ended before the answer")
        return Outcome(first, time.perf_counter() - started, tokens)

    def close(self) -> None:
        """Close the connection; the next request opens another one."""
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


REQUEST_SECONDS = 600
"""Longest time of a request."""


async def load(
    url: str, key: str | None, clients: int, requests: int, new_tokens: int | None, with_image: bool, first_seed: int
) -> LoadReport:
    """Let clients ask, each one question after the other, until all requests are answered.

    Args:
        url: of the server.
        key: API key, if the server asks for one.
        clients: clients at once.
        requests: questions of all clients together, no two of them the same.
        new_tokens: length of every answer; None lets the model end it.
        with_image: ask about an image each.
        first_seed: seed of the first question.

    Returns:
        The report.
    """
    options = {"max_tokens": 64} if new_tokens is None else {"max_tokens": new_tokens, "ignore_eos": True}
    bodies = [
        json.dumps(
            {
                "messages": draw_question(first_seed + i, with_image),
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
                **options,
            }
        ).encode()
        for i in range(requests)
    ]
    left, outcomes = iter(bodies), []

    async def work() -> None:
        connection = Connection(url, key)
        for body in left:
            outcomes.append(await connection.ask(body))
        connection.close()

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(clients)))
    return summarize(clients, outcomes, time.perf_counter() - started)


async def compare(
    url: str, key: str | None, clients: int, requests: int, new_tokens: int | None, with_image: bool
) -> dict[str, Any]:
    """Measure one client, then many, with other questions of the same kind.

    Args:
        url, key, clients, requests, new_tokens, with_image: see `load`. One client asks a quarter as many questions.

    Returns:
        Both reports, and how many times the requests a second of one client the many get.
    """
    await load(url, key, min(clients, 8), 16, new_tokens, with_image, 0)  # warm-up
    one = await load(url, key, 1, max(requests // 4, 8), new_tokens, with_image, 1_000)
    many = await load(url, key, clients, requests, new_tokens, with_image, 10_000)
    ratio = many.requests_per_second / one.requests_per_second if one.requests_per_second else math.nan
    return {"one": asdict(one), "many": asdict(many), "speedup": ratio}

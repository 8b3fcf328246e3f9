"""Requests to an engine, their answers, and what `generate` answers."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable

import httpx
import openai
from PIL import Image

from tests.makers import VISION, language_config, random_prompts, shape_tokenizer, sharpened_vlm
from vlmamba.connectors import ConnectorConfig
from vlmamba.model import VLM, GenerationConfig, Turn, VLMConfig
from vlmamba.model.batch import Sample
from vlmamba.model.generation.generate import generate_packed
from vlmamba.model.generation.prefill import packed_tokens
from vlmamba.serve.app import Service
from vlmamba.serve.config import ServeConfig
from vlmamba.serve.engine import Engine, Request
from vlmamba.serve.prompts import Prompt, chat_prompt
from vlmamba.serve.server import Server

TOKENIZER = shape_tokenizer()
CONFIG = ServeConfig(slots=4, prefill_tokens=64)
GREEDY, SAMPLED = GenerationConfig(12), GenerationConfig(12, temperature=1.5, top_k=40, top_p=0.9, seed=3)
PENALIZED = dataclasses.replace(SAMPLED, repetition_penalty=1.3, seed=8, top_k=0)
PROMPTS = random_prompts((5, 1, 23, 70, 2, 130, 64, 17, 33), TOKENIZER.vocab_size)


def small_vlm(layer: str = "mamba") -> VLM:
    """Build a small VLM with the template of the demo."""
    config = VLMConfig(language_config(layer), (VISION,), ConnectorConfig("mlp"), template="qa")
    return sharpened_vlm(config, TOKENIZER)


class Client:
    """Events of an engine's requests, by request."""

    def __init__(self, model, config: ServeConfig = CONFIG):
        self.events = defaultdict(list)
        self.engine = Engine(model, config, self.deliver)

    def deliver(self, batch):
        for request, event in batch:
            assert not self.finish(request), "an event after the end"
            self.events[request].append(event)

    def text(self, request):
        return "".join(e.text for e in self.events[request])

    def finish(self, request):
        return self.events[request][-1].finish if self.events[request] else None

    def logprobs(self, request):
        return [p for e in self.events[request] for p in e.logprobs]

    def run(self, *requests):
        """Submit requests and step until they are finished; return their texts."""
        self.engine.submit(*requests)
        self.finish_all()
        return [self.text(r) for r in requests]

    def finish_all(self):
        for _ in range(500):
            if not self.engine.n_active and not len(self.engine.waiting):
                return
            self.engine.step()
        raise AssertionError("the engine does not come to an end")


def text_request(ids, sampling=GREEDY, **options):
    return Request(Prompt(Sample(ids, ids), salt=options.pop("salt", b"")), sampling, **options)


def alone(lm, ids, sampling):
    """The answer of `generate`, and its tokens."""
    *_, (completion,) = generate_packed(lm, *packed_tokens(lm, [ids]), [ids], TOKENIZER, sampling)
    return completion.text, completion.ids


def vlm_request(vlm, question, image, sampling=GREEDY, salt=b"", **options):
    images = [] if image is None else image if isinstance(image, list) else [image]
    turns = question if isinstance(question, list) else [Turn("user", question)]
    return Request(chat_prompt(vlm, vlm.template, turns, images, salt), sampling, **options)


def wait_for(condition: Callable, seconds: float = 60.0) -> None:
    """Wait until a condition holds, which takes another thread."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.01)


class RunningServer:
    """A server in a thread of this process, at a free port of the loopback address; a context manager."""

    def __init__(self, model, keys: tuple[str, ...] = (), **limits):
        self.service = Service(model, "small", ServeConfig(**{"slots": 4, **limits}), keys)
        self.engine = self.service.engine
        self.server = Server(self.service, "127.0.0.1", 0, drain_seconds=5)
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self):
        self.thread.start()
        wait_for(lambda: self.server.started, 240)  # compiled kernels, at first use
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *error):
        self.server.handle_exit(15, None)
        self.thread.join(60)
        assert not self.thread.is_alive()

    def openai(self, key: str = "none"):
        """A client of the library of that name, which tries nothing twice."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def post(self, body, path: str = "/v1/chat/completions", **options):
        """Send a body, JSON or bytes, and return the response."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        return httpx.post(self.url + path, content=content, headers=headers, timeout=60, **options)


def data_url(image: Image.Image) -> str:
    """The image as a data URL."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def question(text: str, *urls: str) -> list[dict]:
    """Messages of a question with images."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]

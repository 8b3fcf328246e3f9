"""HTTP interface: the `openai` client's calls, errors in their form, keys, limits, clients that leave or are slow."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from tests.makers import BLUE, RED, language_config, sharpened_lm
from tests.serve.makers import TOKENIZER, RunningServer, alone, data_url, question, small_vlm, wait_for
from vlmamba.model import GenerationConfig, Turn
from vlmamba.serve.engine import Engine
from vlmamba.serve.responses import token_text

GREEDY = GenerationConfig(12)
ENDLESS = 10**6
LONG = {"max_tokens": ENDLESS, "temperature": 0, "ignore_eos": True}
"""An answer that goes on for minutes, whatever else the machine has to do."""
LONG_OPTIONS = {"max_tokens": ENDLESS, "temperature": 0, "extra_body": {"ignore_eos": True}}
"""The same for the `openai` client."""


@pytest.fixture(scope="module")
def vlm():
    return small_vlm()


@pytest.fixture(scope="module")
def server(vlm):
    with RunningServer(vlm, max_prompt_tokens=200, max_body_mb=1.0, max_images=2) as running:
        yield running


@pytest.fixture(scope="module")
def impatient(vlm):
    """A server with little time for slow clients."""
    with RunningServer(vlm, client_seconds=0.5) as running:
        yield running


@pytest.fixture(scope="module")
def endless(vlm):
    """A server whose answers may be as long as a test takes."""
    with RunningServer(vlm, max_new_tokens=ENDLESS) as running:
        yield running


def chat(client, messages, **options):
    return client.chat.completions.create(model="small", messages=messages, **{"max_tokens": 12, **options})


def test_the_openai_client_gets_the_answers_of_generate(server, vlm):
    client = server.openai()
    assert [m.id for m in client.models.list()] == ["small"] and client.models.retrieve("small").id == "small"
    (want,) = vlm.generate(["what color?"], [RED], GREEDY)
    response = chat(client, question("what color?", data_url(RED)), temperature=0)
    assert response.choices[0].message.content == want
    usage = response.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens and usage.prompt_tokens > 16
    stream = chat(
        client,
        question("what color?", data_url(RED)),
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == want
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == response.usage.prompt_tokens
    # As OpenAI's, every other chunk has the field, and null in it.
    assert all("usage" in c.model_fields_set and c.usage is None for c in chunks[:-1])


def test_seed_and_filters_are_those_of_generate(server, vlm):
    sampling = GenerationConfig(12, temperature=1.5, top_p=0.9, top_k=50, repetition_penalty=1.2, seed=5)
    (want,) = vlm.generate(["what?"], [BLUE], sampling)
    for _ in range(2):
        extra = {"top_k": 50, "repetition_penalty": 1.2}
        options = {"temperature": 1.5, "top_p": 0.9, "seed": 5, "extra_body": extra}
        assert chat(server.openai(), question("what?", data_url(BLUE)), **options).choices[0].message.content == want
    texts = {chat(server.openai(), question("what?"), temperature=3.0).choices[0].message.content for _ in range(3)}
    assert len(texts) > 1  # without a seed, each call draws its own noise


def test_completions_continue_texts_and_tokens(server, vlm):
    lm = vlm.language_model
    lm.tokenizer = TOKENIZER
    texts = ["a red circle", "what color"]
    want = lm.generate(texts, GREEDY)
    client = server.openai()
    options = {"model": "small", "max_tokens": 12, "temperature": 0}
    response = client.completions.create(prompt=texts, logprobs=2, **options)
    assert [c.text for c in response.choices] == want
    logprobs = response.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) > 0
    assert logprobs.text_offset[0] == 0
    tokens = [TOKENIZER.encode(t) for t in texts]
    assert [c.text for c in client.completions.create(prompt=tokens, **options).choices] == want
    parts = ["", ""]
    for chunk in client.completions.create(prompt=texts, stream=True, **options):
        parts[chunk.choices[0].index] += chunk.choices[0].text
    assert parts == want


def test_log_probabilities_and_stop_strings(server, vlm):
    (whole,) = vlm.generate(["a red circle"], [None], GREEDY)
    stop = next(c for c in whole[1:] if c.isascii())
    response = chat(
        server.openai(), question("a red circle"), temperature=0, stop=[stop, "never"], logprobs=True, top_logprobs=3
    )
    choice = response.choices[0]
    assert choice.message.content == whole[: whole.index(stop)] and choice.finish_reason == "stop"
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 3 and token.logprob == max(t.logprob for t in token.top_logprobs)


def test_log_probabilities_are_those_of_the_tokens_that_generate_gives(server, vlm):
    """A sampled answer has those of the model itself, whatever temperature and filters chose the tokens."""
    lm = vlm.language_model
    lm.tokenizer = TOKENIZER
    ids = TOKENIZER.encode("a red circle")
    sampling = GenerationConfig(8, temperature=1.5, top_k=40, seed=9)
    want, new = alone(lm, ids, sampling)
    options = {"max_tokens": 8, "temperature": 1.5, "seed": 9, "extra_body": {"top_k": 40}}
    whole = server.openai().completions.create(model="small", prompt=ids, logprobs=1, **options).choices[0]
    assert whole.text == want and whole.logprobs.tokens == [token_text(TOKENIZER, i) for i in new if i]
    logits = lm(torch.tensor([ids + new[:-1]])).logits[0, len(ids) - 1 :, : TOKENIZER.vocab_size]
    logprobs = logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None])[:, 0]
    n = len(whole.logprobs.token_logprobs)
    assert whole.logprobs.token_logprobs == pytest.approx(logprobs[:n].tolist(), abs=1e-3)
    parts = server.openai().completions.create(model="small", prompt=ids, logprobs=1, stream=True, **options)
    choices = [chunk.choices[0] for chunk in parts]
    assert "".join(c.text for c in choices) == want
    assert [v for c in choices for v in c.logprobs.token_logprobs] == whole.logprobs.token_logprobs


def huge_image() -> str:
    """The data URL of an image of few bytes, with more pixels than fit any memory."""
    png = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0), b"IDAT"):
        png += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return "data:image/png;base64," + base64.b64encode(png).decode()


OK = {"messages": [{"role": "user", "content": "what?"}]}
BAD = {
    "no JSON": (b"{", 400, "not valid JSON"),
    "NaN": (b'{"messages": [], "temperature": NaN}', 400, "NaN is not JSON"),
    "deep JSON": (b"[" * 100_000, 400, "not valid JSON"),
    "no object": (b"[]", 400, "must be a JSON object"),
    "unknown field": ({**OK, "temprature": 1}, 400, "unknown field 'temprature'"),
    "several choices": ({**OK, "n": 2}, 400, "n is not offered, other than 1"),
    "tools": ({**OK, "tools": [{"type": "function"}]}, 400, "tools is not offered"),
    "penalty": ({**OK, "presence_penalty": 0.5}, 400, "presence_penalty is not offered, other than 0"),
    "text as number": ({**OK, "temperature": "0"}, 400, "temperature must be a number, got a string"),
    "flag as number": ({**OK, "seed": True}, 400, "seed must be an integer, got true or false"),
    "temperature": ({**OK, "temperature": -1}, 400, "temperature must not be negative"),
    "top_p": ({**OK, "top_p": 0}, 400, "top_p must be in"),
    "large number": (b'{"messages": [{"role": "user", "content": "a"}], "top_p": 1' + b"0" * 400 + b"}", 400, "top_p"),
    "too many new tokens": ({**OK, "max_tokens": 9999}, 400, "max_tokens must be in [1, 2048], got 9999"),
    "no new tokens": ({**OK, "max_tokens": 0}, 400, "max_tokens must be in [1, 2048], got 0"),
    "no completion tokens": ({**OK, "max_completion_tokens": 0}, 400, "max_completion_tokens must be in [1, 2048]"),
    "usage": (
        {**OK, "stream": True, "stream_options": {"include_usage": "yes"}},
        400,
        "stream_options.include_usage must be true or false, got a string",
    ),
    "too long": ({"messages": [{"role": "user", "content": "a b" * 300}]}, 400, "where 200 are the most"),
    "no messages": ({"messages": []}, 400, "at least one message"),
    "system": ({"messages": [{"role": "system", "content": "a"}]}, 400, "messages[0].role must be"),
    "two users": ({"messages": OK["messages"] * 2}, 400, "turn 1 of a conversation must be by the assistant"),
    "assistant last": ({"messages": [*OK["messages"], {"role": "assistant", "content": ""}]}, 400, "the user's"),
    "mark": ({"messages": [{"role": "user", "content": "<image>"}]}, 400, "must not have the text <image>"),
    "half surrogate": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "cannot be tokenized"),
    "remote image": ({"messages": question("a", "http://127.0.0.1/a.png")}, 400, "got the scheme 'http': the server"),
    "file": ({"messages": question("a", "file:///etc/passwd")}, 400, "got the scheme 'file'"),
    "base64": ({"messages": question("a", "data:image/png;base64,@@@")}, 400, "not valid base64"),
    "no image": ({"messages": question("a", "data:image/png;base64,aGVsbG8=")}, 400, "image 0"),
    "huge image": ({"messages": question("a", huge_image())}, 400, "image 0 is too large"),
    "many images": ({"messages": question("a", *[data_url(RED)] * 3)}, 400, "at most 2 images, got 3"),
    "audio": ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "got 'input_audio'"),
    "stop": ({**OK, "stop": [""]}, 400, "stop must not hold an empty text"),
    "long stop": ({**OK, "stop": ["a", "b" * 257]}, 400, "stop[1] must have at most 256 characters, got 257"),
    "long text": ({"messages": [{"role": "user", "content": "a" * 3201}]}, 400, "3,201 characters, where 3,200 are"),
    "half surrogate in a field": (
        b'{"messages": [{"role": "user", "content": "a"}], "\\ud800": 1}',
        400,
        "unknown field",
    ),  # fmt: skip
    "top_logprobs": ({**OK, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs must be in [0, 20]"),
    "model": ({**OK, "model": "gpt-4"}, 404, "there is no model 'gpt-4' here"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_an_error_that_names_the_fault(server, name):
    body, status, message = BAD[name]
    response = server.post(body)
    error = response.json()["error"]
    assert (response.status_code, error.keys()) == (status, {"message", "type", "param", "code"})
    assert message in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": %s, "messages": []}',
        b'{"messages": [{"role": %s}]}',
        b'{"messages": [{"role": "user", "content": [{"type": %s}]}]}',
        b'{"messages": [{"role": "user", "content": "a", %s: 1}]}',
        b'{"messages": [{"role": "user", "content": "a"}], %s: 1}',
        b'{"messages": [{"role": "user", "content": "a"}], "stream_options": {%s: 1}}',
    ],
)
def test_an_error_repeats_no_more_than_a_part_of_a_body(server, body):
    for value in (b'"%s"' % (b"x" * 500_000), b"[" * 900 + b"]" * 900):
        response = server.post(body % value)
        assert response.status_code in (400, 404) and len(response.content) < 2000


def test_an_endless_head_is_refused(server):
    """Also where httptools is installed, which has no bound on it."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(30)
        with contextlib.suppress(OSError):
            connection.sendall(b"GET / HTTP/1.1\r\nA: ")
            for _ in range(200):
                connection.sendall(b"a" * 65536)
        with contextlib.suppress(OSError):
            assert connection.recv(4096).startswith(b"HTTP/1.1 400")
    assert server.server.config.http == "h11"


def test_a_long_text_is_refused_before_it_is_tokenized(server, monkeypatch):
    monkeypatch.setattr(type(TOKENIZER), "encode", lambda *args: pytest.fail("a text was tokenized"))
    for path, body in {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a" * 500_000}]},
        "/v1/completions": {"prompt": ["a", "a" * 500_000]},
    }.items():
        error = server.post(body, path).json()["error"]
        assert error["code"] == "context_length_exceeded" and "500,000 characters" in error["message"]


def test_bad_prompts_and_paths_are_named(server):
    for prompt, message in [({}, "prompt must be"), ([[1, 99999]], "tokens must be in"), (["a"] * 99, "at most 64")]:
        response = server.post({"prompt": prompt}, "/v1/completions")
        assert response.status_code == 400 and message in response.json()["error"]["message"]
    assert "there is no POST /v1/embeddings" in server.post({}, "/v1/embeddings").json()["error"]["message"]
    assert server.post(OK, headers={"Content-Type": "text/plain"}).status_code == 415
    with pytest.raises(openai.BadRequestError, match="unknown field 'best'"):
        chat(server.openai(), OK["messages"], extra_body={"best": 1})


def test_a_body_is_read_no_further_than_its_limit(server):
    read = []

    def parts():
        for _ in range(200):
            read.append(1)
            yield b" " * 65536

    assert server.post(b" " * (2**20 + 1)).status_code == 413
    try:
        response = httpx.post(
            server.url + "/v1/chat/completions", content=parts(), headers={"Content-Type": "application/json"}
        )
        assert response.status_code == 413
    except httpx.TransportError:  # the server closed the connection while the client was sending
        pass
    assert len(read) < 200
    wait_for(lambda: server.service.body_bytes == 0)


def head(length: int) -> bytes:
    """The head of a request, as it goes over the wire."""
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: a", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def test_a_body_that_does_not_come_gets_a_timeout(impatient):
    with socket.create_connection(("127.0.0.1", impatient.port)) as connection:
        connection.sendall(head(99) + b"{")
        connection.settimeout(30)
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(endless, stream):
    before = endless.engine.stats.cancelled
    with connect(endless, OK, **LONG, stream=stream):
        wait_for(lambda: endless.engine.running)
    wait_for(lambda: endless.engine.stats.cancelled == before + 1)
    assert not endless.service.is_busy


def connect(server, body: dict, **options) -> socket.socket:
    """Send a request over a socket of its own, whose answer is not read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    content = json.dumps({**body, **options}).encode()
    connection.sendall(head(len(content)) + content)
    return connection


@pytest.mark.parametrize("system_helps", [True, False])
def test_a_client_that_does_not_read_is_left(vlm, system_helps, caplog, monkeypatch):
    """Its slot is free when it takes no more; where the system can tell, its connection is closed too."""
    if not system_helps:
        monkeypatch.delattr(socket, "TCP_USER_TIMEOUT", raising=False)
    elif not hasattr(socket, "TCP_USER_TIMEOUT"):
        pytest.skip("the system has no TCP_USER_TIMEOUT")
    with RunningServer(vlm, client_seconds=0.5, max_new_tokens=ENDLESS) as server:
        # Else the system takes the entire answer from the server.
        server.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with connect(server, OK, **LONG, stream=True, logprobs=True, top_logprobs=20):
            wait_for(lambda: server.engine.stats.cancelled and not server.service.is_busy)
            if system_helps:
                wait_for(lambda: not server.server.server_state.connections)
            else:
                assert "did not read its answer in time" in caplog.text


def test_a_client_that_leaves_while_it_sends_is_no_error(server, caplog):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head(99) + b"{")
        wait_for(lambda: server.service.body_bytes)
    wait_for(lambda: not server.service.is_busy and not server.service.body_bytes)
    assert not [r for r in caplog.records if r.levelname == "ERROR"]


def test_errors_are_those_that_the_openai_client_knows(vlm):
    """Their classes, and the fields of each; also of one in the middle of a stream."""
    with RunningServer(vlm, keys=("key",), max_body_mb=0.1, max_new_tokens=ENDLESS) as server:
        with pytest.raises(openai.AuthenticationError) as error:
            chat(server.openai("wrong"), OK["messages"])
        assert (error.value.status_code, error.value.code) == (401, "invalid_api_key")
        client = server.openai("key")
        with pytest.raises(openai.BadRequestError) as error:
            chat(client, OK["messages"], top_p=2)
        assert (error.value.param, error.value.type) == ("top_p", "invalid_request_error")
        with pytest.raises(openai.NotFoundError) as error:
            client.chat.completions.create(model="other", messages=OK["messages"])
        assert error.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")
        with pytest.raises(openai.APIStatusError) as error:
            chat(client, question("a" * 150_000))
        assert (error.value.status_code, error.value.code) == (413, "request_too_large")
        stream = chat(client, OK["messages"], stream=True, **LONG_OPTIONS)
        next(stream)
        server.engine._decode = lambda: 1 / 0
        with pytest.raises(openai.APIError, match="the model failed"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="the model failed"):
            chat(client, OK["messages"])
        del server.engine._decode
        assert chat(client, OK["messages"]).choices[0].finish_reason


def test_the_openai_clients_helper_reads_a_stream(server, vlm):
    (text,) = vlm.generate([[Turn("user", "<image>\n<image>\nwhat?")]], [[RED, BLUE]], GREEDY)
    stop = next(c for c in text[1:] if c.isascii())

    async def read():
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        messages = question("what?", data_url(RED), data_url(BLUE))
        options = {"logprobs": True, "stop": stop, "temperature": 0, "stream_options": {"include_usage": True}}
        async with client.chat.completions.stream(model="small", messages=messages, **options) as stream:
            kinds = {event.type async for event in stream}
            return kinds, await stream.get_final_completion()

    kinds, whole = asyncio.run(read())
    assert {"chunk", "content.delta", "content.done", "logprobs.content.done"} <= kinds
    (choice,) = whole.choices
    assert (choice.message.content, choice.finish_reason) == (text[: text.index(stop)], "stop")
    assert len(choice.logprobs.content) == whole.usage.completion_tokens


def test_more_than_may_wait_are_refused(vlm):
    with RunningServer(vlm, slots=1, max_waiting=0, max_new_tokens=ENDLESS) as server:
        stream = chat(server.openai(), OK["messages"], stream=True, **LONG_OPTIONS)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as error:
            chat(server.openai(), OK["messages"])
        assert (error.value.response.headers["Retry-After"], error.value.code) == ("1", "server_busy")
        stream.close()
        wait_for(lambda: not server.service.is_busy)
        assert server.post({**OK, "max_tokens": 2}).status_code == 200


def test_keys_are_checked_and_keep_users_apart(vlm):
    with RunningServer(vlm, keys=("first", "second")) as server:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "first"},
            {"Authorization": "Bearer é"},
        ):
            response = server.post(OK, headers={k: v.encode() for k, v in headers.items()})
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(server.url + "/v1/models").status_code == 401
        cached = []
        for key in ("first", "first", "second", "second"):
            usage = chat(server.openai(key), question("what?", data_url(RED)), temperature=0).usage
            cached.append(usage.prompt_tokens_details.cached_tokens > 0)
        assert cached == [False, True, False, True]


def test_a_language_model_without_a_template_has_no_conversations(vlm):
    lm = sharpened_lm(language_config("mamba"), TOKENIZER)
    with RunningServer(lm) as server:
        assert "use /v1/completions" in server.post(OK).json()["error"]["message"]
        response = server.post({"prompt": "a red", "temperature": 0, "max_tokens": 12}, "/v1/completions")
        assert response.json()["choices"][0]["text"] == lm.generate(["a red"], GREEDY)[0]


def test_health_metrics_and_page(server):
    assert httpx.get(server.url + "/health").json() == {"status": "ok", "model": "small"}
    families = {f.name: f for f in text_string_to_metric_families(httpx.get(server.url + "/metrics").text)}
    assert families["vlmamba_new_tokens"].samples[0].value == server.engine.stats.new_tokens > 0
    assert families["vlmamba_slots"].samples[0].value == 4
    paths = {s.labels["path"] for s in families["vlmamba_requests"].samples if "path" in s.labels}
    assert "/v1/chat/completions" in paths
    page = httpx.get(server.url)
    script = re.search("<script>(.*?)</script>", page.text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = page.headers["Content-Security-Policy"]
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert "://" not in page.text  # nothing from outside


CLIENT = """
import sys, urllib.request
request = urllib.request.Request(sys.argv[1], sys.argv[2].encode(), {"Content-Type": "application/json"})
print(urllib.request.urlopen(request).readline(), flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_process_loses_killed_clients_and_at_a_signal_lets_running_answers_end(vlm, tmp_path):
    vlm.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "vlmamba", "serve", str(tmp_path / "model"), "--port", "0", "--name", "small"]
    command += ["--max-new-tokens", str(ENDLESS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parents[2]
    ) as process:
        try:
            url = process.stdout.readline().split(" at ")[1].strip()
            body = json.dumps({**OK, **LONG, "stream": True})
            with subprocess.Popen(
                [sys.executable, "-c", CLIENT, url + "/v1/chat/completions", body],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            ) as killed:  # fmt: skip
                assert killed.stdout.readline().startswith(b"b'data: {")
                killed.send_signal(signal.SIGKILL)
            wait_for(lambda: "vlmamba_running 0.0" in httpx.get(url + "/metrics").text)
            assert "vlmamba_cancelled_total 1.0" in httpx.get(url + "/metrics").text
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
            answers = []

            def read():
                stream = chat(client, OK["messages"], stream=True, **{**LONG_OPTIONS, "max_tokens": 3000})
                answers.append([c.choices[0].finish_reason for c in stream])

            threads = [threading.Thread(target=read) for _ in range(3)]
            for thread in threads:
                thread.start()
            wait_for(lambda: "vlmamba_running 3.0" in httpx.get(url + "/metrics").text)
            process.send_signal(signal.SIGTERM)
            refused = httpx.Response(200)
            end = time.monotonic() + 5
            while refused.status_code != 503 and time.monotonic() < end:
                refused = httpx.post(url + "/v1/chat/completions", json={**OK, "max_tokens": 1})
            assert refused.status_code == 503 and refused.headers["Retry-After"] == "10"
            assert httpx.get(url + "/health").status_code == 503
            for thread in threads:
                thread.join(60)
            assert [a[-1] for a in answers] == ["length"] * 3
            assert process.wait(20) == 0
        finally:
            process.kill()


def test_ctrl_c_ends_the_warm_up(vlm, monkeypatch):
    """It compiles kernels, which takes many seconds."""

    def warm_up(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    monkeypatch.setattr(Engine, "warm_up", warm_up)
    with pytest.raises(KeyboardInterrupt):
        RunningServer(vlm).server.run()

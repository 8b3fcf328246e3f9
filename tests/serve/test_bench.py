"""Load test: figures of given requests, questions that differ, and a run against a server."""

from __future__ import annotations

import asyncio
import json
import math
import socket

import pytest

from tests.serve.makers import RunningServer, small_vlm
from vlmamba.commands.serve_bench import ServeBench
from vlmamba.serve.bench import Connection, Outcome, draw_question, load, percentile, summarize


def test_percentiles_are_values_that_occurred():
    values = [float(i) for i in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert percentile([3.0], 0.5) == 3 and math.isnan(percentile([], 0.5))


def test_errors_are_counted_and_in_no_time():
    outcomes = [Outcome(0.1, 0.5, 10), Outcome(math.nan, math.nan, 0, "status 429"), Outcome(0.3, 0.7, 30)]
    report = summarize(2, outcomes, 2.0)
    assert (report.requests, report.errors, report.first_error) == (3, 1, "status 429")
    assert (report.requests_per_second, report.tokens_per_second) == (1, 20)
    assert (report.first_token_p50, report.request_p99) == (0.1, 0.7)


def test_no_two_questions_are_the_same():
    assert len({json.dumps(draw_question(i, True)) for i in range(50)}) == 50
    assert len({json.dumps(draw_question(i, False)) for i in range(50)}) == 50


def test_many_clients_lose_nothing(tmp_path, capsys):
    with RunningServer(small_vlm()) as server:
        file = tmp_path / "report.json"
        ServeBench(server.url, clients=16, requests=32, new_tokens=5, output=file).run()
        report = json.loads(file.read_text())
        assert (report["many"]["requests"], report["many"]["errors"], report["one"]["errors"]) == (32, 0, 0)
        assert "speedup" in capsys.readouterr().out
        refused = asyncio.run(load(server.url, None, 2, 4, 5000, False, 0))
        assert refused.errors == 4 and "max_tokens" in refused.first_error
    # A port that is bound and not listened at: nobody else can have it.
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(ValueError, match="requests failed"):
            ServeBench(f"http://127.0.0.1:{closed.getsockname()[1]}", clients=2, requests=4).run()


def test_the_reason_of_a_refusal_is_read_to_its_end():
    """The body comes some time after the head, in parts, as from a server that has other work."""

    async def refuse(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        for part in (b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 8\r\n\r\n", b"too ", b"many"):
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.02)
        writer.close()

    async def ask():
        async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await Connection(f"http://127.0.0.1:{port}", None).ask(b"{}")

    assert asyncio.run(ask()).error == "status 429: too many"

"""Engine: answers equal to `generate` whatever the batch, joining and leaving, fairness, limits, failures."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from tests.makers import BLUE, RED, language_config, random_prompts, sharpened_lm
from tests.serve.makers import (
    CONFIG,
    GREEDY,
    PENALIZED,
    PROMPTS,
    SAMPLED,
    TOKENIZER,
    Client,
    alone,
    small_vlm,
    text_request,
    vlm_request,
    wait_for,
)
from vlmamba.model import GenerationConfig, LMConfig, Turn
from vlmamba.serve.config import ServeConfig
from vlmamba.serve.engine import Busy, Stopping
from vlmamba.serve.waiting import WaitingQueue


@pytest.fixture(params=["mamba", "mamba2"])
def lm(request):
    return sharpened_lm(language_config(request.param), TOKENIZER)


@pytest.fixture(scope="module")
def vlm():
    return small_vlm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_answer_is_that_of_generate_whatever_runs_beside_it(lm, dtype):
    """Prompts of nine lengths in four slots: they join and leave at different steps, and wait for one another.

    Greedy rows and rows with each filter are beside one another."""
    lm = lm.to(dtype)
    samplings = [
        GREEDY,
        SAMPLED,
        PENALIZED,
        dataclasses.replace(GREEDY, repetition_penalty=1.5),
        GenerationConfig(12, temperature=0.8, seed=5),
        GenerationConfig(12, temperature=2.0, top_k=7, seed=6),
        GenerationConfig(12, temperature=2.0, top_p=0.7, seed=7),
    ]
    requests = [
        text_request(p, dataclasses.replace(samplings[i % 7], max_new_tokens=3 + 4 * (i % 4)), logprobs=i % 3)
        for i, p in enumerate(PROMPTS * 2)
    ]
    client = Client(lm)
    texts = client.run(*requests)
    rows = client.engine.stats
    assert rows.decode_steps < rows.new_tokens / 2  # answers did share steps
    for request, text in zip(requests, texts, strict=True):
        want, ids = alone(lm, request.prompt.ids, request.sampling)
        assert (text, request.new_tokens) == (want, len(ids))
        reported = client.logprobs(request)
        assert [p.token for p in reported] == [t for t in ids if t != TOKENIZER.eos_id]
        assert all(len(p.top) == request.logprobs for p in reported)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize("layer", ["mamba", "mamba2", "mamba3"])
def test_narrow_states_give_the_answers_of_generate_with_them(layer, state_dtype):
    """Also those of prompts that were seen, and of prompts that are run in several passes."""
    config = LMConfig(32, 2, 320, layer, d_state=8, headdim=8, tie_embeddings=False)
    lm = sharpened_lm(config, TOKENIZER)
    samplings = [dataclasses.replace(s, state_dtype=state_dtype) for s in (GREEDY, SAMPLED, PENALIZED)]
    want = [alone(lm, p, samplings[i % 3])[0] for i, p in enumerate(PROMPTS)]
    client = Client(lm, dataclasses.replace(CONFIG, state_dtype=state_dtype))
    for seen in (False, True):
        requests = [text_request(p, samplings[i % 3]) for i, p in enumerate(PROMPTS)]
        assert client.run(*requests) == want
        assert [r.cached_tokens == len(r.prompt.ids) for r in requests] == [seen] * len(PROMPTS)
    state = client.engine.cache.find(text_request(PROMPTS[3]).prompt).state
    assert {layer.ssm.dtype for layer in (*state, *client.engine.decoder.buffers)} == {getattr(torch, state_dtype)}


def test_a_cache_of_narrow_states_counts_their_memory(lm):
    sizes = {}
    for state_dtype in ("float32", "bfloat16", "float16", "int8"):
        engine = Client(lm, dataclasses.replace(CONFIG, state_dtype=state_dtype)).engine
        engine.submit(text_request(PROMPTS[3], GenerationConfig(1)))
        while engine.n_active or len(engine.waiting):
            engine.step()
        (entry,) = engine.cache._entries.values()
        parts = [part for layer in entry.prefix.state for part in layer]
        logits = entry.prefix.logits
        sizes[state_dtype] = sum(t.untyped_storage().nbytes() for t in (*parts, logits))
        assert engine.cache.n_bytes == sizes[state_dtype]
    # Scales of int8 take as much as its elements save where rows are short.
    assert sizes["int8"] <= sizes["bfloat16"] == sizes["float16"] < sizes["float32"]


def test_a_state_dtype_that_is_not_offered_is_named():
    with pytest.raises(ValueError, match="state_dtype must be one of .*'int8'; got 'int4'"):
        ServeConfig(state_dtype="int4")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_logits_agree_to_rounding_whatever_runs_beside(lm, dtype, tolerance):
    lm = lm.to(dtype)
    sampling = GenerationConfig(6, stop=())
    requests = [text_request(p, sampling, logprobs=3, ignore_eos=True) for p in PROMPTS]
    among = Client(lm, dataclasses.replace(CONFIG, cache_mb=0))
    among.run(*requests)
    for request in requests[:4]:
        single = Client(lm, dataclasses.replace(CONFIG, cache_mb=0))
        (again,) = [dataclasses.replace(request, new_tokens=0)]
        single.run(again)
        for a, b in zip(among.logprobs(request), single.logprobs(again), strict=True):
            assert [t for t, _ in a.top] == [t for t, _ in b.top]
            torch.testing.assert_close(
                torch.tensor([p for _, p in a.top]),
                torch.tensor([p for _, p in b.top]),
                rtol=tolerance,
                atol=tolerance * 40,
            )


def test_log_probabilities_are_those_of_the_model(lm):
    ids = PROMPTS[2]
    client = Client(lm)
    request = text_request(ids, dataclasses.replace(SAMPLED, max_new_tokens=4), logprobs=5)
    client.run(request)
    tokens = ids + [p.token for p in client.logprobs(request)]
    with torch.no_grad():
        logprobs = lm(torch.tensor([tokens])).logits[0, len(ids) - 1 :, : TOKENIZER.vocab_size].log_softmax(-1)
    for got, want in zip(client.logprobs(request), logprobs, strict=False):
        assert got.logprob == pytest.approx(float(want[got.token]), abs=1e-3)
        assert [t for t, _ in got.top] == want.topk(5).indices.tolist()


def test_answers_about_images_are_those_of_generate(vlm):
    questions = ["what color is the shape?", "a red circle", "blue?", "what?"] * 2
    images = [RED, BLUE, None, RED, BLUE, BLUE, RED, None]
    requests = [vlm_request(vlm, q, i) for q, i in zip(questions, images, strict=True)]
    assert Client(vlm).run(*requests) == vlm.generate(questions, images, GREEDY)
    assert len(set(vlm.generate(questions[:2], images[:2], GREEDY))) == 2


def test_several_images_are_each_at_their_place(vlm):
    """The second question goes on after the first image, and the third after both."""
    turns = [Turn("user", "<image>what?"), Turn("assistant", "a red circle"), Turn("user", "and <image> this?")]
    conversations = [([turns[0]], [RED]), (turns, [RED, BLUE]), ([*turns[:2], turns[2]], [RED, BLUE])]
    client = Client(vlm)
    for conversation, images in conversations:
        request = vlm_request(vlm, conversation, images)
        assert client.run(request) == vlm.generate([conversation], [images], GREEDY)
    assert client.engine.cache.hits == 2
    swapped = vlm_request(vlm, turns, [BLUE, RED])
    assert client.run(swapped) == vlm.generate([turns], [[BLUE, RED]], GREEDY) and not swapped.cached_tokens


def test_a_request_that_comes_later_joins_the_running_batch(lm):
    client = Client(lm)
    first, second = text_request(PROMPTS[0], ignore_eos=True), text_request(PROMPTS[2], ignore_eos=True)
    client.engine.submit(first)
    client.engine.step()
    client.engine.step()
    assert client.engine.stats.decode_steps == 2 and first.new_tokens == 3
    client.engine.submit(second)
    client.engine.step()
    assert second.new_tokens == 2 and first.new_tokens == 4  # one step of both
    client.finish_all()
    assert client.engine.stats.decode_steps == 13
    assert client.text(second) == Client(lm).run(dataclasses.replace(second, new_tokens=0))[0]


class Operations(TorchDispatchMode):
    """Counts the operations of PyTorch."""

    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += 1
        return function(*args, **(kwargs or {}))


def test_one_more_request_in_a_batch_adds_few_operations(vlm):
    """Only states are kept in the cache for each request alone; all else is one operation for the batch."""
    counts = {}
    for n in (4, 8):
        client = Client(vlm, ServeConfig(slots=8))
        images = [Image.new("RGB", (32, 32), (i, 0, 0)) for i in range(n)]
        client.engine.submit(*(vlm_request(vlm, "what?", i, GenerationConfig(2), ignore_eos=True) for i in images))
        with Operations() as ran:
            client.finish_all()
        counts[n] = ran.n
    n_stores, n_tensors = 3, sum(map(len, vlm.language_model.new_state(1)))
    assert (counts[8] - counts[4]) / 4 <= n_stores * 2 * n_tensors + 16


def test_a_long_prompt_does_not_hold_up_others(lm):
    client = Client(lm, dataclasses.replace(CONFIG, prefill_tokens=128))
    running = text_request(PROMPTS[0], GenerationConfig(40), ignore_eos=True)
    long, short = (
        text_request(random_prompts([1500], TOKENIZER.vocab_size)[0]),
        text_request(PROMPTS[2], ignore_eos=True),
    )
    client.engine.submit(running)
    client.engine.step()
    client.engine.submit(long, short)
    client.engine.step()
    assert short.new_tokens == 2 and long.new_tokens == 0  # the short one had its turn beside the long one
    for _ in range(5):
        client.engine.step()
    assert running.new_tokens == 8 and long.new_tokens == 0  # a token a step, while the long prompt is run


def test_users_take_turns():
    queue = WaitingQueue[int]()
    for i in range(4):
        queue.push(b"many", i)
    queue.push(b"one", 10)
    assert queue.remove(b"many", 1) and not queue.remove(b"many", 1) and not queue.remove(b"none", 1)
    assert len(queue) == 4
    assert [queue.pop() for _ in range(3)] == [0, 10, 2]
    assert queue.clear() == [3]
    with pytest.raises(IndexError):
        queue.pop()


def test_a_full_queue_refuses_all_of_a_call_and_nothing_else(lm):
    client = Client(lm, dataclasses.replace(CONFIG, slots=2, max_waiting=1))
    accepted = [text_request(PROMPTS[i]) for i in range(2)]
    client.engine.submit(*accepted)
    with pytest.raises(Busy):
        client.engine.submit(text_request(PROMPTS[2]), text_request(PROMPTS[3]))
    assert len(client.engine.waiting) == 2
    client.engine.submit(text_request(PROMPTS[2]))
    client.finish_all()
    assert client.engine.stats.finished == 3


def test_a_cancelled_request_leaves_its_slot_and_the_others_alone(lm):
    client = Client(lm)
    requests = [text_request(p, ignore_eos=True) for p in PROMPTS[:6]]
    client.engine.submit(*requests)
    client.engine.step()
    client.engine.cancel(requests[0])  # runs
    client.engine.cancel(requests[3])  # its prompt is being run
    client.engine.cancel(requests[5])  # waits
    n_events = [len(client.events[r]) for r in requests]
    client.finish_all()
    assert client.engine.stats.cancelled == 3 and client.engine.stats.finished == 3
    for i, request in enumerate(requests):
        if i in (0, 3, 5):
            assert len(client.events[request]) == n_events[i]
        else:
            assert client.text(request) == Client(lm).run(dataclasses.replace(request, new_tokens=0))[0]


def test_stop_strings_end_an_answer_and_are_not_part_of_it(lm):
    text, _ = alone(lm, PROMPTS[3], GREEDY)
    stop = next(c for c in text[1:] if c.isascii())
    sampling = dataclasses.replace(GREEDY, stop=(stop,))
    client, request = Client(lm), text_request(PROMPTS[3], sampling)
    assert client.run(request) == [text[: text.index(stop)]]
    assert client.finish(request) == "stop"
    whole = text_request(PROMPTS[3], ignore_eos=True)
    client.run(whole)
    assert client.finish(whole) == "length" and whole.new_tokens == 12


def test_a_failed_step_ends_its_requests_and_no_later_ones(lm, monkeypatch):
    client = Client(lm)
    with monkeypatch.context() as patch:
        patch.setattr(client.engine, "_decode", lambda: 1 / 0)
        client.engine.start()
        failed = text_request(PROMPTS[0])
        client.engine.submit(failed)
        wait_for(lambda: client.finish(failed))
    assert client.finish(failed) == "error" and "failed" in client.events[failed][-1].error
    request = text_request(PROMPTS[0])
    client.engine.submit(request)
    wait_for(lambda: client.finish(request))
    assert client.text(request) == alone(lm, PROMPTS[0], GREEDY)[0]
    client.engine.stop()
    with pytest.raises(Stopping):
        client.engine.submit(request)


@pytest.mark.parametrize("part", ["_share", "_embed", "_choose", "_join", "_push"])
def test_wherever_a_step_fails_each_of_its_requests_gets_an_error(lm, monkeypatch, part):
    """Also those that are neither in a batch of prompts nor in the running one, as between the two."""
    client = Client(lm)
    client.run(text_request(PROMPTS[0]))
    known, new = text_request(PROMPTS[0]), text_request(PROMPTS[2])
    later = text_request(PROMPTS[1])
    with monkeypatch.context() as patch:
        patch.setattr(client.engine, part, lambda *_: 1 / 0)
        client.engine.submit(known, new)
        client.engine.start()
        wait_for(lambda: client.finish(known) and client.finish(new))
    assert client.finish(new) == "error" and client.finish(known) in ("error", "stop", "length")
    client.engine.submit(later)
    wait_for(lambda: client.finish(later))
    assert client.text(later) == alone(lm, PROMPTS[1], GREEDY)[0]
    client.engine.stop()
    assert not client.engine._admitted and client.engine.n_active == 0


@pytest.mark.parametrize("value", [1e-308, 1e308])
@pytest.mark.parametrize("field", ["temperature", "repetition_penalty", "top_p"])
def test_extreme_settings_of_one_request_leave_the_others_alone(lm, field, value):
    extreme = dataclasses.replace(SAMPLED, **{field: min(value, 1.0) if field == "top_p" else value})
    requests = [text_request(PROMPTS[i], extreme if i == 1 else SAMPLED) for i in range(3)]
    client = Client(lm)
    texts = client.run(*requests)
    assert texts == [alone(lm, r.prompt.ids, r.sampling)[0] for r in requests]
    assert client.engine.stats.failed == 0


def test_an_unfinished_request_gets_an_error_at_a_stop(lm):
    client = Client(lm, dataclasses.replace(CONFIG, slots=1))
    requests = [text_request(PROMPTS[0]), text_request(PROMPTS[1])]
    client.engine.submit(*requests)
    client.engine.step()
    client.engine.stop()
    assert [client.finish(r) for r in requests] == ["error", "error"]


def test_of_two_stops_at_once_one_ends_a_request(lm):
    both_read = threading.Barrier(2)

    class ReadByBoth(dict):
        def __iter__(self):
            requests = list(super().__iter__())
            with contextlib.suppress(threading.BrokenBarrierError):
                both_read.wait(0.5)  # for the other thread, which comes if nothing keeps it out
            return iter(requests)

    client = Client(lm, dataclasses.replace(CONFIG, slots=1))
    requests = [text_request(PROMPTS[0]), text_request(PROMPTS[1])]
    client.engine.submit(*requests)
    client.engine.step()
    client.engine._admitted = ReadByBoth(client.engine._admitted)
    with ThreadPoolExecutor(2) as pool:
        for stopped in [pool.submit(client.engine.stop) for _ in range(2)]:
            stopped.result()
    assert [[e.finish for e in client.events[r] if e.finish] for r in requests] == [["error"], ["error"]]
    assert client.engine.stats.failed == 2


def test_graphs_get_few_batch_sizes(lm, monkeypatch):
    engine = Client(lm, dataclasses.replace(CONFIG, slots=12)).engine
    assert [engine._batch_rows(n) for n in (1, 3, 11)] == [1, 3, 11]
    monkeypatch.setattr("vlmamba.serve.engine.has_graphs", lambda device: True)
    assert [engine._batch_rows(n) for n in (1, 2, 3, 5, 8, 9, 12)] == [1, 2, 4, 8, 8, 12, 12]
    client = Client(lm)
    requests = [text_request(p) for p in PROMPTS[:7]]
    texts = client.run(*requests)  # with rows of no sequence
    assert texts == [alone(lm, p, GREEDY)[0] for p in PROMPTS[:7]]

"""State cache: a known prefix goes on from its state, with the same answer, in bounded memory, for its user alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image

from tests.makers import BLUE, RED, language_config, random_prompts, sharpened_lm
from tests.serve.makers import (
    CONFIG,
    GREEDY,
    SAMPLED,
    TOKENIZER,
    Client,
    alone,
    small_vlm,
    text_request,
    vlm_request,
)
from vlmamba.model import GenerationConfig, Turn
from vlmamba.model.batch import Sample
from vlmamba.model.generation.decoding import state_bytes
from vlmamba.serve.prompts import ImageSpan, Prompt
from vlmamba.serve.state_cache import StateCache

IDS = random_prompts([90], TOKENIZER.vocab_size)[0]


@pytest.fixture(scope="module")
def lm():
    return sharpened_lm(language_config("mamba"), TOKENIZER)


@pytest.fixture(scope="module")
def vlm():
    return small_vlm("mamba2")


def prompt(ids, salt=b"", images=()):
    return Prompt(Sample(list(ids), []), tuple(images), salt)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_a_prompt_that_was_seen_is_not_run_again_and_gets_the_same_answer(lm, sampling):
    client = Client(lm)
    first, again = text_request(IDS, sampling, logprobs=2), text_request(IDS, sampling, logprobs=2)
    assert client.run(first) == client.run(again)
    assert (first.cached_tokens, again.cached_tokens) == (0, 90)
    assert client.logprobs(first) == client.logprobs(again)
    assert client.engine.stats.prompt_tokens == 90


def test_tokens_after_an_answer_go_on_from_its_state(lm):
    client, first = Client(lm), text_request(IDS, logprobs=0, ignore_eos=True)
    client.run(first)
    seen = IDS + [p.token for p in client.logprobs(first)][:-1]
    after = text_request([*seen, 7, 8])
    assert client.run(after)[0] == alone(lm, after.prompt.ids, GREEDY)[0]
    assert after.cached_tokens == len(seen)


def test_a_conversation_continues_from_its_past(vlm):
    client, known = Client(vlm), 0
    turns = [Turn("user", "what color is the shape?")]
    for _ in range(3):
        request = vlm_request(vlm, turns, RED)
        (answer,) = client.run(request)
        assert answer == vlm.generate([turns], [RED], GREEDY)[0]
        # An answer of broken characters has other tokens in the next prompt: that goes on from the question before.
        assert request.cached_tokens >= known
        known = len(request.prompt.ids)
        turns = [*turns, Turn("assistant", answer), Turn("user", "a red circle?")]
    assert client.engine.cache.hits == 2


def test_an_image_that_was_seen_is_not_encoded_again(vlm, monkeypatch):
    client = Client(vlm)
    client.run(vlm_request(vlm, "what?", RED))
    encoded = []
    monkeypatch.setattr(vlm.vision, "forward", lambda images: encoded.append(images))
    request = vlm_request(vlm, "a blue triangle?", RED)
    (answer,) = client.run(request)
    monkeypatch.undo()
    assert request.cached_tokens == 16 and not encoded
    assert answer == vlm.generate(["a blue triangle?"], [RED], GREEDY)[0]
    other = vlm_request(vlm, "what?", BLUE)
    assert client.run(other) == vlm.generate(["what?"], [BLUE], GREEDY) and not other.cached_tokens


@pytest.mark.parametrize("state_dtype", ["bfloat16", "float16", "int8"])
def test_a_question_about_a_seen_image_adds_its_rounding(vlm, state_dtype):
    """Log-probabilities differ by the rounding of that state, and the slot is counted on from it."""
    logprobs = []
    for seen in (False, True):
        client = Client(vlm, dataclasses.replace(CONFIG, state_dtype=state_dtype))
        if seen:
            client.run(vlm_request(vlm, "what?", RED))
        request = vlm_request(vlm, "a blue triangle?", RED, GenerationConfig(1, state_dtype=state_dtype), logprobs=20)
        client.run(request)
        assert request.cached_tokens == (16 if seen else 0)
        logprobs.append(dict(client.logprobs(request)[0].top))
    differences = [abs(logprobs[0][t] - logprobs[1][t]) for t in logprobs[0].keys() & logprobs[1].keys()]
    assert len(differences) > 10 and 0 < max(differences) < {"bfloat16": 1, "float16": 0.1, "int8": 2}[state_dtype]


def test_an_image_at_another_place_has_its_features_and_another_state(vlm):
    client = Client(vlm)
    client.run(vlm_request(vlm, "what?", RED))
    turns = [Turn("user", "<image> and <image>?")]
    request = vlm_request(vlm, turns, [BLUE, RED])
    assert client.run(request) == vlm.generate([turns], [[BLUE, RED]], GREEDY)
    assert (request.cached_tokens, client.engine.features.hits, client.engine.features.misses) == (0, 1, 2)


def test_images_of_two_users_are_encoded_apart(vlm):
    """Also where they come together, so that not even the time of an answer tells who sent the same."""
    client, encoded = Client(vlm), []
    hook = vlm.vision.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0][0])))
    requests = [vlm_request(vlm, "what?", RED, salt=salt) for salt in (b"one", b"two", b"one")]
    answers = client.run(*requests)
    hook.remove()
    assert sum(encoded) == 2 and len(set(answers)) == 1
    assert len({r.prompt.images[0].digest for r in requests}) == 2


def test_nothing_of_one_user_reaches_another(vlm):
    client = Client(vlm)
    requests = [vlm_request(vlm, "what?", RED, salt=salt) for salt in (b"one", b"two", b"one")]
    answers = [client.run(r)[0] for r in requests]
    assert [r.cached_tokens > 0 for r in requests] == [False, False, True]
    assert len(set(answers)) == 1


def test_a_state_of_the_cache_is_not_changed_by_those_who_go_on_from_it(lm):
    client = Client(lm)
    client.run(text_request(IDS[:64]))
    kept = client.engine.cache.find(prompt(IDS[:64]))
    before = [t.clone() for layer in kept.state for t in layer]
    longer = [text_request(IDS[: 64 + n], ignore_eos=True) for n in (5, 20, 0)]
    client.run(*longer)
    assert [r.cached_tokens for r in longer] == [64, 64, 64]
    assert all(torch.equal(a, b) for a, b in zip(before, (t for layer in kept.state for t in layer), strict=True))


def test_digests_depend_on_salt_tokens_and_images():
    span = ImageSpan(2, 4, b"a" * 32)
    ids = [5, 6, -200, -200, 7]
    same = prompt(ids, images=[span]).digests(ids, [2, 5])
    assert same == prompt(ids, images=[span]).digests(ids, [2, 5])
    assert same[0] == prompt([5, 6, 9]).digests([5, 6, 9], [2])[0]
    others = [
        prompt(ids, images=[span._replace(digest=b"b" * 32)]).digests(ids, [5]),
        prompt(ids, b"x", [span]).digests(ids, [5]),
        prompt([*ids[:4], 8], images=[span]).digests([*ids[:4], 8], [5]),
        prompt([0, *ids]).digests([0, *ids], [6]),
    ]
    assert len({same[1], *(d for (d,) in others)}) == 5


def test_no_prefix_ends_within_an_image(lm):
    cache, state = StateCache(10**6), lm.new_state(1)
    cache.store(prompt([5, 6, 7]), [5, 6, 7], state)
    ids = [5, 6, -200, -200, 7]
    assert cache.find(prompt(ids, images=[ImageSpan(2, 4, b"a" * 32)])) is None


def test_the_least_recently_used_states_leave_when_memory_is_full(lm):
    state = lm.new_state(1)
    size = state_bytes(state)
    cache = StateCache(3 * size)
    for i in range(3):
        cache.store(prompt([i]), [i], state)
    assert cache.find(prompt([0, 9])).length == 1  # used: 1 is now the oldest
    cache.store(prompt([3]), [3], state)
    assert (len(cache), cache.n_bytes, cache.evictions) == (3, 3 * size, 1)
    assert [cache.find(prompt([i, 9])) is not None for i in range(4)] == [True, False, True, True]
    assert (cache.hits, cache.misses) == (4, 1)
    cache.store(prompt([4]), [4], lm.new_state(4))  # larger than all memory
    assert len(cache) == 3


def test_only_a_prefix_with_logits_answers_for_the_entire_prompt(lm):
    cache, state = StateCache(10**6), lm.new_state(1)
    cache.store(prompt([1, 2]), [1, 2], state)
    assert cache.find(prompt([1, 2])) is None
    cache.store(prompt([1, 2]), [1, 2], state, torch.zeros(4))
    assert cache.find(prompt([1, 2])).logits is not None
    cache.store(prompt([1, 2]), [1, 2], state)  # logits stay
    assert cache.find(prompt([1, 2])).logits is not None and len(cache) == 1


def test_without_memory_nothing_is_kept(lm):
    client = Client(lm, dataclasses.replace(CONFIG, cache_mb=0))
    for _ in range(2):
        request = text_request(IDS, GenerationConfig(3))
        client.run(request)
        assert request.cached_tokens == 0
    assert len(client.engine.cache) == 0 and client.engine.cache.n_bytes == 0


def test_images_of_other_pixels_have_other_states(vlm):
    client = Client(vlm)
    almost = RED.copy()
    almost.putpixel((0, 0), (254, 0, 0))
    assert isinstance(almost, Image.Image)
    for image in (RED, almost):
        request = vlm_request(vlm, "what?", image)
        client.run(request)
        assert request.cached_tokens == 0

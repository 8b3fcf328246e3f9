"""Scores of given answers against plain forward passes, and against `transformers`."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from tests.makers import BLUE, RED, VISION, language_config, shape_tokenizer, sharpened_vlm
from tests.model.originals import config_pair, random_original, with_weights_of
from vlmamba.connectors import ConnectorConfig
from vlmamba.model import Turn, VLMConfig, collate
from vlmamba.model.score import Score, pick, score

CONFIGS = {layer: config_pair(layer, 2) for layer in ("mamba", "mamba2")}


@pytest.fixture(params=CONFIGS)
def pair(request):
    """Our model and theirs with the same weights."""
    ours_config, theirs_config = CONFIGS[request.param]
    theirs = random_original(theirs_config, embedding_scale=10)
    return with_weights_of(theirs, ours_config), theirs


def tokens(*lengths):
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(1, 101, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def by_transformers(model, prompt, answer):
    """Each pair alone, the whole of it in one pass."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    at = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
    return Score(float(at.sum()), logits.argmax(-1).tolist() == answer, len(answer))


def assert_scores(got, want):
    assert [s[1:] for s in got] == [s[1:] for s in want]
    torch.testing.assert_close([s.logprob for s in got], [s.logprob for s in want], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_scores_are_those_of_transformers(pair, batch_size, monkeypatch):
    ours, theirs = pair
    monkeypatch.setattr(sys.modules["vlmamba.model.score"], "PREFILL_CHUNK", 7)
    few = tokens(5, 1, 23)
    prompts = [few[i] for i in (0, 1, 0, 2, 1, 0, 2)]
    answers = tokens(1, 4, 1, 12, 9, 2, 30)
    with torch.no_grad():
        for i in (0, 5):  # answers that are the likeliest, so that greedy is not always False
            answers[i] = []
            for _ in range(3):
                answers[i].append(int(theirs(torch.tensor([prompts[i] + answers[i]])).logits[0, -1].argmax()))
    got = score(ours, prompts, answers, batch_size)
    assert_scores(got, [by_transformers(theirs, p, a) for p, a in zip(prompts, answers, strict=True)])
    assert [s.greedy for s in got] == [True, False, False, False, False, True, False]


def test_a_prompt_is_run_once_for_all_its_answers(pair):
    ours, _ = pair
    (prompt,), answers = tokens(40), tokens(3, 1, 2)
    ran = []

    def watch(module, args, kwargs):
        ran.append(kwargs["inputs_embeds"].shape[1])

    ours.register_forward_pre_hook(watch, with_kwargs=True)
    score(ours, [prompt] * 3, answers)
    assert ran == [40, 2 + 1]  # the last token of an answer predicts nothing that is asked


def test_no_pairs_no_scores(pair):
    assert score(pair[0], [], []) == []


def test_bad_arguments_are_named(pair):
    lm, _ = pair
    with pytest.raises(ValueError, match=r"answers must have one entry a prompt \(2\), got 1"):
        score(lm, [[1], [2]], [[3]])
    with pytest.raises(ValueError, match=r"prompts\[1\] must have at least one token"):
        score(lm, [[1], []], [[3], [4]])
    with pytest.raises(ValueError, match=r"answers\[0\] must have at least one token"):
        score(lm, [[1], [2]], [[], [4]])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        score(lm, [[1]], [[3]], 0)


def test_pick_takes_the_likeliest():
    scores = [Score(-3.0, False, 1), Score(-2.0, False, 1), Score(-4.0, False, 8), Score(-2.0, False, 1)]
    assert pick(scores) == 1
    assert pick(scores, per_token=True) == 2
    with pytest.raises(ValueError, match="must not be empty"):
        pick([])


TOKENIZER = shape_tokenizer()


@pytest.fixture(params=["qa", "zephyr"])
def vlm(request):
    config = VLMConfig(language_config("mamba2"), (VISION,), ConnectorConfig("mlp"), template=request.param)
    return sharpened_vlm(config, TOKENIZER)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_answers_about_images_have_the_loss_of_training(vlm, batch_size):
    conversations = ["what color?", [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "and now?")], "none"]
    images = [RED, BLUE, None]
    answers = [["red", "a blue triangle"], ["circle"], ["a", "a red circle", "red"]]
    got = vlm.score(conversations, images, answers, batch_size)
    assert [len(s) for s in got] == [2, 1, 3]
    for said, image, texts, scores in zip(conversations, images, answers, got, strict=True):
        turns = [Turn("user", said)] if isinstance(said, str) else said
        for text, one in zip(texts, scores, strict=True):
            sample = vlm.prepare([*turns, Turn("assistant", text)], image)
            # Only the last answer is asked about.
            prompt = vlm.prepare(turns, image).input_ids
            sample = replace(sample, labels=[-100] * len(prompt) + sample.labels[len(prompt) :])
            with torch.no_grad():
                loss, n, _ = vlm(collate([sample]))
            assert one.tokens == n
            assert one.logprob == pytest.approx(-float(loss) * n, rel=1e-5, abs=1e-5)
            assert not one.greedy


def test_bad_answers_are_named(vlm):
    with pytest.raises(ValueError, match=r"answers must have one list a conversation \(1\), got 2"):
        vlm.score(["a"], [None], [["b"], ["c"]])
    with pytest.raises(ValueError, match=r"answers\[0\] must be a list of texts, got the text 'red'"):
        vlm.score(["a"], [None], ["red"])

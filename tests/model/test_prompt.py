"""Prompt templates: the texts of the published models, and labels on answers only."""

from __future__ import annotations

import pytest

from tests.makers import shape_tokenizer
from vlmamba.model import IGNORE, IMAGE_TOKEN, Turn
from vlmamba.model.prompt import get_template

TOKENIZER = shape_tokenizer()
TURNS = [Turn("user", "What is this?"), Turn("assistant", "A circle"), Turn("user", "Red?"), Turn("assistant", "yes")]


def texts(name, turns):
    ids, labels = get_template(name).encode(TOKENIZER, turns)
    targets = [t for t in labels if t != IGNORE]
    return TOKENIZER.inner.decode(ids, skip_special_tokens=False), TOKENIZER.inner.decode(targets, False)


def test_zephyr_is_as_ml_mamba_has_it():
    complete, targets = texts("zephyr", TURNS)
    assert complete == (
        "<|user|>\nWhat is this?<|endoftext|>\n<|assistant|>\nA circle<|endoftext|>"
        "\n<|user|>\nRed?<|endoftext|>\n<|assistant|>\nyes<|endoftext|>"
    )
    assert targets == "A circle<|endoftext|>yes<|endoftext|>"
    assert texts("zephyr", [TURNS[0], Turn("assistant", "")])[1] == " <|endoftext|>"


def test_vicuna_and_caption():
    complete, _ = texts("vicuna", TURNS)
    assert complete.startswith("A chat between a curious user")
    assert complete.endswith(
        " USER: What is this? ASSISTANT: A circle<|endoftext|> USER: Red? ASSISTANT: yes<|endoftext|>"
    )
    assert texts("caption", TURNS[:2]) == ("A circle<|endoftext|>", "A circle<|endoftext|>")


@pytest.mark.parametrize("name", ["zephyr", "vicuna", "qa"])
def test_a_prompt_has_the_tokens_of_training(name):
    template = get_template(name)
    prompt, _ = template.encode(TOKENIZER, TURNS[:3], 4)
    complete, labels = template.encode(TOKENIZER, TURNS, 4)
    assert complete[: len(prompt)] == prompt
    assert prompt[:4] == [IMAGE_TOKEN] * 4
    assert labels[:4] == [IGNORE] * 4
    assert len(complete) == len(labels)


def test_image_marks_in_messages_are_taken_out():
    assert texts("qa", [Turn("user", "<image>\nWhat?")])[0] == "What?\n"


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "at least one turn"),
        ([Turn("assistant", "hello")], "turn 0 of a conversation must be by the user, got 'assistant'"),
        ([Turn("user", "a"), Turn("user", "b")], "turn 1 of a conversation must be by the assistant"),
        ([Turn("user", "a"), Turn("system", "b")], "got 'system'"),
    ],
)
def test_malformed_conversations_are_named(turns, message):
    with pytest.raises(ValueError, match=message):
        get_template("qa").encode(TOKENIZER, turns)


def test_an_unknown_template_is_named():
    with pytest.raises(ValueError, match="template must be one of zephyr, .*; got 'chatml'"):
        get_template("chatml")

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
    prompt, _ = template.encode(TOKENIZER, TURNS[:3], [4])
    complete, labels = template.encode(TOKENIZER, TURNS, [4])
    assert complete[: len(prompt)] == prompt
    assert prompt[:4] == [IMAGE_TOKEN] * 4
    assert labels[:4] == [IGNORE] * 4
    assert len(complete) == len(labels)


def layout(name, turns, image_tokens):
    """Text of the tokens, with the number of each image in braces for its tokens."""
    ids, labels = get_template(name).encode(TOKENIZER, turns, image_tokens)
    assert len(ids) == len(labels) and all(b == IGNORE for a, b in zip(ids, labels, strict=True) if a == IMAGE_TOKEN)
    parts, sizes = [], iter(enumerate(image_tokens))
    while ids:
        n = next((i for i, t in enumerate(ids) if t == IMAGE_TOKEN), len(ids))
        parts.append(TOKENIZER.inner.decode(ids[:n], skip_special_tokens=False))
        if n < len(ids):
            number, size = next(sizes)
            assert ids[n : n + size] == [IMAGE_TOKEN] * size
            parts.append(f"{{{number}}}")
            n += size
        ids = ids[n:]
    return "".join(parts)


@pytest.mark.parametrize("text", ["What?", "<image>\nWhat?", "What?\n<image>", " What?<image> "])
def test_an_only_image_of_the_first_turn_comes_first_wherever_its_mark_is(text):
    for name, want in (("qa", "{0}What?\n"), ("zephyr", "{0}<|user|>\nWhat?<|endoftext|>\n<|assistant|>\n")):
        assert layout(name, [Turn("user", text)], [3]) == want


@pytest.mark.parametrize(
    ("texts", "want"),
    [
        (["<image><image>\nWhat?"], "{0}{1}In: What?\nOut: "),
        (["<image>\nA <image> B <image>"], "{0}In: A {1} B {2}\nOut: "),
        (["A: <image>\nB: <image>"], "In: A: {0}\nB: {1}\nOut: "),
        (["What?", "<image>\nAnd <image>?"], "In: What?\nOut: a<|endoftext|>\nIn: {0}\nAnd {1}?\nOut: "),
        (["x <image>", "y <image>"], "{0}In: x\nOut: a<|endoftext|>\nIn: y {1}\nOut: "),
        (["<image>", "<image>"], "{0}In: \nOut: a<|endoftext|>\nIn: {1}\nOut: "),
    ],
)
def test_each_image_stands_at_its_mark(texts, want):
    turns = [turn for text in texts for turn in (Turn("user", text), Turn("assistant", "a"))][:-1]
    assert layout("in-out", turns, [2, 5, 1][: want.count("{")]) == want


def test_captions_have_their_images_and_answers_have_none():
    turns = [Turn("user", "<image> and <image>"), Turn("assistant", "<image>red")]
    assert layout("caption", turns, [2, 3]) == "{0}{1}red<|endoftext|>"


@pytest.mark.parametrize(
    ("texts", "n_images", "message"),
    [
        (["<image>"], 0, r"got 1 marks \(1 in turn 0\) for 0 images"),
        (["a", "<image> <image>"], 1, r"got 2 marks \(2 in turn 2\) for 1 images"),
        (["<image>", "<image>"], 3, r"got 2 marks \(1 in turn 0, 1 in turn 2\) for 3 images"),
        (["a"], 2, "got 0 marks for 2 images"),
    ],
)
def test_more_marks_than_images_and_fewer_are_counted_by_turn(texts, n_images, message):
    turns = [turn for text in texts for turn in (Turn("user", text), Turn("assistant", "b"))]
    with pytest.raises(ValueError, match=message):
        get_template("qa").encode(TOKENIZER, turns, [4] * n_images)


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

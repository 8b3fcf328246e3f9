"""Tokens and prompts."""

from __future__ import annotations

import pytest

from vlmamba.model import IGNORE, IMAGE_TOKEN, Tokenizer, Turn
from vlmamba.model.prompt import get_template
from vlmamba.model.tokenizer import TextStream

TOKENIZER = Tokenizer.train(["what color is the shape?", "a red circle", "a blue triangle"] * 5, 320)


@pytest.mark.parametrize("text", ["a red circle", "", "  spaces \n lines", "Grüße, 世界 🐍", "<|endofte"])
def test_any_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_end_of_text_is_one_token():
    assert TOKENIZER.encode("a<|endoftext|>")[-1] == TOKENIZER.eos_id == 0


def test_saved_and_read(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    again = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert again.encode("a red shape") == TOKENIZER.encode("a red shape")
    assert again.vocab_size == TOKENIZER.vocab_size


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer.json"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


def test_a_stream_never_gives_half_a_character():
    text = "a 世界 🐍 red"
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(t) for t in TOKENIZER.encode(text)]
    assert "".join(pieces) + stream.finish() == text
    assert not any("\N{REPLACEMENT CHARACTER}" in p for p in pieces)
    cut = TextStream(TOKENIZER)
    half = TOKENIZER.encode("🐍")[:-1]
    assert [cut.push(t) for t in half] == [""] * len(half)
    assert cut.finish() != ""


TURNS = [Turn("user", "What is this?"), Turn("assistant", "A circle"), Turn("user", "Red?"), Turn("assistant", "yes")]


def texts(name, turns):
    ids, labels = get_template(name).encode(TOKENIZER, turns)
    learned = [t for t in labels if t != IGNORE]
    return TOKENIZER.inner.decode(ids, skip_special_tokens=False), TOKENIZER.inner.decode(learned, False)


def test_zephyr_is_as_ml_mamba_has_it():
    whole, learned = texts("zephyr", TURNS)
    assert whole == (
        "<|user|>\nWhat is this?<|endoftext|>\n<|assistant|>\nA circle<|endoftext|>"
        "\n<|user|>\nRed?<|endoftext|>\n<|assistant|>\nyes<|endoftext|>"
    )
    assert learned == "A circle<|endoftext|>yes<|endoftext|>"
    assert texts("zephyr", [TURNS[0], Turn("assistant", "")])[1] == " <|endoftext|>"


def test_vicuna_and_caption():
    whole, _ = texts("vicuna", TURNS)
    assert whole.startswith("A chat between a curious user")
    assert whole.endswith(
        " USER: What is this? ASSISTANT: A circle<|endoftext|> USER: Red? ASSISTANT: yes<|endoftext|>"
    )
    assert texts("caption", TURNS[:2]) == ("A circle<|endoftext|>", "A circle<|endoftext|>")


@pytest.mark.parametrize("name", ["zephyr", "vicuna", "qa"])
def test_a_prompt_has_the_tokens_of_training(name):
    template = get_template(name)
    prompt, _ = template.encode(TOKENIZER, TURNS[:3], 4)
    whole, labels = template.encode(TOKENIZER, TURNS, 4)
    assert whole[: len(prompt)] == prompt
    assert prompt[:4] == [IMAGE_TOKEN] * 4
    assert labels[:4] == [IGNORE] * 4
    assert len(whole) == len(labels)


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

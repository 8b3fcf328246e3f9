"""Tokenizer and incremental decoding."""

from __future__ import annotations

import random

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tests.makers import shape_tokenizer
from vlmamba.model import MambaLM, Tokenizer
from vlmamba.model.config import LMConfig
from vlmamba.model.tokenizer import REPLACEMENT, TextStream, require_tokenizer

TOKENIZER = shape_tokenizer()


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
    parts = [stream.push(t) for t in TOKENIZER.encode(text)]
    assert "".join(parts) + stream.finish() == text
    assert not any("\N{REPLACEMENT CHARACTER}" in p for p in parts)
    cut = TextStream(TOKENIZER)
    half = TOKENIZER.encode("🐍")[:-1]
    assert [cut.push(t) for t in half] == [""] * len(half)
    assert cut.finish() != ""


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_a_stream_gives_what_decoding_all_tokens_gives(kind):
    """Tokens of random bytes, and pieces whose first space is dropped, as Llama's are."""
    rng = random.Random(0)
    for _ in range(50):
        if kind == "bytes":
            tokenizer, ids = TOKENIZER, [rng.randrange(TOKENIZER.vocab_size) for _ in range(40)]
        else:
            tokenizer = piece_tokenizer()
            ids = tokenizer.encode("".join(rng.choice(["a 世", "  bc", "🐍b", " a"]) for _ in range(12)))
        stream = TextStream(tokenizer)
        parts = []
        for i, token in enumerate(ids):
            parts.append(stream.push(token))
            so_far = tokenizer.decode(ids[: i + 1]).rstrip("\N{REPLACEMENT CHARACTER}")
            assert "".join(parts) == stream.text and len(stream.text) >= len(so_far)
            assert tokenizer.decode(ids).startswith(stream.text)
        assert "".join(parts) + stream.finish() == tokenizer.decode(ids)


def piece_tokenizer() -> Tokenizer:
    """Build a tokenizer of pieces with a mark for spaces, which spells other characters in bytes."""
    names = [*(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "c", "▁a", "bc", "▁▁"]
    inner = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), *((name, -1.0) for name in names)], 0, True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(parts)
    inner.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(inner)


def test_a_token_of_a_stream_costs_the_same_however_long_the_text_is(monkeypatch):
    lengths, decode = [], TOKENIZER.decode
    monkeypatch.setattr(TOKENIZER, "decode", lambda ids: (lengths.append(len(ids)), decode(ids))[1])
    stream = TextStream(TOKENIZER)
    rng = random.Random(0)
    for token in [rng.randrange(TOKENIZER.vocab_size) for _ in range(1500)]:
        stream.push(token)
    assert len(lengths) > 500 and max(lengths) < 40


def test_invalid_bytes_cost_a_stream_no_more_than_text(monkeypatch):
    """Bytes of no character are given together, once a character follows; until then few of them are decoded again."""
    rng = random.Random(0)
    names = [name for name in TOKENIZER.inner.get_vocab() if len(name) == 1]
    pieces = piece_tokenizer()
    invalid = {
        TOKENIZER: [i for i in map(TOKENIZER.inner.token_to_id, names) if TOKENIZER.decode([i]) == REPLACEMENT],
        pieces: [pieces.inner.token_to_id(f"<0x{i:02X}>") for i in range(128, 192)],
    }
    for tokenizer, tokens in invalid.items():
        for _ in range(20):
            ids = [*tokenizer.encode("a"), *rng.choices(tokens, k=200), *tokenizer.encode("bc"), *tokens[:1]]
            with monkeypatch.context() as patch:
                lengths, decode = [], tokenizer.decode
                patch.setattr(tokenizer, "decode", lambda x, d=decode, n=lengths: (n.append(len(x)), d(x))[1])
                stream = TextStream(tokenizer)
                parts = [stream.push(token) for token in ids]
            assert len(lengths) > 100 and max(lengths) < 40
            assert not any(part.endswith(REPLACEMENT) for part in parts)
            assert "".join(parts) == stream.text == tokenizer.decode(ids[:-1]).rstrip(REPLACEMENT)
            assert stream.text + stream.finish() == tokenizer.decode(ids)


def test_special_tokens_leave_a_stream_as_it_is():
    stream, half = TextStream(TOKENIZER), TOKENIZER.encode("🐍")
    for token in half:
        assert [stream.push(TOKENIZER.eos_id) for _ in range(100)] == [""] * 100
        text = stream.push(token)
    assert text == stream.text == "🐍"


def test_a_model_without_a_tokenizer_is_named():
    model = MambaLM(LMConfig(16, 1, 50))
    with pytest.raises(ValueError, match="the model has no tokenizer: set model.tokenizer"):
        require_tokenizer(model)
    model.tokenizer = TOKENIZER
    assert require_tokenizer(model) is TOKENIZER


def test_another_end_of_text_token_is_saved_beside(tmp_path):
    inner = TOKENIZER.inner
    other = Tokenizer(inner, "a")
    other.save(tmp_path / "tokenizer.json")
    assert Tokenizer.from_file(tmp_path / "tokenizer.json").eos_id == inner.token_to_id("a")
    with pytest.raises(ValueError, match="the tokenizer has no token '<end>'"):
        Tokenizer(inner, "<end>")


def test_sizes_cover_every_token():
    vocabulary = TOKENIZER.inner.get_vocab()
    assert TOKENIZER.vocab_size == len(vocabulary)
    assert TOKENIZER.longest_token == max(map(len, vocabulary))

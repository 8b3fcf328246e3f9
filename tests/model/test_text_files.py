"""Text files: one way to cut lines and to tell what is wrong, whoever reads them."""

from __future__ import annotations

import json

import pytest

from vlmamba.model import Tokenizer
from vlmamba.model.config_io import load_config
from vlmamba.model.formats import read_json as read_checkpoint_json
from vlmamba.model.image import ImageProcessor
from vlmamba.model.text_files import parse_json, read_json, read_text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"one\ntwo\nthr\xffee\n", r"f.json, line 3: not UTF-8: byte 0xff"),
        ("text".encode("utf-16"), "f.json: is UTF-16; save it as UTF-8"),
        ("text".encode("utf-32"), "f.json: is UTF-32; save it as UTF-8"),
        (b"caf\xe9", "f.json, line 1: not UTF-8: byte 0xe9"),
    ],
)
def test_another_encoding_is_named_with_its_line(tmp_path, data, message):
    path = tmp_path / "f.json"
    path.write_bytes(data)
    for read in (read_text, read_json, read_checkpoint_json):
        with pytest.raises(ValueError, match=message):
            read(path)
    with pytest.raises(ValueError, match=message):
        load_config(ImageProcessor, path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ("1" * 5000, "digits"),
        (r'["\ud83d"]', r"half a surrogate pair, U\+D83D"),
        (r'{"\uDE00": 1}', r"half a surrogate pair, U\+DE00"),
        ('["\udc80"]', "not UTF-8: byte 0x80"),
        (b'["\xff"]', "not UTF-8: byte 0xff"),
        ('{"a": }', "Expecting value"),
        ("", "Expecting value"),
    ],
)
def test_every_fault_of_json_is_a_value_error(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_complete_json_is_read():
    for value in ("🙂", "\\ud83d", 7**500, "\u2028\x85", "\ufeff"):
        for ascii_only in (True, False):
            assert parse_json(json.dumps(value, ensure_ascii=ascii_only)) == value
    assert parse_json(b"\xef\xbb\xbf[1]") == [1]


def test_configs_with_a_byte_order_mark_are_read(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "c.json").write_bytes(mark + b'{"size": 32}')
    assert load_config(ImageProcessor, tmp_path / "c.json") == ImageProcessor(32)
    assert read_checkpoint_json(tmp_path / "c.json") == {"size": 32}
    Tokenizer.train(["a"], 280).save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_bytes(mark + b'{"eos_token": "<|endoftext|>"}')
    assert Tokenizer.from_file(tmp_path / "tokenizer.json").eos == "<|endoftext|>"


@pytest.mark.parametrize("deep", ["[" * 100_000, '{"eos_token": ' * 100_000])
def test_a_config_nested_too_deeply_is_named(tmp_path, deep):
    (tmp_path / "c.json").write_text(deep)
    with pytest.raises(ValueError, match=r"c.json is not valid JSON: it is nested too deeply"):
        load_config(ImageProcessor, tmp_path / "c.json")

"""Text and JSON files: UTF-8 with or without a byte order mark, lines that end at a line feed, errors with their line.

Data, prompts and configs are all read here. `str.splitlines` is not used on them: it cuts at characters such as U+2028,
U+0085 and the form feed, which JSON leaves unescaped inside a string.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

_FOREIGN = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Byte order marks of other encodings, the longer before those that they begin with."""


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file whole, without its byte order mark and with its line ends as they are.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8; file and line are named.
    """
    return decode(Path(path).read_bytes(), str(path))


def read_lines(path: str | Path) -> list[str]:
    """Read the lines of a UTF-8 file without their ends, which are a line feed, or a carriage return and a line feed.

    Raises:
        OSError, ValueError: as `read_text`.
    """
    lines = read_text(path).split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_json(path: str | Path) -> Any:
    """Read a file that holds one JSON value.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8 or not JSON; the file and, where there is one, the line are named.
    """
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as e:
        raise ValueError(f"{path} is not valid JSON: {e}") from e


def parse_json(text: str | bytes) -> Any:
    """Decode JSON that somebody else wrote. Every fault in it is a ValueError.

    Raises:
        ValueError: it is not JSON or not UTF-8; it is nested too deeply, or has a number of too many digits; or a
            string in it has half a surrogate pair, which is no character and has no UTF-8.
    """
    if isinstance(text, bytes):
        text = decode(text)
    elif not text.isascii():
        _check_characters(text)
    try:
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:  # an escape of a surrogate: alone, it cannot be encoded
            _check_characters(json.dumps(value, ensure_ascii=False))
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e
    return value


def decode(data: bytes, name: str = "") -> str:
    """Decode UTF-8, without its byte order mark.

    Args:
        data: a whole file, or a line or a record of one.
        name: the file, where `data` is a whole one; it stands in errors, with the line.

    Raises:
        ValueError: it is not UTF-8.
    """
    where = f"{name}: " if name else ""
    for mark, encoding in _FOREIGN.items():
        if data.startswith(mark):
            raise ValueError(f"{where}is {encoding}; save it as UTF-8")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as e:
        line = 1 + data.count(b"\n", 0, e.start)
        where = f"{name}, line {line}: " if name else ""
        raise ValueError(f"{where}not UTF-8: byte 0x{data[e.start]:02x}, {e.reason}") from e


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        code = ord(text[e.start])
        if 0xDC80 <= code <= 0xDCFF:  # a byte that the "surrogateescape" handler let through
            raise ValueError(f"not UTF-8: byte 0x{code - 0xDC00:02x}") from e
        raise ValueError(f"it has half a surrogate pair, U+{code:04X}, which is no character") from e

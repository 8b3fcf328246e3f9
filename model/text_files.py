"""Text and JSON files: UTF-8 with or without a byte order mark, and errors that name the file and its line.

All data, prompts and configs are decoded here. Only a line feed ends a line, so `str.splitlines` is not used: it splits
at characters such as U+2028, U+0085 and the form feed, which JSON leaves unescaped inside a string.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any, BinaryIO

_FOREIGN = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Byte order marks of other encodings, longer ones before their prefixes."""


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file, without its byte order mark and with unchanged line ends.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8; file and line are named.
    """
    return decode(Path(path).read_bytes(), str(path))


def read_json(path: str | Path) -> Any:
    """Read a file with one JSON value.

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
    """Decode untrusted JSON. Every fault in it is a ValueError.

    Raises:
        ValueError: it is not JSON or not UTF-8; it is nested too deeply, or has a number of too many digits; or a
            string in it has half a surrogate pair, which is no character and has no UTF-8.
    """
    if isinstance(text, bytes):
        text = decode(text)
    try:
        value = json.loads(text)
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e
    check_characters(text, value)
    return value


def check_characters(text: str, value: Any) -> None:
    """Check that UTF-8 can encode JSON text and its decoded value.

    Raises:
        ValueError: a string has half a surrogate pair, or a byte that the "surrogateescape" handler let through.
    """
    try:
        text.encode()
        if "\\ud" in text or "\\uD" in text:  # an escape of half a pair
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e
    except UnicodeEncodeError as e:
        code = ord(e.object[e.start])
        if 0xDC80 <= code <= 0xDCFF:
            raise ValueError(f"not UTF-8: byte 0x{code - 0xDC00:02x}") from e
        raise ValueError(f"it has half a surrogate pair, U+{code:04X}, which is no character") from e


def skip_byte_order_mark(file: BinaryIO, name: str | Path) -> None:
    """Skip the byte order mark of a UTF-8 file that was just opened, if it has one.

    Raises:
        ValueError: it has the mark of another encoding.
    """
    start = file.read(4)
    _check_encoding(start, f"{name}: ")
    file.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)


def decode(data: bytes, name: str = "") -> str:
    """Decode UTF-8, without its byte order mark.

    Args:
        data: a file, or a line or record of one.
        name: of the file for errors, if `data` is a complete one; the line is added.

    Raises:
        ValueError: it is not UTF-8.
    """
    _check_encoding(data, f"{name}: " if name else "")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as e:
        line = 1 + data.count(b"\n", 0, e.start)
        where = f"{name}, line {line}: " if name else ""
        raise ValueError(f"{where}not UTF-8: byte 0x{data[e.start]:02x}, {e.reason}") from e


def _check_encoding(data: bytes, where: str) -> None:
    for mark, encoding in _FOREIGN.items():
        if data.startswith(mark):
            raise ValueError(f"{where}is {encoding}; save it as UTF-8")

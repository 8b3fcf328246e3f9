"""Records of JSON lists and JSON Lines files with their byte offsets, in memory independent of the file's size."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..model.limits import MAX_RECORD_BYTES
from ..model.text_files import check_characters, parse_json, skip_byte_order_mark

READ_BYTES = 8 << 20
"""Bytes of a JSON file read at once; more where one record is longer."""
TOO_LARGE = f"it is larger than {MAX_RECORD_BYTES:,} bytes"


class Entry(NamedTuple):
    """A record in its file."""

    start: int
    """Byte offset in the file."""
    size: int
    """Bytes."""
    number: int
    """Index in a list, line number in JSON Lines, or file number in a shard."""
    value: Any
    """The JSON value, or the exception that reading it raised."""
    images: tuple[int, ...] = ()
    """File numbers of its images in a shard, in order."""


def json_lines_entries(path: Path) -> Iterator[Entry]:
    """Yield the records of a JSON Lines file; empty lines are skipped."""
    number = 0
    with open(path, "rb") as file:
        skip_byte_order_mark(file, path)
        start = file.tell()
        while line := file.readline(MAX_RECORD_BYTES + 1):
            number, size = number + 1, len(line)
            if line.strip():
                value: Any = None
                try:
                    if size > MAX_RECORD_BYTES:
                        raise ValueError(TOO_LARGE)
                    value = parse_json(line)
                except ValueError as e:
                    value = ValueError(f"not valid JSON: {e}") if size <= MAX_RECORD_BYTES else e
                while not line.endswith(b"\n") and (line := file.readline(MAX_RECORD_BYTES)):
                    size += len(line)  # the rest of a line that is too large
                yield Entry(start, size, number, value)
            start += size


def json_list_entries(path: Path) -> Iterator[Entry]:
    """Yield the records of a JSON list of any length.

    Raises:
        ValueError: the file is not a JSON list, or is truncated.
    """
    with open(path, "rb") as file:
        text = _JsonText(path, file)
        first = text.peek()
        if first != "[":
            raise ValueError(f"{path} must hold a list of records, but starts with {first!r}")
        text.skip()
        # `[` value `,` value ... `]`, with white space anywhere.
        number = 0
        while text.peek() != "]" or number:
            start = text.byte
            value = text.value(number)
            yield Entry(start, text.byte - start, number, value)
            number += 1
            end = text.peek()
            if end == "]":
                break
            if end != ",":
                raise text.error(number, "is truncated" if not end else f"has {end!r} where a comma must be")
            text.skip()
        text.skip()
        if text.peek():
            raise text.error(number, "has text after the end of its list")


class _JsonText:
    """Incremental parser of a JSON file, which holds only the value being read in memory."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        skip_byte_order_mark(file, path)
        self.decoder = json.JSONDecoder()
        # A byte that is not UTF-8 becomes half a surrogate pair, and so an error of its record alone.
        self.utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at, self.byte, self.ended = "", 0, file.tell(), False

    def peek(self) -> str:
        """Return the next character that is not white space; "" at the end of the file."""
        while True:
            space = _SPACE.match(self.text, self.at)
            assert space is not None  # it may be empty
            end = space.end()
            self.byte += end - self.at
            self.at = end
            if end < len(self.text) or self.ended:
                return self.text[end : end + 1]
            self._read_more()

    def skip(self) -> None:
        """Skip a character of one byte."""
        self.at, self.byte = self.at + 1, self.byte + 1

    def value(self, number: int) -> Any:
        """Read the next value. An error that concerns this value alone is returned instead of it.

        Raises:
            ValueError: the file cannot be read beyond this value.
        """
        self.peek()
        while True:
            # raw_decode parses one value and returns where it ends. It is retried with more text while the value may
            # be incomplete.
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as e:
                # So close to the end of the buffer, the rest of the value may only not be read yet.
                may_continue = e.msg.startswith("Unterminated string") or e.pos > len(self.text) - 16
                if not may_continue:
                    raise self.error(number, f"is not valid JSON: {e.msg}") from e
                if self.ended:
                    raise self.error(number, "is truncated") from e
                if len(self.text) - self.at > MAX_RECORD_BYTES:
                    return self._skip_value(number, ValueError(TOO_LARGE))
                self._read_more()
            except RecursionError:
                return self._skip_value(number, ValueError("not valid JSON: it is nested too deeply"))
            except ValueError as e:  # a number of too many digits
                return self._skip_value(number, ValueError(f"not valid JSON: {e}"))
            else:
                if end == len(self.text) and not self.ended:
                    self._read_more()  # a number may continue
                    continue
                source = self.text[self.at : end]
                self._advance(end)
                if len(source) > MAX_RECORD_BYTES:
                    return ValueError(TOO_LARGE)
                try:
                    check_characters(source, value)
                except ValueError as e:
                    return ValueError(f"not valid JSON: {e}")
                return value

    def _skip_value(self, number: int, error: ValueError) -> ValueError:
        """Skip a value that is not decoded by counting its brackets and quotes, and return the error."""
        depth, in_string, escaped = 0, False, False
        while True:
            found = (_ANY if escaped else _IN_STRING if in_string else _OUTSIDE).search(self.text, self.at)
            if not found:
                self._advance(len(self.text))
                if self.ended:
                    raise self.error(number, "is truncated")
                self._read_more()
                continue
            # Outside of strings brackets and quotes count; inside, the closing quote and backslashes.
            mark = found[0]
            if not in_string and not depth and mark in ",]}":  # the character after a number
                self._advance(found.start())
                return error
            self._advance(found.end())
            if escaped:
                escaped = False
            elif mark == "\\":
                escaped = True
            elif mark == '"':
                in_string = not in_string
            else:
                depth += 1 if mark in "[{" else -1 if mark in "]}" else 0
            if not depth and not in_string and mark != ",":
                return error

    def _advance(self, end: int) -> None:
        # Offsets are in bytes, the buffer in characters.
        passed = self.text[self.at : end]
        self.byte += len(passed) if passed.isascii() else len(passed.encode("utf-8", "surrogateescape"))
        self.at = end

    def error(self, number: int, what: str) -> ValueError:
        """Build the error of a file that cannot be read any further."""
        return ValueError(f"{self.path} {what} (record {number}, after byte {self.byte:,})")

    def _read_more(self) -> None:
        # Read at least as much as is left, so that a long value is scanned O(log n) times.
        rest = self.text[self.at :]
        data = self.file.read(max(READ_BYTES, len(rest)))
        self.ended = not data
        self.text, self.at = rest + self.utf8.decode(data, final=self.ended), 0


_SPACE = re.compile(r"[ \t\n\r]*")
_OUTSIDE, _IN_STRING, _ANY = re.compile(r'["\[\]{},]'), re.compile(r'["\\]'), re.compile(r"(?s:.)")

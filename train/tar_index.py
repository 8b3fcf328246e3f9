"""The entries of an uncompressed tar, read so that no damage passes for its end.

Python's `tarfile` takes a header that is invalid for the end of the archive, and so loses what comes after it without a
word. Here an archive ends with two blocks of zeros and nothing but zeros after them, and all else is an error. Formats:
ustar and pax (IEEE Std 1003.1, pax), GNU tar with long names and sizes in base 256, and the seventh edition's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import BinaryIO, Literal, NamedTuple

BLOCK = 512
MAX_PADDING = 1 << 20
"""Bytes of zeros after the last file. Writers fill up a record of 10 KiB, or of up to 1 MiB for a tape; more are the
part of a download that never came."""
MAX_EXTENSION = 1 << 20
"""Bytes of a long name or of a pax header."""

_FILES, _LINKS, _OTHERS = b"07\0", b"12", b"3456"
"""Types: files; links; devices, folders and pipes, which have no content."""


class Entry(NamedTuple):
    """A file or a link in a tar."""

    name: str
    kind: Literal["file", "link", "symlink"]
    target: str
    """Name that a link leads to: from the archive's root, or, of a symlink, from its own folder."""
    begin: int
    """Offset of the content in the archive, in bytes."""
    size: int
    """Of the content, in bytes."""


class TarError(ValueError):
    """A tar is damaged, cut short, or not a tar; the offset is named."""

    def __init__(self, offset: int, reason: str):
        super().__init__(f"{reason} at byte {offset:,}")


def tar_entries(file: BinaryIO) -> Iterator[Entry]:
    """Entries of a tar in their order, folders and devices left out. Names are as they are written.

    Raises:
        TarError: as soon as the damage is reached.
    """
    total = os.fstat(file.fileno()).st_size
    lasting: dict[str, str] = {}  # pax settings of all entries that follow
    extra: dict[str, str] = {}  # those of the next entry
    extended, at = -1, 0
    while True:
        start = at
        block = _read(file, at, BLOCK)
        if len(block) < BLOCK:
            raise TarError(at, "the file ends without the two blocks of zeros that end a tar")
        if not any(block):
            if extended >= 0:
                raise TarError(extended, "a header that extends the next one, which is missing,")
            _check_end(file, at, total)
            return
        _check_sum(block, at)
        kind, size = block[156:157], _number(block[124:136], at)
        begin = at + BLOCK
        if kind in (b"x", b"g", b"X", b"L", b"K"):
            if size > MAX_EXTENSION:
                raise TarError(at, f"a long name or pax header of {size:,} bytes, where {MAX_EXTENSION:,} are the most")
            content = _read(file, begin, size)
            if len(content) < size:
                raise TarError(at, "the end of the file within the header")
            if kind in (b"L", b"K"):
                extra["path" if kind == b"L" else "linkpath"] = _text(content)
            else:
                (lasting if kind == b"g" else extra).update(_pax_settings(content, at))
            if kind != b"g":
                extended = start
            at = begin + _padded(size)
            continue
        settings = {**lasting, **extra}
        extra, extended = {}, -1
        if any(key.startswith("GNU.sparse.") for key in settings) or kind == b"S":
            raise TarError(at, "a sparse file, whose content is not in one piece (pack it without --sparse),")
        name, target = settings.get("path", _name(block)), settings.get("linkpath", _text(block[157:257]))
        if kind in _LINKS:
            # Its size, if there is one, is its target's.
            yield Entry(name, "link" if kind == b"1" else "symlink", target, begin, 0)
            size = 0
        elif kind in _OTHERS or (kind == b"\0" and name.endswith("/")):  # the latter a folder of the seventh edition
            size = 0
        elif kind in _FILES:
            size = _decimal(settings["size"], at) if "size" in settings else size
            if begin + size > total:
                raise TarError(at, f"the file ends within {name!r}, which has {size:,} bytes and begins")
            yield Entry(name, "file", "", begin, size)
        else:
            raise TarError(at, f"an entry of unknown type {kind!r}")
        at = begin + _padded(size)


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _check_sum(block: bytes, at: int) -> None:
    """Hold a header against its checksum, the sum of its bytes with the checksum itself taken for spaces."""
    rest = block[:148] + b" " * 8 + block[156:]
    difference = sum(rest) - _number(block[148:156], at)
    # Some old writers summed signed characters.
    if difference and difference != 256 * sum(byte > 127 for byte in rest):
        raise TarError(at, "a header whose checksum is wrong")


def _number(field: bytes, at: int) -> int:
    """A number in octal digits; or, where it is too large for those, in base 256."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    found = re.fullmatch(rb" *([0-7]*)[ \0]*", field)
    if not found:
        raise TarError(at, f"a header with {field!r} for a number")
    return int(found[1] or b"0", 8)


def _decimal(text: str, at: int) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise TarError(at, f"a pax header with {text!r} for a size")
    return int(text)


def _name(block: bytes) -> str:
    name = _text(block[:100])
    # GNU tar keeps other things where ustar has the beginning of a long name.
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _pax_settings(content: bytes, at: int) -> dict[str, str]:
    """Settings of a pax header: records of `LENGTH KEY=VALUE`, a line feed at the end of each."""
    settings, begin = {}, 0
    while begin < len(content):
        found = re.compile(rb"([0-9]{1,9}) ([^=]+)=").match(content, begin)
        end = begin + int(found[1]) if found else 0
        if not found or end > len(content) or found.end() >= end or content[end - 1 : end] != b"\n":
            raise TarError(at, "a pax header that is malformed")
        value = content[found.end() : end - 1]
        settings[found[2].decode("utf-8", "backslashreplace")] = value.decode("utf-8", "backslashreplace")
        begin = end
    return settings


def _check_end(file: BinaryIO, at: int, total: int) -> None:
    """Hold what follows a block of zeros against the end of a tar."""
    if total - at < 2 * BLOCK:
        raise TarError(at, "the file ends with one block of zeros, where two end a tar,")
    here = at
    while here < total:
        block = _read(file, here, MAX_PADDING)
        if any(block):
            raise TarError(at, "zeros where a header must be, and data after them,")
        here += len(block)
    if total - at > MAX_PADDING + 2 * BLOCK:
        raise TarError(at, f"{total - at:,} bytes of zeros, more than the end of a tar has,")

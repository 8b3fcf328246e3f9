"""Index of an uncompressed tar that reports damage.

Python's `tarfile` takes an invalid header for the end of the archive, and silently loses the files after it. Here an
archive ends with two blocks of zeros and nothing but zeros after them, and anything else is an error. Formats: ustar
and pax (IEEE Std 1003.1, pax), GNU tar with long names and sizes in base 256, and Version 7 Unix.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import BinaryIO, Literal, NamedTuple

BLOCK = 512
MAX_PADDING = 1 << 20
"""Most bytes of zeros after the last file. Writers pad to records of 10 KiB, or of up to 1 MiB for a tape; more are the
hole that an incomplete download leaves."""
MAX_EXTENSION = 1 << 20
"""Most bytes of a long name or of a pax header."""

_FILES, _LINKS, _NO_CONTENT = b"07\0", b"12", b"3456"
"""Entry types: files; links; devices, folders and pipes."""


# Header block, 512 bytes (IEEE Std 1003.1, ustar interchange format):
#     0 name          100 bytes
#   124 size           12 octal digits; GNU: base 256 where the first byte is 0x80
#   148 checksum        8 octal digits
#   156 type            1
#   157 link name     100
#   257 magic           6 "ustar\0" (POSIX) or "ustar " (GNU)
#   345 prefix        155 in POSIX, to be put before the name


class TarEntry(NamedTuple):
    """A file or a link in a tar."""

    name: str
    kind: Literal["file", "link", "symlink"]
    target: str
    """Target of a link: relative to the archive's root, or for a symbolic link to its own folder."""
    start: int
    """Offset of the content in the archive, in bytes."""
    size: int
    """Bytes of the content."""


class TarError(ValueError):
    """A tar is damaged or truncated, or the file is not a tar; the message has the offset."""

    def __init__(self, offset: int, reason: str):
        super().__init__(f"{reason} at byte {offset:,}")


def tar_entries(file: BinaryIO) -> Iterator[TarEntry]:
    """Yield the files and links of a tar, in order. Names are not normalized.

    Raises:
        TarError: on reaching the damage.
    """
    total = os.fstat(file.fileno()).st_size  # bytes
    global_settings: dict[str, str] = {}  # pax settings of all entries that follow
    next_settings: dict[str, str] = {}  # pax settings of the next entry alone
    extension, at = -1, 0  # offset of an extension header that still lacks its entry; offset of the next header
    while True:
        header = at
        block = _read(file, at, BLOCK)
        if len(block) < BLOCK:
            raise TarError(at, "the file ends without the two blocks of zeros that end a tar")
        if not any(block):
            if extension >= 0:
                raise TarError(extension, "a header that extends the next one, which is missing,")
            _check_end(file, at, total)
            return
        _check_sum(block, at)
        # Extension headers hold settings of the next entry, or with type g of all that follow. X is Solaris' x.
        kind, size = block[156:157], _number(block[124:136], at)
        start = at + BLOCK
        if kind in (b"x", b"g", b"X", b"L", b"K"):
            if size > MAX_EXTENSION:
                raise TarError(at, f"a long name or pax header of {size:,} bytes, more than {MAX_EXTENSION:,}")
            content = _read(file, start, size)
            if len(content) < size:
                raise TarError(at, "the end of the file within the header")
            # GNU: a long name (L) or link name (K) as the content. pax: records.
            if kind in (b"L", b"K"):
                next_settings["path" if kind == b"L" else "linkpath"] = _text(content)
            else:
                (global_settings if kind == b"g" else next_settings).update(_pax_settings(content, at))
            if kind != b"g":
                extension = header
            at = start + _padded(size)
            continue
        # A regular entry: settings of the next entry take precedence over global ones, and are used up.
        settings = {**global_settings, **next_settings}
        next_settings, extension = {}, -1
        if any(key.startswith("GNU.sparse.") for key in settings) or kind == b"S":
            raise TarError(at, "a sparse file, whose content is not contiguous (pack it without --sparse),")
        name, target = settings.get("path", _name(block)), settings.get("linkpath", _text(block[157:257]))
        if kind in _LINKS:
            # The size of a link, if it has one, is its target's.
            yield TarEntry(name, "link" if kind == b"1" else "symlink", target, start, 0)
            size = 0
        elif kind in _NO_CONTENT or (kind == b"\0" and name.endswith("/")):  # the latter is a folder in Version 7
            size = 0
        elif kind in _FILES:
            size = _decimal(settings["size"], at) if "size" in settings else size
            if start + size > total:
                raise TarError(at, f"the file ends within {name!r}, which has {size:,} bytes and starts")
            yield TarEntry(name, "file", "", start, size)
        else:
            raise TarError(at, f"an entry of unknown type {kind!r}")
        at = start + _padded(size)


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _check_sum(block: bytes, at: int) -> None:
    """Verify the checksum of a header, the sum of its bytes with spaces in place of the checksum."""
    rest = block[:148] + b" " * 8 + block[156:]
    difference = sum(rest) - _number(block[148:156], at)
    # Some old writers summed signed characters.
    if difference and difference != 256 * sum(byte > 127 for byte in rest):
        raise TarError(at, "a header whose checksum is wrong")


def _number(field: bytes, at: int) -> int:
    """Decode a number in octal digits or, where it is too large for them, in base 256."""
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
    # GNU tar has other fields where ustar has the prefix of a long name.
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _pax_settings(content: bytes, at: int) -> dict[str, str]:
    """Parse a pax header: records of `LENGTH KEY=VALUE` and a line feed."""
    settings, start = {}, 0
    while start < len(content):
        found = re.compile(rb"([0-9]{1,9}) ([^=]+)=").match(content, start)
        end = start + int(found[1]) if found else 0
        if not found or end > len(content) or found.end() >= end or content[end - 1 : end] != b"\n":
            raise TarError(at, "a pax header that is malformed")
        value = content[found.end() : end - 1]
        settings[found[2].decode("utf-8", "backslashreplace")] = value.decode("utf-8", "backslashreplace")
        start = end
    return settings


def _check_end(file: BinaryIO, at: int, total: int) -> None:
    """Check that what follows a block of zeros is the end of a tar."""
    if total - at < 2 * BLOCK:
        raise TarError(at, "the file ends with one block of zeros, where two end a tar,")
    offset = at
    while offset < total:
        block = _read(file, offset, MAX_PADDING)
        if any(block):
            raise TarError(at, "zeros where a header must be, and data after them,")
        offset += len(block)
    if total - at > MAX_PADDING + 2 * BLOCK:
        raise TarError(at, f"{total - at:,} bytes of zeros, more than the end of a tar has,")

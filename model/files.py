"""Files that a crash leaves whole: written beside and renamed, or appended to and cut at a line."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

logger = logging.getLogger("vlmamba.model")

PARTIAL = ".vlmamba-partial"
"""Ending of the names of files and folders that are not complete yet."""


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Write a file that is there as a whole or not at all; one that is replaced stays whole until then.

    Args:
        path: a symbolic link is followed, and stays one.
        content: text is written as UTF-8.
    """
    with writing_whole(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def writing_whole(path: str | Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; the file takes the place of `path` when the block ends well.

    It is on the disk, not in the system's memory alone, before it is renamed.
    """
    path = Path(os.path.realpath(path))
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield partial
        if path.exists():
            shutil.copymode(path, partial)
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_partials(folder: Path) -> None:
    """Delete what killed processes left half written in a folder. Nobody may be writing there."""
    for path in folder.glob(f".*{PARTIAL}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


class JsonLine(NamedTuple):
    """A line of a JSONL file."""

    number: int
    """From 1."""
    end: int
    """Offset of the byte after it."""
    value: dict[str, Any] | None
    """None where the line is damaged."""


def json_lines(path: Path) -> Iterator[JsonLine]:
    """Read the objects of a JSONL file, one a line; no file is no lines.

    A last line without its end is one whose writing was cut short, and is left out. Other lines that are no JSON
    object are damaged: each is told in a warning with file and line.
    """
    if not path.exists():
        return
    end = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            value = None
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(line)
            if not isinstance(value, dict):
                logger.warning("%s, line %d is damaged: %r", path, number, line[:80])
                value = None
            yield JsonLine(number, end, value)


def continue_json_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> TextIO:
    """Open a JSONL file to append to, cut before its first line that is not to be kept.

    What is kept is never written again, so that no crash can lose it. Damaged lines before the cut stay.

    Args:
        keep: of the object of a line.

    Returns:
        The file, opened for appending; each line is handed to the system as it is written.
    """
    end = 0
    for line in json_lines(path):
        if line.value is not None and not keep(line.value):
            break
        end = line.end
    if path.exists() and end < path.stat().st_size:
        os.truncate(path, end)
    return open(path, "a", buffering=1, encoding="utf-8", newline="\n")


def at_home(path: str | Path) -> Path:
    """A path with `~` or `~user` at its beginning replaced by the home folder.

    Raises:
        ValueError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as e:
        raise ValueError(f"{path} begins with the home folder of a user who is not here") from e

"""Crash-safe files: written to a temporary name and renamed, or appended to and truncated at a line."""

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
"""Suffix of incomplete files and folders."""


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Write a file atomically: it has either the old content or the new one.

    Args:
        path: a symbolic link is followed, and stays one.
        content: text is written as UTF-8.
    """
    with writing_atomic(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def writing_atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; the file replaces `path` when the block succeeds.

    Its data is synced to the disk before the rename.
    """
    path = Path(os.path.realpath(path))
    # The same folder, since a rename across file systems is not atomic.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    # With the permissions that the umask allows, unlike tempfile's 0o600.
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield partial
        if path.exists():
            shutil.copymode(path, partial)
        sync(partial)
        os.replace(partial, path)
        # The rename itself is on the disk once the folder is.
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_partials(folder: Path) -> None:
    """Delete incomplete files that killed processes left in a folder. No other process may be writing there."""
    for path in folder.glob(f".*{PARTIAL}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


class JsonLine(NamedTuple):
    """Line of a JSONL file."""

    number: int
    """Line number, from 1."""
    end: int
    """Offset of the byte after it."""
    value: dict[str, Any] | None
    """None if the line is damaged."""


def json_lines(path: Path) -> Iterator[JsonLine]:
    """Read the objects of a JSONL file, one per line; a missing file has no lines.

    A last line without a line feed was cut short, and is dropped. Other lines without a JSON object are damaged: each
    is logged with file and line.
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
    """Open a JSONL file for appending, truncated before the first line to drop.

    Earlier lines are not rewritten, so that no crash can lose them. Damaged lines among them stay.

    Args:
        path: of the file.
        keep: whether to keep a line, by its object.

    Returns:
        The file, opened for appending and line-buffered.
    """
    end = 0
    for line in json_lines(path):
        if line.value is not None and not keep(line.value):
            break
        end = line.end
    if path.exists() and end < path.stat().st_size:
        os.truncate(path, end)
    return open(path, "a", buffering=1, encoding="utf-8", newline="\n")


def expand_home(path: str | Path) -> Path:
    """Expand `~` or `~user` at the start of a path.

    Raises:
        ValueError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as e:
        raise ValueError(f"{path} starts with the home folder of an unknown user") from e

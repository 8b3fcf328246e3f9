"""A lock that keeps a folder to one run at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from .distributed import on_first_rank, rank

logger = logging.getLogger("vlmamba.train")

LOCK = ".lock"
_held: set[int] = set()
"""File descriptors of the locks that this process holds."""


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Lock a folder against other runs; it is created if necessary.

    The lock is an flock on `folder/.lock`: it ends with the process, however that ends. All ranks call this, and
    rank 0 holds it.

    Raises:
        BlockingIOError: another run is in the folder; the message names its host and process.
    """
    handle = on_first_rank(lambda: _lock(folder))
    try:
        yield
    finally:
        if handle is not None and rank() == 0:
            _held.discard(handle)
            os.close(handle)


def _lock(folder: Path) -> int | None:
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    # flock and not lockf: closing any other descriptor of the file must not release it.
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        with open(handle, encoding="utf-8", errors="replace") as file:
            holder = file.read().strip() or "(unknown)"
        if isinstance(e, BlockingIOError):
            raise BlockingIOError(
                e.errno, f"{folder} is in use by another run {holder}. Wait for its end, or name another folder"
            ) from e
        # Network file systems may lack locks: one run is safe, and a second one is the user's care.
        if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        logger.warning("%s: this file system has no locks (%s); a second run here would not be noticed", folder, e)
        return None
    # For the error message of a second run.
    os.ftruncate(handle, 0)
    holder = f"(process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')})"
    os.write(handle, holder.encode())
    _held.add(handle)
    return handle


def _release_in_child() -> None:
    """Close the locks in a forked process: a worker that outlives the run must not hold its lock."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)

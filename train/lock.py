"""One run at a time in a folder."""

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
"""Descriptors of the locks of this process."""


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made where it is not there.

    The lock is one of the system's on `folder/.lock` (flock): it ends with the process, however that ends. All ranks
    call this, and the first one holds it.

    Raises:
        BlockingIOError: another run is in the folder; its host and process are named.
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
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        with open(handle, encoding="utf-8", errors="replace") as file:
            holder = file.read().strip() or "that does not tell who it is"
        if isinstance(e, BlockingIOError):
            raise BlockingIOError(
                e.errno, f"{folder} is in use by another run {holder}. Wait for its end, or give another folder"
            ) from e
        if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        logger.warning("%s: this file system has no locks (%s); a second run here would not be noticed", folder, e)
        return None
    os.ftruncate(handle, 0)
    holder = f"(process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')})"
    os.write(handle, holder.encode())
    _held.add(handle)
    return handle


def _let_go() -> None:
    """In a forked process: a worker that outlives the run must not keep its lock."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)

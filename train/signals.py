"""Signals of a process and of those that it starts."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from types import FrameType


@contextlib.contextmanager
def handling(
    numbers: Sequence[signal.Signals], handle: Callable[[int, FrameType | None], None] | signal.Handlers
) -> Iterator[None]:
    """Run `handle(number, frame)` at these signals; afterwards their handlers are those of before.

    Args:
        numbers: of the signals.
        handle: the handler, or `signal.SIG_DFL`. In any other thread than the main one, which alone can handle
            signals, it is not installed.
    """
    # Python lets only the main thread set a handler.
    try:
        previous = {s: signal.signal(s, handle) for s in numbers}
    except ValueError:
        previous = {}
    # The handlers of before come back also after an error.
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def hidden_from_ctrl_c() -> Iterator[None]:
    """Hide Ctrl-C, which a terminal sends to every process of a group, from programs that the block starts.

    The process that starts them ends them, so that none prints a traceback of its own or is interrupted twice.
    """
    # Unlike an ignored signal, a blocked one is not lost to this process.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def processes_hidden_from_ctrl_c() -> Iterator[None]:
    """`hidden_from_ctrl_c` for processes of multiprocessing."""
    from multiprocessing import resource_tracker

    # Unless it runs, the first process starts it, which ends with Ctrl-C seen again.
    resource_tracker.ensure_running()
    with hidden_from_ctrl_c():
        yield

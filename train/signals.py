"""Signals of a training process."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence


@contextlib.contextmanager
def handling(numbers: Sequence[signal.Signals], handle: Callable[[int, object], None]) -> Iterator[None]:
    """Run `handle(number, frame)` at these signals; afterwards their handlers are those of before.

    Args:
        numbers: of the signals.
        handle: the handler. In any other thread than the main one, which alone can handle signals, it is not installed.
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

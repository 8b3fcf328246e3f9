"""The end of a command by Ctrl-C or SIGTERM, also while its modules are imported. It imports little itself."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from .train.errors import Terminated
from .train.signals import handling

LATER = 0.05
"""Seconds after which a signal is sent again that came where its exception would be lost."""


@contextlib.contextmanager
def ending_by_signals(prog: str, *, is_process: bool) -> Iterator[None]:
    """End the block by Ctrl-C with a line on stderr and exit status 130, and by SIGTERM with status 143.

    Args:
        prog: name of the program.
        is_process: whether the process ends with the block. It then does not wait for threads that still run, and
            another Ctrl-C does not interrupt the interpreter's own end, with a traceback, but ends it.
    """
    usual = sys.unraisablehook

    def send_again(unraisable: Any) -> None:
        # What a handler raises in a finalizer, or in a callback from C, is printed and dropped.
        if isinstance(unraisable.exc_value, KeyboardInterrupt | Terminated):
            _send_again(signal.SIGTERM if isinstance(unraisable.exc_value, Terminated) else signal.SIGINT)
        else:
            usual(unraisable)

    # A shell's background jobs ignore Ctrl-C, and go on to.
    numbers = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) != signal.SIG_IGN]
    sys.unraisablehook = send_again
    try:
        with handling(numbers, _handle):
            yield
    except KeyboardInterrupt:
        _end_by_next_signals(numbers, is_process)
        print(f"\n{prog}: stopped", file=sys.stderr)
        _exit(128 + signal.SIGINT, is_process)
    except Terminated:
        _end_by_next_signals(numbers, is_process)
        _exit(128 + signal.SIGTERM, is_process)
    finally:
        sys.unraisablehook = usual
        _end_by_next_signals(numbers, is_process)


def after_imports(number: int, frame: FrameType | None) -> None:
    """Handle Ctrl-C in a program that goes on: raise `KeyboardInterrupt`, but not while a module is imported.

    A package whose import was interrupted may lack parts of itself when it is imported again.
    """
    if any(True for _ in _imported(frame)):
        _send_again(number)
    else:
        raise KeyboardInterrupt


def _handle(number: int, frame: FrameType | None) -> None:
    # PyTorch's C++ code imports numpy, and goes on with half of it at an error.
    if any(name.split(".")[0] == "numpy" for name in _imported(frame)):
        _send_again(number)
    elif number == signal.SIGINT:
        raise KeyboardInterrupt
    else:
        raise Terminated(128 + number)


def _imported(frame: FrameType | None) -> Iterator[str]:
    """Yield the modules that are being imported."""
    while frame is not None:
        if frame.f_code.co_name == "_find_and_load" and "importlib" in frame.f_code.co_filename:
            yield str(frame.f_locals.get("name"))
        frame = frame.f_back


def _send_again(number: int) -> None:
    timer = threading.Timer(LATER, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def _end_by_next_signals(numbers: list[signal.Signals], is_process: bool) -> None:
    if is_process:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _exit(status: int, is_process: bool) -> None:
    if is_process:
        # Without the interpreter's wait for threads, such as one that compiles a kernel.
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
                stream.flush()
        os._exit(status)
    sys.exit(status)

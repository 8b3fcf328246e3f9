"""Ctrl-C in tests: pressed when something is so, not after a time, which a machine that stalls would miss."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable


def press_ctrl_c_when(*conditions: Callable[[], bool]) -> None:
    """Press it in this process once for each condition, in turn; a condition that does not come ends the presses."""

    def press() -> None:
        for condition in conditions:
            end = time.monotonic() + 50
            while not condition():
                if time.monotonic() > end:
                    return
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()


def a_process_starts() -> Callable[[], bool]:
    """Condition that there is a process of multiprocessing that is not there now."""
    before = set(multiprocessing.active_children())
    return lambda: bool(set(multiprocessing.active_children()) - before)

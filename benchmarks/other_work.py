"""Processor time that other processes take while something is timed (Linux)."""

from __future__ import annotations

import os
import time
from pathlib import Path

NOTICED = 0.1
"""Cores that other work takes on average, from which it is said."""
BUSY = (0, 1, 2, 5, 6, 7)
"""Columns of a line of /proc/stat: user, nice, system, irq, softirq and steal; the others are idle."""


class OtherWork:
    """Counts the cores that other processes kept busy within a `with` block, on average.

    The counters advance by hundredths of a second: of a shorter block nothing is known.
    """

    def __init__(self) -> None:
        self.cores: float | None = None
        """None where the system does not tell."""

    def __enter__(self) -> OtherWork:
        self._start = _counters()
        return self

    def __exit__(self, *exception: object) -> None:
        end = _counters()
        if self._start is None or end is None:
            return
        wall, busy, own = (b - a for a, b in zip(self._start, end, strict=True))
        self.cores = other_cores(wall, busy, own)


def other_cores(wall: float, busy: float, own: float) -> float | None:
    """Cores that others kept busy.

    Args:
        wall: seconds of the block.
        busy: processor seconds of all processes in it.
        own: those of this process.
    """
    return max(0.0, busy - own) / wall if wall >= 0.1 else None


def _counters() -> tuple[float, float, float] | None:
    """Seconds by the clock, busy seconds of all processors, and processor seconds of this process."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        busy = sum(int(fields[i]) for i in BUSY) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return None
    return time.perf_counter(), busy, time.process_time()

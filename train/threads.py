"""Number of threads for operations as small as a tiny model's, by a short measurement."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

ROUNDS = 3


def pick_threads(step: Callable[[], object], most: int) -> int:
    """Time a step with one thread and with `most`, in turn, and let PyTorch use the faster number.

    Threads that wait for each other at thousands of small operations cost more than they give, above all where another
    process keeps a core busy.

    Args:
        step: what to time, such as forward and backward of a batch.
        most: cores that this process may use.

    Returns:
        The number of threads: 1 or `most`.
    """
    seconds: dict[int, list[float]] = {1: [], most: []}
    # The first round compiles kernels and starts threads.
    for _ in range(1 + ROUNDS):
        # In turn, so that another process's work falls on both.
        for n, times in seconds.items():
            torch.set_num_threads(n)
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
    # The fastest round has the least of other work in it.
    best = {n: min(times[1:]) for n, times in seconds.items()}
    chosen = min(best, key=lambda n: best[n])
    torch.set_num_threads(chosen)
    print(f"threads: {chosen}; a step takes " + ", ".join(f"{t:.3f} s with {n}" for n, t in best.items()))
    return chosen

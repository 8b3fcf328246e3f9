"""A pool of threads that share the tiles of a kernel.

Threads sleep where there is nothing to do: on a machine with other work OpenMP's spinning costs more than it gives.
Which thread runs a tile changes no result, since a tile writes what no other tile writes.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

MIN_WORK = 1 << 18
"""State updates, or as much work, that are worth waking another thread: some 50 microseconds."""

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def run_tiles(run: Callable[[int, int], object], n_tiles: int, work: int) -> None:
    """Call `run(first, end)` over all tiles, in this thread and in as many others as PyTorch may use.

    Args:
        run: a kernel that releases the GIL, for tiles first to end - 1.
        n_tiles: the number of tiles.
        work: state updates in all tiles together.
    """
    n_threads = min(torch.get_num_threads(), n_tiles, max(1, work // MIN_WORK))
    if n_threads <= 1:
        if n_tiles:
            run(0, n_tiles)
        return
    # Four shares a thread, so that one that is late holds up the others by a quarter of its part at most.
    size = -(-n_tiles // (4 * n_threads))
    starts = itertools.count(0, size)

    def work_off() -> None:
        while (first := next(starts)) < n_tiles:  # `next` of a counter is atomic
            run(first, min(first + size, n_tiles))

    pool = _get_pool(n_threads - 1)
    # This thread works too, so that a caller never waits for a busy pool.
    helpers = [pool.submit(work_off) for _ in range(n_threads - 1)]
    try:
        work_off()
    finally:
        # A helper that another caller's tiles kept from starting has nothing left to do.
        running = [h for h in helpers if not h.cancel()]
        for helper in running:
            helper.result()


def _get_pool(n_threads: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < n_threads:
            # A smaller pool that callers still wait for ends by itself when nobody refers to it.
            _pool, _pool_size = ThreadPoolExecutor(n_threads, thread_name_prefix="ssm_kernels"), n_threads
        return _pool


def _forget_pool() -> None:
    """A forked process has none of its parent's threads."""
    global _pool, _pool_size, _lock
    _pool, _pool_size, _lock = None, 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)

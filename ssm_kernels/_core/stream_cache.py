"""Caches of tensors on a device, one for each stream.

A tensor on a GPU is ready for the stream that made it, and once it is freed, its memory is used again in the order of
that stream. So a stream that did not make a cached tensor might read it too early, or after it was overwritten.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")


def current_stream(device: torch.device) -> int | None:
    """The handle of the stream on which work on a device is queued now; None for a device without streams."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def is_captured(device: torch.device) -> bool:
    """Whether work on a device is captured in a CUDA graph now, to run at each replay and not before."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def cached_per_stream(maxsize: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Cache the results of a function whose last argument is the device that its tensors are on.

    Each stream has results of its own. A graph that is captured takes a result that was made before on any stream,
    since capture starts with a synchronization, and that result is kept for good, since every replay reads it. One that
    is made in a graph has no values before the first replay, so that it is not kept.

    Args:
        maxsize: number of results, over all streams, after which the one that was used longest ago is dropped.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        results: dict[tuple, R] = {}  # by stream and arguments, in order of their last use
        results_in_graphs: dict[tuple, R] = {}  # by arguments
        lock = threading.Lock()

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            assert not kwargs, "arguments are positional: they are the key of the cache"
            device = cast("torch.device", args[-1])
            if is_captured(device):
                with lock:
                    made_before = [result for key, result in results.items() if key[1:] == args]
                    if made_before:
                        results_in_graphs.setdefault(args, made_before[-1])
                    known = results_in_graphs.get(args)
                return function(*args, **kwargs) if known is None else known
            key = (current_stream(device), *args)
            with lock:
                result = results.pop(key, None)
            if result is None:
                result = function(*args, **kwargs)
            with lock:
                results[key] = result
                while len(results) > maxsize:
                    del results[next(iter(results))]
            return result

        return call

    return decorate

"""Times of one or more implementations. Several take turns, so that a drift of the machine affects all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .options import Mode
from .workloads import Workload

SLOW = 5.0
"""Seconds beyond which a call is measured once, not repeated."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, and the first and third quartile."""

    median: float
    low: float
    high: float
    calls: int
    seconds: tuple[float, ...] = ()
    """Seconds of each call, in order."""


def summarize(seconds: Sequence[float]) -> Timing:
    """Median and quartiles of the seconds of single calls."""
    if len(seconds) < 2:
        return Timing(seconds[0], seconds[0], seconds[0], 1, tuple(seconds))
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, low, high, len(seconds), tuple(seconds))


class Result(NamedTuple):
    """Result of a call."""

    y: Tensor
    gradients: tuple[Tensor | None, ...] = ()
    """Gradients of the workload's inputs, where the mode has a backward."""


def upstream_gradient(y: Tensor) -> Tensor:
    """The gradient of y: the same random one for every implementation, in y's dtype and layout."""
    drawn = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return torch.empty_like(y, requires_grad=False).copy_(drawn)


def prepare(workload: Workload, mode: Mode, dy: Tensor | None = None) -> Callable[[], Result]:
    """The part of a call that is timed: all of it or, in mode `bwd`, the backward, whose forward runs here.

    Args:
        dy: the gradient of y; by default `upstream_gradient` draws it inside the timed part.
    """

    def backward(y: Tensor) -> Result:
        arriving = upstream_gradient(y) if dy is None else dy
        return Result(y, torch.autograd.grad(y, workload.inputs, arriving, allow_unused=True))

    def forward() -> Result:
        with torch.no_grad():
            return Result(workload.run())

    if mode == "fwd":
        return forward
    if mode == "bwd":
        y = workload.run()
        dy = upstream_gradient(y) if dy is None else dy
        return lambda: backward(y)
    return lambda: backward(workload.run())


def run_once(workload: Workload, mode: Mode, dy: Tensor | None = None) -> Tensor:
    """Run one call, with gradients of all inputs if the mode has a backward, and return y."""
    return prepare(workload, mode, dy)().y


def first_call(workload: Workload, mode: Mode) -> tuple[Result, float]:
    """The result of a call, and the seconds that this first one took by the host's clock."""
    call = prepare(workload, mode)
    start = time.perf_counter()
    result = call()
    if result.y.is_cuda:
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def time_together(workloads: Mapping[str, Workload | Sequence[Workload]], mode: Mode, calls: int) -> dict[str, Timing]:
    """Time several implementations in turn.

    On a GPU the clock is events on the device's stream, and the host does not synchronize between calls: the time to
    launch is hidden.

    Args:
        workloads: an implementation may come as several workloads on inputs of their own, used one after the other;
            together larger than a cache, they make each call read its inputs from memory.
        calls: timed calls of each; an implementation slower than `SLOW` is called once.
    """
    sets = {name: [w] if isinstance(w, Workload) else list(w) for name, w in workloads.items()}
    every = [workload for workload_set in sets.values() for workload in workload_set]
    on_gpu = any(t.device.type == "cuda" for workload in every for t in workload.inputs)
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    start_timer = _gpu_timer if on_gpu else _cpu_timer
    gradients: dict[int, Tensor] = {}  # dy by workload

    def time_one(workload: Workload) -> Callable[[], float]:
        call = prepare(workload, mode, gradients.get(id(workload)))
        stop = start_timer()
        y = call().y
        seconds = stop()
        if mode != "fwd" and id(workload) not in gradients:
            gradients[id(workload)] = upstream_gradient(y)
        return seconds

    if on_gpu:
        for workload in every:  # compiles, and fills the allocator's cache
            gradients[id(workload)] = upstream_gradient(run_once(workload, mode))
        synchronize()
    first = {name: time_one(workload_set[0]) for name, workload_set in sets.items()}
    synchronize()
    # A slow one is not called again; of the others the first call is a warm-up.
    timers = {name: [seconds] if seconds() > SLOW else [] for name, seconds in first.items()}
    fast = [name for name, seconds in timers.items() if not seconds]
    for i in range(calls):
        for name in fast:
            timers[name].append(time_one(sets[name][i % len(sets[name])]))
    synchronize()
    return {name: summarize([seconds() for seconds in timers[name]]) for name in sets}


def _cpu_timer() -> Callable[[], Callable[[], float]]:
    """Start a clock; the function returned stops it, and returns one that reads the seconds."""
    start = time.perf_counter()

    def stop() -> Callable[[], float]:
        seconds = time.perf_counter() - start
        return lambda: seconds

    return stop


def _gpu_timer() -> Callable[[], Callable[[], float]]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()

    def stop() -> Callable[[], float]:
        end.record()
        return lambda: start.elapsed_time(end) / 1e3  # after the device has been synchronized

    return stop


def time_rows(
    workloads: Mapping[str, Workload], first: Mapping[str, float], mode: Mode, device: str, calls: int
) -> dict[str, dict[str, Any]]:
    """Times for result rows: of fast implementations in turn, of a slow one its first call.

    Args:
        first: seconds of the first call of each; on a GPU that call compiles, and is not a time.
    """
    slow = {name: summarize([t]) for name, t in first.items() if t > SLOW and device == "cpu"}
    fast = {name: workload for name, workload in workloads.items() if name not in slow}
    found = (time_together(fast, mode, calls) if fast else {}) | slow
    return {name: asdict(times) for name, times in found.items()}

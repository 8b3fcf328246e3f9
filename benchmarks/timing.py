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


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, and the first and third quartile."""

    median: float
    low: float
    high: float
    calls: int
    seconds: tuple[float, ...] = ()
    """Seconds of each call, in order."""
    processor: float | None = None
    """Median of the processor seconds of all threads, which other work on the machine lengthens least."""
    processor_seconds: tuple[float, ...] = ()


def summarize(seconds: Sequence[float], processor: Sequence[float] = ()) -> Timing:
    """Median and quartiles of the seconds of single calls, and the median of their processor seconds."""
    low = median = high = seconds[0]
    if len(seconds) > 1:
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    median_processor = statistics.median(processor) if processor else None
    return Timing(median, low, high, len(seconds), tuple(seconds), median_processor, tuple(processor))


class Reading(NamedTuple):
    """Times of a call."""

    seconds: float
    """By the clock."""
    processor: float | None = None
    """Processor seconds of all threads of this process; None on a GPU."""


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


def first_call(workload: Workload, mode: Mode) -> tuple[Result, Reading]:
    """The result of a call, and the times of this first one on the host."""
    call = prepare(workload, mode)
    stop = _cpu_timer()
    result = call()
    if result.y.is_cuda:
        torch.cuda.synchronize()
    return result, stop()()


def time_together(
    workloads: Mapping[str, Workload | Sequence[Workload]], mode: Mode, calls: int | Mapping[str, int]
) -> dict[str, Timing]:
    """Time several implementations in turn, after a call of each that warms up.

    On a GPU the clock is events on the device's stream, and the host does not synchronize between calls: the time to
    launch is hidden.

    Args:
        workloads: an implementation may come as several workloads on inputs of their own, used one after the other;
            together larger than a cache, they make each call read its inputs from memory.
        calls: timed calls of each, or of each by name.
    """
    sets = {name: [w] if isinstance(w, Workload) else list(w) for name, w in workloads.items()}
    wanted = calls if isinstance(calls, Mapping) else dict.fromkeys(sets, calls)
    every = [workload for workload_set in sets.values() for workload in workload_set]
    on_gpu = any(t.device.type == "cuda" for workload in every for t in workload.inputs)
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    start_timer = _gpu_timer if on_gpu else _cpu_timer
    gradients: dict[int, Tensor] = {}  # dy by workload

    def time_one(workload: Workload) -> Callable[[], Reading]:
        call = prepare(workload, mode, gradients.get(id(workload)))
        stop = start_timer()
        y = call().y
        reading = stop()
        if mode != "fwd" and id(workload) not in gradients:
            gradients[id(workload)] = upstream_gradient(y)
        return reading

    if on_gpu:
        for workload in every:  # compiles, and fills the allocator's cache
            gradients[id(workload)] = upstream_gradient(run_once(workload, mode))
        synchronize()
    for workload_set in sets.values():
        time_one(workload_set[0])
    synchronize()
    timers: dict[str, list[Callable[[], Reading]]] = {name: [] for name in sets}
    for i in range(max(wanted.values())):
        for name in sets:
            if i < wanted[name]:
                timers[name].append(time_one(sets[name][i % len(sets[name])]))
    synchronize()
    return {name: _summarize_readings([read() for read in timers[name]]) for name in sets}


def _summarize_readings(readings: Sequence[Reading]) -> Timing:
    return summarize([r.seconds for r in readings], [r.processor for r in readings if r.processor is not None])


def _cpu_timer() -> Callable[[], Callable[[], Reading]]:
    """Start clocks; the function returned stops them, and returns one that reads them."""
    start, start_processor = time.perf_counter(), time.process_time()

    def stop() -> Callable[[], Reading]:
        processor, seconds = time.process_time() - start_processor, time.perf_counter() - start
        return lambda: Reading(seconds, processor)

    return stop


def _gpu_timer() -> Callable[[], Callable[[], Reading]]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()

    def stop() -> Callable[[], Reading]:
        end.record()
        return lambda: Reading(start.elapsed_time(end) / 1e3)  # after the device has been synchronized

    return stop


def time_rows(
    workloads: Mapping[str, Workload], first: Mapping[str, Reading], mode: Mode, device: str, calls: int, budget: float
) -> dict[str, dict[str, Any]]:
    """Times for result rows: calls in turn, as many of each as the budget allows; of a slow one its first call.

    Args:
        first: times of the first call of each; on a GPU that call compiles, and is not a time.
        budget: seconds of all timed calls of an implementation.
    """
    counts = {name: min(calls, max(1, int(budget / max(r.seconds, 1e-9)))) for name, r in first.items()}
    slow = {name for name, n in counts.items() if n == 1 < calls and device == "cpu"}
    fast = {name: workload for name, workload in workloads.items() if name not in slow}
    found = time_together(fast, mode, counts) if fast else {}
    return {name: asdict(found.get(name) or _summarize_readings([first[name]])) for name in workloads}


SHORTEST, SHARE = 16, 64
"""Steps of the shortest call from which a longer one's time is predicted, and the most times longer that one is."""


def predict_excess(call_at: Callable[[int], float], length: int, budget: float) -> float | None:
    """Predict from shorter calls whether a call exceeds its budget.

    Its time grows at least in proportion to the length, and at most with its square.

    Args:
        call_at: seconds of a call at a length.
        length: length of the call.
        budget: seconds that it may take.

    Returns:
        The seconds that it takes at least, if they are more than the budget; else None.
    """
    n = max(SHORTEST, length // SHARE)
    while n < length:
        growth = length / n
        seconds = call_at(n)
        if seconds * growth**2 > budget:
            seconds = min(seconds, call_at(n))  # a first call also imports, compiles and allocates
        if seconds * growth**2 <= budget:
            return None
        if seconds * growth > budget:
            return seconds * growth
        n *= 2
    return None

"""Time and memory of one implementation; see `errors` for how right it is."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.device import device_named
from .cases import Shape
from .options import Mode
from .peers import PACKAGES
from .workloads import Workload, build

SLOW = 5.0
"""Seconds beyond which a call is measured once, not repeated."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median, and the first and third quartile."""

    median: float
    low: float
    high: float
    calls: int
    seconds: tuple[float, ...] = ()
    """Of each call, in order."""


@contextlib.contextmanager
def on(device: str) -> Iterator[None]:
    """A context in which a device that was asked for by name is the current one.

    Raises:
        ValueError: there is no such device.
    """
    if device == "cpu":
        yield
        return
    found = device_named(device)
    if found.type != "cuda":
        raise ValueError(f"device must be cpu, cuda, or one of several such as cuda:1; got {device!r}")
    with torch.cuda.device(found):
        yield


class Result(NamedTuple):
    y: Tensor
    gradients: tuple[Tensor | None, ...] = ()
    """Of the workload's inputs, where the mode has a backward."""


def incoming(y: Tensor) -> Tensor:
    """A gradient that arrives at y: the same random one for every implementation, in y's dtype and layout."""
    drawn = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return torch.empty_like(y, requires_grad=False).copy_(drawn)


def ready(workload: Workload, mode: Mode, dy: Tensor | None = None) -> Callable[[], Result]:
    """What is timed of a call: all of it or, in mode `bwd`, the backward, whose forward runs here.

    `dy` is what `incoming` gives, if it is at hand.
    """

    def backward(y: Tensor) -> Result:
        arriving = incoming(y) if dy is None else dy
        return Result(y, torch.autograd.grad(y, workload.inputs, arriving, allow_unused=True))

    if mode == "fwd":

        def forward() -> Result:
            with torch.no_grad():
                return Result(workload.run())

        return forward
    if mode == "bwd":
        y = workload.run()
        dy = incoming(y) if dy is None else dy
        return lambda: backward(y)
    return lambda: backward(workload.run())


def once(workload: Workload, mode: Mode, dy: Tensor | None = None) -> Tensor:
    """One call, with gradients of all inputs where the mode says so."""
    return ready(workload, mode, dy)().y


def first_call(workload: Workload, mode: Mode) -> tuple[Result, float]:
    """What a call gives, and the seconds that this first one took, by the host's clock."""
    call = ready(workload, mode)
    begin = time.perf_counter()
    result = call()
    if result.y.is_cuda:
        torch.cuda.synchronize()
    return result, time.perf_counter() - begin


def time_together(workloads: Mapping[str, Workload | Sequence[Workload]], mode: Mode, calls: int) -> dict[str, Timing]:
    """Time several implementations in turn, so that a drift of the machine hits all alike.

    An implementation may come as several workloads on inputs of their own, used one after the other: together
    larger than a cache, they make each call read its inputs from memory.
    """
    sets = {name: [w] if isinstance(w, Workload) else list(w) for name, w in workloads.items()}
    on_gpu = any(t.device.type == "cuda" for ways in sets.values() for way in ways for t in way.inputs)
    clock = (_GPUClock if on_gpu else _CPUClock)(sets, mode)
    wanted = {}
    for name, ways in sets.items():
        first = clock.first(name, ways)
        wanted[name] = 0 if first > SLOW else calls
    for i in range(calls):
        for name, ways in sets.items():
            if i < wanted[name]:
                clock.time(name, ways[i % len(ways)])
    return {name: timing(seconds) for name, seconds in clock.seconds().items()}


class _CPUClock:
    def __init__(self, sets: Mapping[str, Sequence[Workload]], mode: Mode):
        self.mode, self._seconds, self._dy = mode, collections.defaultdict(list), {}

    def first(self, name: str, ways: Sequence[Workload]) -> float:
        """Seconds of a first call, kept where it is not to be repeated."""
        self.time(name, ways[0])
        first = self._seconds[name][0]
        if first <= SLOW:
            self._seconds[name].clear()
        return first

    def time(self, name: str, workload: Workload) -> None:
        call = ready(workload, self.mode, self._dy.get(id(workload)))
        begin = time.perf_counter()
        y = call().y
        self._seconds[name].append(time.perf_counter() - begin)
        if self.mode != "fwd" and id(workload) not in self._dy:
            self._dy[id(workload)] = incoming(y)

    def seconds(self) -> dict[str, list[float]]:
        return self._seconds


class _GPUClock:
    """By events on the device's stream. The host does not wait between calls, so what it takes to launch is hidden."""

    def __init__(self, sets: Mapping[str, Sequence[Workload]], mode: Mode):
        self.mode, self.events, self.dy = mode, collections.defaultdict(list), {}
        for ways in sets.values():
            for way in ways:  # compiles, and gives the allocator what it needs
                y = once(way, mode)
                self.dy[id(way)] = incoming(y)
        torch.cuda.synchronize()

    def first(self, name: str, ways: Sequence[Workload]) -> float:
        self.time(name, ways[0])
        torch.cuda.synchronize()
        start, end = self.events[name][0]
        first = start.elapsed_time(end) / 1e3
        if first <= SLOW:
            self.events[name].clear()
        return first

    def time(self, name: str, workload: Workload) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call = ready(workload, self.mode, self.dy[id(workload)])
        start.record()
        call()
        end.record()
        self.events[name].append((start, end))

    def seconds(self) -> dict[str, list[float]]:
        torch.cuda.synchronize()
        return {name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in self.events.items()}


def timing(seconds: Sequence[float]) -> Timing:
    """The summary of single calls' seconds."""
    if len(seconds) < 2:
        return Timing(seconds[0], seconds[0], seconds[0], 1, tuple(seconds))
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, low, high, len(seconds), tuple(seconds))


def peak_memory(
    op: str,
    impl: str,
    shape: Shape,
    mode: Mode,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **options: object,
) -> int:
    """Bytes by which one call raises what is allocated on a GPU, or a fresh process's resident memory (Linux).

    In mode `bwd`, beyond what the forward kept.

    Raises:
        RuntimeError: the call failed, as where memory does not suffice.
    """
    if device != "cpu":
        workload = build(op, impl, shape, dtype, device=device, **options)
        dy = None if mode == "fwd" else incoming(once(workload, mode))
        call = ready(workload, mode, dy)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    request = {"op": op, "impl": impl, "shape": asdict(shape), "mode": mode, "dtype": str(dtype)[6:]}
    command = [sys.executable, "-m", "vlmamba.benchmarks.measure", json.dumps(request | {"options": options})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RuntimeError(f"the process that was to measure memory failed: {why}")
    return int(done.stdout.splitlines()[-1])


def _peak_memory_here(
    op: str, impl: str, shape: Shape, mode: Mode, dtype: torch.dtype, options: Mapping[str, object]
) -> int:
    # A small call first: what libraries allocate once is not the op's.
    once(build(op, impl, replace(shape, length=32, height=1), dtype, **options), mode)
    workload = build(op, impl, shape, dtype, **options)
    call = ready(workload, mode)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = process_status("VmRSS")
    call()
    return max(0, process_status("VmHWM") - before)  # the kernel counts in batches, so that nothing may look like less


def process_status(field: str) -> int:
    """A size that Linux tells of this process, such as VmHWM, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def environment(device: str = "cpu") -> dict[str, object]:
    """What a figure depends on besides the code."""
    packages = {}
    for name in ("torch", "triton", "numpy", *PACKAGES.values()):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "device": _cpu_name() if device == "cpu" else torch.cuda.get_device_name(device),
        "driver": None if device == "cpu" else _driver(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": packages,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _driver() -> str | None:
    """The driver's version, as the vendor's tool says it; without the tool, what torch was built for."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if torch.version.hip or shutil.which(command[0]) is None:
        return f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")[0] or None


def _commit() -> str | None:
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=here, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    shape, dtype = Shape(**given["shape"]), getattr(torch, given["dtype"])
    print(_peak_memory_here(given["op"], given["impl"], shape, given["mode"], dtype, given["options"]))

"""Time, memory and error of one implementation."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .workloads import Shape, Workload, build, exact

Mode = Literal["fwd", "fwd+bwd"]
SLOW = 5.0
"""Seconds beyond which a call is measured once, not repeated."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median, and the first and third quartile."""

    median: float
    low: float
    high: float
    calls: int


def once(workload: Workload, mode: Mode) -> Tensor:
    """One call, with gradients of all inputs where the mode says so."""
    if mode == "fwd":
        with torch.no_grad():
            return workload.run()
    y = workload.run()
    torch.autograd.grad(y.sum(), workload.inputs, allow_unused=True)
    return y


def time_together(workloads: Mapping[str, Workload], mode: Mode, calls: int) -> dict[str, Timing]:
    """Time several implementations in turn, so that a drift of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in workloads}
    wanted = {}
    for name, workload in workloads.items():
        begin = time.perf_counter()
        once(workload, mode)
        first = time.perf_counter() - begin
        wanted[name] = 0 if first > SLOW else calls
        if first > SLOW:
            seconds[name].append(first)
    for i in range(calls):
        for name, workload in workloads.items():
            if i < wanted[name]:
                begin = time.perf_counter()
                once(workload, mode)
                seconds[name].append(time.perf_counter() - begin)
    return {name: _timing(s) for name, s in seconds.items()}


def _timing(seconds: list[float]) -> Timing:
    if len(seconds) < 2:
        return Timing(seconds[0], seconds[0], seconds[0], 1)
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, low, high, len(seconds))


def error(op: str, workload: Workload, shape: Shape, dtype: torch.dtype) -> float:
    """Largest error of the result against the reference in float64, relative to the result's largest value."""
    want = exact(op, shape, dtype)
    got = once(workload, "fwd").double()
    return ((got - want).abs().max() / want.abs().max()).item()


def peak_memory(op: str, impl: str, shape: Shape, mode: Mode) -> int:
    """Bytes by which one call raises a fresh process's resident memory at its peak (Linux)."""
    request = json.dumps({"op": op, "impl": impl, "shape": asdict(shape), "mode": mode})
    done = subprocess.run(
        [sys.executable, "-m", "vlmamba.benchmarks.measure", request], capture_output=True, text=True, check=True
    )
    return int(done.stdout.splitlines()[-1])


def _peak_memory_here(op: str, impl: str, shape: Shape, mode: Mode) -> int:
    # A small call first: what libraries allocate once is not the op's.
    once(build(op, impl, Shape(**{**asdict(shape), "length": 32})), mode)
    workload = build(op, impl, shape)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = _status("VmRSS")
    once(workload, mode)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def environment() -> dict[str, object]:
    """What a figure depends on besides the code."""
    packages = {}
    for name in ("torch", "triton", "transformers", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "device": _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": packages,
        "commit": _commit(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=here, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(_peak_memory_here(given["op"], given["impl"], Shape(**given["shape"]), given["mode"]))

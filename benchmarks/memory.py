"""Memory: the peak of a call, on a CPU in a fresh process, and the memory that is free."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ..train.signals import processes_hidden_from_ctrl_c
from .cases import Shape
from .options import Mode
from .timing import prepare, run_once, upstream_gradient
from .workloads import build


def peak_memory(
    op: str,
    impl: str,
    shape: Shape,
    mode: Mode,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **options: Any,
) -> int:
    """Bytes by which one call raises the memory allocated on a GPU, or a fresh process's resident memory (Linux).

    In mode `bwd`, beyond the tensors that the forward saved.

    Raises:
        RuntimeError: the call failed, for example for want of memory.
    """
    if device == "cpu":
        return in_fresh_process(_cpu_peak, op, impl, shape, mode, dtype, options)
    workload = build(op, impl, shape, dtype, device=device, **options)
    dy = None if mode == "fwd" else upstream_gradient(run_once(workload, mode))
    call = prepare(workload, mode, dy)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(op: str, impl: str, shape: Shape, mode: Mode, dtype: torch.dtype, options: dict[str, Any]) -> int:
    # A small call first: memory that libraries allocate once is not the op's.
    run_once(build(op, impl, replace(shape, length=32, height=1), dtype, **options), mode)
    workload = build(op, impl, shape, dtype, **options)
    return peak_resident(prepare(workload, mode))


def in_fresh_process(measure: Callable[..., int], *arguments: Any) -> int:
    """Call a function in a new process, and return its result.

    Raises:
        MemoryError: the operating system killed the process, as it does where memory runs out.
        RuntimeError: the function failed.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([f"{__package__}.preload"])
    receiver, sender = processes.Pipe(duplex=False)
    child = processes.Process(target=_send_result, args=(sender, measure, arguments), daemon=True)
    try:
        with processes_hidden_from_ctrl_c():  # also from the fork server, which the first call starts
            child.start()
        sender.close()
        found = receiver.recv()
    except EOFError:
        child.join()
        if child.exitcode == -9:
            raise MemoryError("the process that measures memory was killed") from None
        raise RuntimeError(f"the process that measures memory ended with {child.exitcode}") from None
    except BaseException:  # a signal
        if child.pid is not None:
            child.kill()
        raise
    child.join()
    if isinstance(found, Exception):
        raise found
    return found


def _send_result(sender: Connection, measure: Callable[..., int], arguments: tuple[Any, ...]) -> None:
    try:
        sender.send(measure(*arguments))
    except Exception as e:  # raised again in the parent process
        why = f"the process that measures memory failed: {e}"
        sender.send(e if isinstance(e, MemoryError) else RuntimeError(why))


def peak_resident(call: Callable[[], object]) -> int:
    """Bytes by which a call raises this process's resident memory (Linux)."""
    # Memory that was freed must not serve the call unseen.
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current size
    before = reported_bytes("/proc/self/status", "VmRSS")
    call()
    # The kernel counts in batches: a small call may come out below 0.
    return max(0, reported_bytes("/proc/self/status", "VmHWM") - before)


def reported_bytes(file: str, field: str) -> int:
    """A size that Linux reports, in bytes; a line of the file is such as `VmHWM: 1024 kB`."""
    values = dict(line.split(":", 1) for line in Path(file).read_text().splitlines())
    return int(values[field].split()[0]) * 1024


def free_memory(device: str) -> int:
    """Bytes that this process may still take, on a CPU within its control group (Linux)."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = reported_bytes("/proc/meminfo", "MemAvailable")
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - used)

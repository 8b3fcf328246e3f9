"""Rates of this machine's processor, measured in seconds: the limit beside the times on a CPU.

Each rate is the best of several rounds: by numba where it is installed, else by PyTorch's own operations, which reach
less. A core's rate is of its processor time, which other work on the machine lengthens least. Several cores are
measured at once, so that they share caches and memory, and their rates are added.
"""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

FOOTPRINTS = tuple(2**n for n in (18, 21, 24, 27))
"""Bytes that all threads together read, or read and write: within a cache, and beyond it."""
ROUNDS = 5
SECONDS = 0.01
"""Length of a round."""
IN_CACHE = 2**11
"""Elements of an array whose read and write a first-level cache holds."""
MULTIPLE = 128
"""Elements of an array are a multiple of it: eight vectors."""


@dataclass(frozen=True)
class Rates:
    """Rates of some cores together, a second."""

    threads: int
    read: dict[int, float]
    """Bytes, by the footprint."""
    copy: dict[int, float]
    """Bytes read and written, by the footprint."""
    operations: float
    """Operations of float32; a multiply-add is two."""
    exponentials: float
    """Exponentials of float32 with their factor, by the fewest instructions that are known here."""

    def bandwidth(self, touched: int) -> float:
        """Bytes a second at the largest measured footprint within the bytes that a call touches."""
        footprint = max((n for n in self.read if n <= touched), default=min(self.read))
        return max(self.read[footprint], self.copy[footprint])

    def __str__(self) -> str:
        cores = "one core" if self.threads == 1 else f"{self.threads} cores"
        footprint = max(self.read)
        return (
            f"{cores}: {self.read[footprint] / 1e9:.1f} GB/s read and {self.copy[footprint] / 1e9:.1f} copied in "
            f"memory, {self.operations / 1e9:.0f} GFLOP/s, {self.exponentials / 1e9:.2f} billion exponentials/s"
        )


@functools.cache
def measure_rates(threads: int) -> Rates:
    """Measure the rates of as many cores as threads, once in a process."""
    work = _numba_work if importlib.util.find_spec("numba") else _torch_work
    own = torch.get_num_threads()
    torch.set_num_threads(1)  # in each of the threads
    try:
        with ThreadPoolExecutor(threads) as pool:
            read, copy = ({n: _rate(pool, threads, work(name, n // threads)) for n in FOOTPRINTS} for name in MEMORY)
            operations, exponentials = (_rate(pool, threads, work(name, 0)) for name in ARITHMETIC)
    finally:
        torch.set_num_threads(own)
    return Rates(threads, read, copy, operations, exponentials)


MEMORY, ARITHMETIC = ("read", "copy"), ("multiply_add", "exponentiate")
Work = tuple[Callable[[int], object], float]
"""A function that runs so many times, in the calling thread, and the units of work of one time."""


def _rate(pool: ThreadPoolExecutor, threads: int, makes: Sequence[Callable[[], Work]]) -> float:
    """Units of work a second of all threads together, in the way of doing it that is fastest."""
    return max(_rate_of(pool, threads, make) for make in makes)


def _rate_of(pool: ThreadPoolExecutor, threads: int, make: Callable[[], Work]) -> float:
    works = [make() for _ in range(threads)]
    call, units = works[0]
    call(1)  # compiles
    repeats, seconds = 1, 0.0
    while seconds < SECONDS / 4:
        repeats *= 4
        seconds = _timed(call, repeats)
    repeats = max(1, round(repeats * SECONDS / seconds))
    rounds = [list(pool.map(lambda work: _timed(work[0], repeats), works)) for _ in range(ROUNDS)]
    return max(sum(units * repeats / seconds for seconds in of_round) for of_round in rounds)


def _timed(call: Callable[[int], object], repeats: int) -> float:
    """Processor time of the calling thread."""
    start = time.thread_time()
    call(repeats)
    return time.thread_time() - start


def _arrays(name: str, footprint: int) -> tuple[Tensor, Tensor]:
    """Source and target: those of a footprint, or in the first-level cache."""
    if name == "read":
        return torch.full((footprint // 4 // MULTIPLE * MULTIPLE,), 0.5), torch.empty(16)
    size = footprint // 8 // MULTIPLE * MULTIPLE if name == "copy" else IN_CACHE
    return torch.full((size,), 0.5), torch.zeros(size)


def _units(name: str, x: Tensor) -> float:
    return x.numel() * {"read": 4, "copy": 8, "exponentiate": 1}[name]


def _numba_work(name: str, footprint: int) -> list[Callable[[], Work]]:
    from . import processor_kernels

    def make(kernel: Callable[..., object]) -> Work:
        x, target = _arrays(name, footprint)
        arrays = x.numpy(), target.numpy()
        each = {"multiply_add": 2 * processor_kernels.CHAIN, "exponentiate": processor_kernels.POWERS}
        units = float(each[name] * x.numel()) if name in each else _units(name, x)
        return lambda repeats: kernel(*arrays, repeats), units

    # Some cores read faster in order, others from several places at once.
    loops = ("read", "read_places") if name == "read" else (name,)
    return [functools.partial(make, getattr(processor_kernels, loop)) for loop in loops]


def _torch_work(name: str, footprint: int) -> list[Callable[[], Work]]:
    def make() -> Work:
        if name == "multiply_add":
            a = torch.zeros(256, 256)
            return _repeated(lambda: torch.mm(a, a)), 2.0 * 256**3
        x, target = _arrays(name, footprint)
        calls = {"read": x.sum, "copy": lambda: target.copy_(x), "exponentiate": lambda: torch.exp(x, out=target)}
        return _repeated(calls[name]), _units(name, x)

    return [make]


def _repeated(call: Callable[[], object]) -> Callable[[int], None]:
    def run(repeats: int) -> None:
        for _ in range(repeats):
            call()

    return run

"""A Triton driver that compiles for an NVIDIA GPU and runs the PTX on CPU tensors."""

from __future__ import annotations

import collections
import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssm_kernels.testing import Target, fake_target, is_interpreted

from ..compile_report import ARCHITECTURES
from ..environment import check_triton
from . import machine
from .memory import Findings, allocations_of
from .parser import Kernel, parse
from .translate import smallest_shared_access, translate

TARGETS = {name: architecture for name, architecture in ARCHITECTURES.items() if architecture.backend == "cuda"}


@dataclass(frozen=True)
class Launch:
    """Record of one launch."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    """Threads of a block."""
    shared_bytes: int
    instructions: dict[str, int]
    """Instructions executed, by kind, counted in warps."""
    findings: dict[str, int]
    """Findings of the checks, each with its number of occurrences."""
    diverged: bool
    """Threads of a block took different branches."""
    seconds: float
    """Processor time."""


@dataclass
class Report:
    """Launches inside an `emulated` block, in order."""

    launches: list[Launch] = field(default_factory=list)

    @property
    def findings(self) -> Findings:
        """Findings of the checks in all launches, by kernel."""
        found = Findings()
        for launch in self.launches:
            for what, times in launch.findings.items():
                found[f"{launch.kernel}: {what}"] += times
        return found

    def assert_clean(self) -> None:
        """Raise an `AssertionError` that lists the findings; no launch at all is an error too."""
        assert self.launches, "no kernel was launched"
        assert not self.findings, "\n".join(f"{what}, {n} times" for what, n in self.findings.items())


@dataclass(frozen=True)
class _Session:
    """State that the launches of one `emulated` block share."""

    report: Report
    checks: bool
    seed: int
    edit: Callable[[str, str], str] | None


_session: _Session | None = None


@contextlib.contextmanager
def emulated(
    target: str = "sm_90",
    *,
    num_sms: int = 2,
    checks: bool = True,
    seed: int = 0,
    edit: Callable[[str, str], str] | None = None,
) -> Iterator[Report]:
    """Run Triton kernels on CPU tensors by emulating the PTX compiled for an NVIDIA GPU.

    Inside, `kernel[grid](...)` compiles as on that GPU, and the PTX is executed on the tensors' own memory. The ops of
    `ssm_kernels` take their Triton backend. An autotuned kernel runs its first configuration.

    Args:
        target: `sm_80` and later; instructions that the emulator lacks are refused by name.
        num_sms: multiprocessors that launches see; few, so that programs loop over several tiles.
        checks: look for races, missing waits and fences, and reads of memory that was never written.
        seed: seed of the order of programs.
        edit: takes a kernel's name and its PTX and returns the PTX to run: to test the checks by removing a barrier.

    Yields:
        A report that grows with each launch.

    Raises:
        ModuleNotFoundError: Triton is not installed.
        ValueError: the target is unknown, or Triton's interpreter is on.
        Fault: an access outside the tensors, a misaligned one, or a barrier that is never reached.
        Unsupported: an instruction that the emulator does not have.
    """
    global _session
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}; got {target!r}")
    capability, shared = int(TARGETS[target].arch), TARGETS[target].shared_block
    if is_interpreted():
        raise ValueError("kernels are compiled here, not interpreted: unset TRITON_INTERPRET")
    if _session is not None:
        raise RuntimeError("an emulated block cannot be inside another")
    check_triton()
    from triton.runtime.driver import driver

    before = dict(vars(driver))
    emulating: Any = _Driver(target, capability, shared, num_sms)
    driver.set_active(emulating)
    _session = _Session(Report(), checks, seed, edit)
    try:
        with fake_target(Target(("cuda", capability), num_sms), "cpu"):
            yield _session.report
    finally:
        _session = None
        vars(driver).clear()
        vars(driver).update(before)


class _Driver:
    """The driver interface of Triton 3.4 and later."""

    def __init__(self, target: str, capability: int, shared: int, num_sms: int):
        from triton.backends.compiler import GPUTarget

        self.target, self.name = GPUTarget("cuda", capability, 32), f"emulated {target}"
        self.properties = {"max_shared_mem": shared, "multiprocessor_count": num_sms, "warpSize": 32}
        self.utils, self.launcher_cls = self, _Launcher

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        """Key of Triton's caches, apart from that of a real device."""
        return self.name

    def set_current_device(self, device: str) -> None:
        pass

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: str) -> dict[str, int]:
        return self.properties

    def load_binary(self, name: str, kernel: bytes, shared: int, device: str) -> tuple[None, str, int, int, int]:
        """A module, a function, registers, spills and the most threads of a block: only the last is read.

        Without a module nothing is unloaded at exit, when no driver is active any more (Triton 3.9).
        """
        return None, name, 0, 0, 1024

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """A benchmarker for which all configurations of an autotuned kernel take the same time."""
        return lambda call, quantiles=(0.5,), **options: [0.0] * len(quantiles)


class _Launcher:
    """Created for a compiled kernel, called once per launch."""

    def __init__(self, src: Any, metadata: Any):
        self.signature, self.metadata = dict(src.signature), metadata
        self.ptx = _read_ptx(metadata.hash, src.name)

    def __call__(
        self,
        x: int, y: int, z: int, stream: int, function: str, packed: object, launch_metadata: object, enter: object,
        leave: object, *arguments: object,
    ) -> None:  # fmt: skip
        session = _session
        if session is None:
            raise RuntimeError("a kernel that was compiled for the emulator is launched outside of emulated()")
        start = time.process_time()
        name = self.metadata.name
        ptx = self.ptx if session.edit is None else session.edit(name, self.ptx)
        kernel = _parsed(ptx)
        threads = kernel.threads or 32 * self.metadata.num_warps
        values: list[int | float] = []
        tensors: list[tuple[str, Tensor]] = []
        for (argument, kind), value in zip(self.signature.items(), arguments, strict=True):
            _flatten(argument, kind, value, values, tensors)
        scratch = torch.empty(x * y * z * getattr(self.metadata, "global_scratch_size", 0), dtype=torch.uint8)
        tensors.append(("scratch of the launch", scratch))
        values += [scratch.data_ptr(), 0]  # 0: scratch of the profiler, in versions that have one
        findings, instructions, diverged = machine.run(
            functools.partial(_translated, ptx, threads),
            kernel,
            threads // 32,
            self.metadata.shared,
            smallest_shared_access(kernel),
            allocations_of(tensors),
            values[: len(kernel.parameters)],
            (x, y, z),
            checks=session.checks,
            seed=session.seed,
        )
        session.report.launches.append(
            Launch(
                name, (x, y, z), threads, self.metadata.shared, dict(instructions), dict(findings), diverged,
                time.process_time() - start,
            )
        )  # fmt: skip


@functools.lru_cache(256)
def _read_ptx(key: str, kernel: str) -> str:
    """The PTX of a kernel in Triton's cache."""
    from triton.runtime.cache import get_cache_manager

    group = get_cache_manager(key).get_group(f"{kernel[:150]}.json") or {}
    path = next((path for name, path in group.items() if name.endswith(".ptx")), None)
    if path is None:
        raise RuntimeError(f"Triton's cache holds no PTX of {kernel}")
    return Path(path).read_text()


@functools.lru_cache(256)
def _parsed(ptx: str) -> Kernel:
    return parse(ptx)


@functools.lru_cache(256)
def _translated(ptx: str, threads: int, per_thread: bool) -> tuple[machine.Code, list[collections.Counter[str]], Any]:
    return translate(_parsed(ptx), threads, per_thread)


def _flatten(name: str, kind: Any, value: Any, values: list[int | float], tensors: list[tuple[str, Tensor]]) -> None:
    """Append the kernel parameters of an argument of a launch: several for a tuple, none for a constant."""
    if isinstance(kind, tuple):
        for i, (k, v) in enumerate(zip(kind, value, strict=True)):
            _flatten(f"{name}[{i}]", k, v, values, tensors)
    elif kind == "constexpr":
        pass
    elif kind.startswith("*"):
        values.append(0 if value is None else value.data_ptr())
        if value is not None:
            tensors.append((name, value))
    elif kind.startswith(("i", "u")):
        values.append(int(value))
    elif kind.startswith(("fp", "bf", "f")):
        values.append(float(value))
    else:
        raise NotImplementedError(f"argument {name}: the emulator has no {kind}")

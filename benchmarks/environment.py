"""Facts that a measured figure depends on besides the code: device, driver, packages, commit, and the command."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ssm_kernels import Backend, resolve_backend

from ..model.device import device_named
from .peers import PACKAGES


@contextlib.contextmanager
def current_device(name: str) -> Iterator[None]:
    """Make the device of that name the current one.

    Raises:
        ValueError: there is no such device.
    """
    if name == "cpu":
        yield
        return
    device = device_named(name)
    if device.type != "cuda":
        raise ValueError(f"device must be cpu, cuda, or one of several such as cuda:1; got {name!r}")
    with torch.cuda.device(device):
        yield


def check_triton() -> None:
    """Check that Triton, which the package needs on Linux alone, can be imported.

    Raises:
        ModuleNotFoundError: it cannot.
    """
    if importlib.util.find_spec("triton") is None:
        raise ModuleNotFoundError("compiling kernels needs the triton package: pip install triton")


def backends(device: str, op: str) -> tuple[Backend, ...]:
    """Fast backends of an op, named as in `cases.OPS`, that can run here. `auto` takes the last."""
    fast: tuple[Backend, ...] = ("torch", "numba", "triton")
    return tuple(backend for backend in fast if _can_run(backend, device, op))


def _can_run(backend: Backend, device: str, op: str) -> bool:
    # The op whose kernels they are.
    kernels = "ssd" if op.startswith("mamba3") else op.removeprefix("cross_").removesuffix("_step")
    try:
        return resolve_backend(backend, torch.device(device), kernels) == backend
    except RuntimeError:
        return False


def synchronize(device: str) -> None:
    """Wait until the device has finished its work."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def environment(device: str = "cpu") -> dict[str, Any]:
    """Facts for a result file."""
    packages = {}
    for name in ("torch", "triton", "numpy", "numba", *PACKAGES.values()):
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


def command_line(command: Any) -> str:
    """The shell command that repeats a measurement: options that differ from their defaults, without `--out`."""
    words = ["ssm-bench", type(command).__name__.lower()]
    options = []
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        if field.name == "out" or value == field.default:
            continue
        values = [str(v) for v in (value if isinstance(value, tuple) else (value,))]
        # Annotations are text here: `from __future__ import annotations`.
        if "Positional" in str(field.type):
            words += values
        else:
            options += [f"--{field.name.replace('_', '-')}", *values]
    return shlex.join(words + options)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _driver() -> str | None:
    """The driver's version by nvidia-smi; without that tool, the version that torch was built for."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if torch.version.hip or shutil.which(command[0]) is None:
        return f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")[0] or None


def _commit() -> str | None:
    """The commit, with "-dirty" where code differs from it; measured figures themselves may."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        folder = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)

    commit = git("describe", "--always", "--abbrev=12").stdout.strip()
    code = (":/", ":(top,exclude)benchmarks/results", ":(top,exclude)docs")
    is_dirty = git("diff", "--quiet", "HEAD", "--", *code).returncode == 1
    return commit + "-dirty" * is_dirty if commit else None

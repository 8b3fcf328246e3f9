"""Choice of the implementation that an op runs."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch

from .._triton.device import can_launch, why_too_old

Backend = Literal["auto", "triton", "numba", "torch", "reference"]
"""`auto` chooses. `triton`, `numba` (compiled for the CPU), `torch` (fast pure PyTorch) and `reference` (step by step)
run as requested, or raise."""
NUMBA_SPEEDUPS = {"selective_scan": 6.0, "ssd": 2.5, "causal_conv1d": 3.5, "rms_norm": 3.5, "add_rms_norm": 1.5}
"""Ops that have numba kernels, which `auto` takes, and how many times as long PyTorch takes on one thread of a CPU:
about, and forward and backward alike. A test compares them with the measured table of docs/benchmarks.md."""
HAS_NUMBA = importlib.util.find_spec("numba") is not None
"""Looked up once, since `torch.compile` cannot trace the call. numba is imported when an op of it first runs."""
NUMBA_MISSING = "the numba package is not installed (pip install 'numba>=0.68')"

logger = logging.getLogger("ssm_kernels")


class _Choice(threading.local):
    """The backend of this thread. `torch.compile` traces and guards it, which it cannot do with a context variable."""

    # Set in `__init__`, which runs in each thread: the guards do not follow a class attribute.

    def __init__(self):
        self.backend: Backend = "auto"


_choice = _Choice()
_already_logged: set[str] = set()


@contextlib.contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Set the backend of every op called inside the `with` block with `backend="auto"`.

    An explicit `backend` argument takes precedence. The setting applies to the current thread only. What the mixers
    recompute in the backward runs on the backend of the forward, whichever thread autograd runs it in.

    Args:
        backend: one of the names of `Backend`.

    Returns:
        a context manager; the backend before it is set again after the `with` block.

    Raises:
        ValueError: `backend` is not one of the known names.
    """
    before, _choice.backend = _choice.backend, _known(backend)
    try:
        yield
    finally:
        _choice.backend = before


def bind_backend(function: Callable) -> Callable:
    """Return the function bound to the current backend, for a backward outside of the `use_backend` of the forward."""
    # The choice is thread-local, and autograd may run a backward in a thread of its own.
    backend = _choice.backend

    def run(*args):
        with use_backend(backend):
            return function(*args)

    return run


def resolve_backend(
    backend: Backend, device: torch.device, op: str
) -> Literal["triton", "numba", "torch", "reference"]:
    """Return the backend that an op runs on.

    `auto` is `triton` on a GPU. On a CPU it is `numba` for the ops that gain by it, and `torch` for the others. Where
    it has to take a slower one than that, it logs the reason once. An explicit name never falls back.

    Args:
        backend: the op's `backend` argument; `auto` is the choice of `use_backend`, if there is one.
        device: device of the op's input.
        op: name of the op, for messages.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: `triton` or `numba` was requested by name and cannot run this op here, for the reason in the
            message.
    """
    if _known(backend) == "auto":
        backend = _choice.backend
    # Pure PyTorch runs on every device.
    if backend in ("torch", "reference"):
        return backend
    if (
        backend == "auto"
        and device.type == "cpu"
        and (HAS_NUMBA or op not in NUMBA_SPEEDUPS)
        and not can_launch(device)
    ):
        return "numba" if op in NUMBA_SPEEDUPS else "torch"  # before reasons, whose text takes as long as a small op
    if backend == "numba":
        obstacle = _why_not_numba(device, op)
        if obstacle is not None:
            raise RuntimeError(f"backend='numba' was requested, but {obstacle}")
        return "numba"
    obstacle = _why_not_triton(device, op)
    if backend == "triton":
        if obstacle is not None:
            raise RuntimeError(f"backend='triton' was requested, but {obstacle}")
        return "triton"
    if obstacle is None:
        return "triton"
    # A log record would break a graph that is traced.
    is_logged = not torch.compiler.is_compiling()
    if device.type == "cpu" and op in NUMBA_SPEEDUPS:
        if HAS_NUMBA:
            return "numba"
        if is_logged:
            _log_once(
                f"{_why_not_numba(device, op)}, and would make it about {NUMBA_SPEEDUPS[op]:g} times faster", op, device
            )
    elif device.type == "cuda" and is_logged:
        _log_once(obstacle, op, device)
    return "torch"


def _log_once(reason: str, op: str, device: torch.device) -> None:
    if reason not in _already_logged:
        _already_logged.add(reason)
        logger.warning("backend='auto' runs %s in pure PyTorch on %s: %s", op, device, reason)


_BACKENDS = get_args(Backend)


def _known(backend: str) -> Backend:
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(_BACKENDS)}; got {backend!r}")
    return backend  # type: ignore[return-value]


def _why_not_triton(device: torch.device, op: str) -> str | None:
    if not can_launch(device):
        return f"{op} got tensors on {device}, and Triton needs a GPU"
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed (pip install triton)"
    return why_too_old(device)


def _why_not_numba(device: torch.device, op: str) -> str | None:
    if device.type != "cpu":
        return f"{op} got tensors on {device}, and numba's kernels are for the CPU"
    if op not in NUMBA_SPEEDUPS:
        return f"{op} has no kernels in numba; those that have: {', '.join(sorted(NUMBA_SPEEDUPS))}"
    if not HAS_NUMBA:
        return NUMBA_MISSING
    return None

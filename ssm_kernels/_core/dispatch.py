"""Which implementation of an op runs, decided in one place."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch

from .._triton.device import can_launch

Backend = Literal["auto", "triton", "torch", "reference"]
"""`auto` chooses; `triton`, `torch` (fast pure PyTorch) and `reference` (step by step) are obeyed or refused."""

logger = logging.getLogger("ssm_kernels")


class _Choice(threading.local):
    """The backend of this thread. `torch.compile` traces and guards it, which it cannot do with a context variable.

    It is set in `__init__`, which runs in each thread: the guards do not follow a class attribute.
    """

    def __init__(self):
        self.backend: Backend = "auto"


_choice = _Choice()
_already_said: set[str] = set()


@contextlib.contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Choose the backend of every op called inside the `with` block with `backend="auto"`.

    An op that was given an explicit `backend` keeps it. The choice holds for the present thread alone. What the
    mixers compute again in the backward runs as in the forward, whichever thread autograd runs it in.

    Raises:
        ValueError: `backend` is not one of the known names.
    """
    before, _choice.backend = _choice.backend, _known(backend)
    try:
        yield
    finally:
        _choice.backend = before


def bind_backend(function: Callable) -> Callable:
    """The function as it would run now, for a backward that runs it outside of the present `use_backend`."""
    backend = _choice.backend

    def run(*args):
        with use_backend(backend):
            return function(*args)

    return run


def resolve_backend(backend: Backend, device: torch.device, op: str) -> Literal["triton", "torch", "reference"]:
    """Turn a request into the backend that runs.

    `auto` gives `triton` on a GPU and `torch` elsewhere; when it must give `torch` on a GPU it says so once,
    with the reason. An explicit request never falls back.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: `triton` was asked for by name and cannot run this op here; the message says why.
    """
    if _known(backend) == "auto":
        backend = _choice.backend
    if backend in ("torch", "reference"):
        return backend
    obstacle = _why_not_triton(device, op)
    if backend == "triton":
        if obstacle is not None:
            raise RuntimeError(f"backend='triton' was asked for, but {obstacle}")
        return "triton"
    if obstacle is None:
        return "triton"
    if device.type == "cuda" and obstacle not in _already_said:
        _already_said.add(obstacle)
        logger.warning("backend='auto' runs %s in pure PyTorch on %s: %s", op, device, obstacle)
    return "torch"


def _known(backend: str) -> Backend:
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}; got {backend!r}")
    return backend  # type: ignore[return-value]


def _why_not_triton(device: torch.device, op: str) -> str | None:
    if not can_launch(device):
        return f"{op} was given tensors on {device}, and Triton needs a GPU"
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed (pip install triton)"
    return None

"""Warm-up, capture and replay of CUDA graphs."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssm_kernels import resolve_backend

from .interface import LanguageModel

logger = logging.getLogger(__name__)


def has_graphs(device: torch.device) -> bool:
    """Whether work on this device can be captured in a graph."""
    return device.type == "cuda"


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return the stream on which work on this device is queued now, or None where there are no streams."""
    return torch.cuda.current_stream(device) if has_graphs(device) else None


def graph_key(model: LanguageModel | nn.Module, device: torch.device) -> tuple:
    """Return everything that a graph of the model depends on besides its static inputs and states.

    Whoever keeps such memory, with or without a graph, keeps it for this key: on another stream a step would read
    states before the last step on the first stream has written them.

    Args:
        model: its weights, which a graph reads at their addresses. Weights changed in place keep the key: a graph
            reads their new values.
        device: device of the states.
    """
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    backend = resolve_backend("auto", device, "ssd")
    weights = tuple((t.data_ptr(), t.dtype) for t in itertools.chain(model.parameters(), model.buffers()))
    return device, current_stream(device), autocast, backend, torch.get_float32_matmul_precision(), weights


def warm_up(step: Callable[[], Tensor], device: torch.device) -> Tensor:
    """Run a step on a side stream, as capture requires."""
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        result = step()
    current.wait_stream(side)
    result.record_stream(current)
    return result


def capture(step: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Capture a step without running it.

    Returns:
        A function that replays the step, and the tensor that holds its result afterwards.

    Raises:
        RuntimeError: the step does something that a graph cannot hold.
    """
    graph = torch.cuda.CUDAGraph()
    # Thread-local mode: other threads may allocate meanwhile.
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = step()
    return graph.replay, result


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Log a warning the first time that it occurs in this process."""
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)

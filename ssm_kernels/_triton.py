"""What the Triton launches share. Nothing here imports Triton."""

from __future__ import annotations

import contextlib
import os

import torch
from torch import Tensor


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: `TRITON_INTERPRET=1`, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def processors(device: torch.device) -> int:
    """How many programs run at once, at least; two in the interpreter, so that sums over programs are tested."""
    return 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """A context in which kernels start on the tensor's device, on its current stream."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def rows_of(x: Tensor) -> Tensor:
    """(..., D) -> (rows, D) with adjacent channels: a view where strides allow."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()

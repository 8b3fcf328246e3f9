"""Devices and launch options of the Triton kernels. Nothing here imports Triton."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: `TRITON_INTERPRET=1`, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


_WAS_INTERPRETED = is_interpreted()
"""At import, as Triton reads it: calls ask for it, and the environment takes as long as a small operation."""


class Target(NamedTuple):
    """The properties of a device on which launches depend."""

    architecture: tuple[str, int | str]
    """Triton's backend and its architecture: `("cuda", 90)`, `("hip", "gfx942")`."""
    num_sms: int
    """Multiprocessors, or compute units."""


_fake_target: Target | None = None
_device_type = "meta"
"""Device type of the tensors that are taken for tensors on the fake target."""


@contextlib.contextmanager
def fake_target(target: Target, device_type: str = "meta") -> Iterator[None]:
    """Take tensors on the meta device for tensors on such a GPU, to see what would be launched, without one.

    Args:
        target: the GPU.
        device_type: "cpu" takes CPU tensors instead, for a Triton driver that emulates the GPU.
    """
    global _fake_target, _device_type
    _fake_target, _device_type = target, device_type
    try:
        yield
    finally:
        _fake_target = None


def can_launch(device: torch.device) -> bool:
    """Whether kernels run on tensors of this device."""
    emulated = _device_type if _fake_target else "cpu" if _WAS_INTERPRETED else None
    return device.type in ("cuda", emulated)


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a device; two in the interpreter, so that sums over programs are tested."""
    if _fake_target:
        return _fake_target.num_sms
    return 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def capability(device: torch.device) -> tuple[str, int | str]:
    """The architecture kernels are configured for: ("cuda", 90) or ("hip", "gfx942"); Hopper in the interpreter."""
    if _fake_target:
        return _fake_target.architecture
    if device.type == "cpu":
        return "cuda", 90
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return "hip", properties.gcnArchName.split(":")[0]
    return "cuda", properties.major * 10 + properties.minor


MIN_CAPABILITY = 80
"""Compute capability from which Triton's products use the tensor cores, and the kernels are compiled and tested."""


def why_too_old(device: torch.device) -> str | None:
    """The reason not to run kernels on an NVIDIA GPU before Ampere; None for every other device."""
    vendor, version = capability(device)
    if vendor != "cuda" or int(version) >= MIN_CAPABILITY:
        return None
    return (
        f"{device} is sm_{version}, and the Triton kernels need sm_{MIN_CAPABILITY} (A100, RTX 30) or later;"
        " backend='torch' runs there"
    )


def check_float64_products(dtype: torch.dtype, op: str) -> None:
    """Check that this Triton compiles an op whose kernels multiply matrices.

    Raises:
        RuntimeError: in float64, which `tl.dot` takes from Triton 3.5 on.
    """
    if dtype != torch.float64:
        return
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5):
        raise RuntimeError(
            f"{op} in float64 needs Triton 3.5 or later for its matrix products, got {triton.__version__};"
            " backend='torch' runs there"
        )


FUSED_MULTIPLY_ADD: dict[str, bool] = {"enable_fp_fusion": True}
"""Launch option of every kernel: a product and a sum may be rounded once. From Triton 3.10 it is no longer default."""


def maxnreg_option(count: int, device: torch.device) -> dict[str, int]:
    """A launch option for NVIDIA: `count` registers a thread. Without it, ptxas may spill to reach a lower count."""
    return {"maxnreg": count} if capability(device)[0] == "cuda" else {}


MAX_PROGRAMS_X, MAX_PROGRAMS_Y = 2**31 - 1, 65_535
"""Largest grid of a launch: CUDA C++ programming guide, "Technical Specifications per Compute Capability"."""


def launch_grid(x: int, y: int, y_is: str) -> tuple[int, int]:
    """Check the grid of a launch, which a driver would refuse without a reason.

    Args:
        x, y: programs in each dimension.
        y_is: the meaning of `y`, for the message.

    Raises:
        ValueError: a dimension is larger than a GPU launches.
    """
    if x > MAX_PROGRAMS_X or y > MAX_PROGRAMS_Y:
        raise ValueError(
            f"a launch takes at most {MAX_PROGRAMS_Y:,} {y_is}, in {MAX_PROGRAMS_X:,} tiles of rows; got {y:,}, in"
            f" {x:,}; backend='torch' has no such limit"
        )
    return x, y


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """A context in which kernels start on the tensor's device, on its current stream."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def rows_of(x: Tensor) -> Tensor:
    """(..., D) -> (rows, D) with contiguous channels: a view where strides allow."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def with_contiguous_last_dim(x: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous, else a copy."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


MAX_DIRECTIONS = 15
"""Two bits each in an int32, which has a sign."""


def pack_directions(directions: Sequence[int]) -> int:
    """Pack codes of scan directions in an integer, two bits each, the first lowest; see `unpack_direction`."""
    if len(directions) > MAX_DIRECTIONS:
        raise ValueError(f"directions must be at most {MAX_DIRECTIONS}, got {len(directions)}")
    return sum(code << 2 * k for k, code in enumerate(directions))

"""Your own Triton kernel, compiled for a GPU that is not there: emulated, and compared with the reference.

    python examples/bring_your_kernel.py

The same from the command line: ssm-bench verify --kernel examples/bring_your_kernel.py:rms_norm rms_norm --ptx sm_90
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    sys.exit("triton is not installed: pip install triton")

from vlmamba.benchmarks.ptx import emulated
from vlmamba.benchmarks.verify import verify


@triton.jit
def norm_kernel(x_ptr, weight_ptr, y_ptr, G, eps, BLOCK: tl.constexpr):
    """Normalize one group of G channels. Grid (rows, groups)."""
    i = tl.arange(0, BLOCK)
    first = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * G
    x = tl.load(x_ptr + first + i, i < G, other=0.0).to(tl.float32)  # (BLOCK,)
    scale = 1 / tl.sqrt(tl.sum(x * x, 0) / G + eps)
    weight = tl.load(weight_ptr + tl.program_id(1) * G + i, i < G, other=0.0).to(tl.float32)
    tl.store(y_ptr + first + i, x * scale * weight, i < G)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, group_size: int | None = None) -> Tensor:
    """Normalize (..., D), with those arguments of `ssm_kernels.rms_norm` that the kernel has: there is no gate."""
    x, D = x.contiguous(), x.shape[-1]
    y, G = torch.empty_like(x), group_size or D
    norm_kernel[(x.numel() // D, D // G)](x, weight.contiguous(), y, G, eps, BLOCK=triton.next_power_of_2(G))
    return y


def emulate() -> int:
    """Run the kernel as compiled for sm_90 and return how many instructions its warps executed."""
    x, weight = torch.randn(5, 300), torch.rand(300)
    with emulated("sm_90") as report:
        y = rms_norm(x, weight)
    report.assert_clean()  # no race, no access outside the tensors, nothing read that was not written
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (300,), weight, 1e-5))
    return sum(report.launches[0].instructions.values())


if __name__ == "__main__":
    print(emulate(), "instructions of compiled code; no finding")
    print(verify(rms_norm, "rms_norm", ("fp32",), target="sm_90"))

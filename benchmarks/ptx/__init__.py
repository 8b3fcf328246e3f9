"""Emulation of compiled Triton kernels on a CPU: the PTX is executed, and every access is checked::

    from vlmamba.benchmarks.ptx import emulated

    with emulated("sm_90") as report:
        kernel[grid](x, out, n, BLOCK=128)  # CPU tensors
    report.assert_clean()

Unlike Triton's interpreter it covers layouts, shared memory, barriers, asynchronous copies and tensor cores. It does
not cover the work of ptxas (registers, scheduling), the rounding of the hardware's approximations, and speed.

Files, in the order of a launch: `driver` (Triton's side), `parser`, `translate` (PTX to Python), `machine` (threads,
barriers, asynchronous operations), `memory` (accesses and their checks), `matrix` (tensor-core fragments), `values`
(arithmetic). Titles in quotation marks are sections of NVIDIA's "PTX ISA".
"""

from .driver import Launch, Report, emulated
from .memory import Fault
from .parser import Unsupported

__all__ = ["Fault", "Launch", "Report", "Unsupported", "emulated"]

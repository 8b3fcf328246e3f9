"""Execution of compiled Triton kernels on a CPU, with no GPU: the PTX is emulated, and every access is checked::

    from vlmamba.benchmarks.ptx import emulated

    with emulated("sm_90") as report:
        kernel[grid](x, out, n, BLOCK=128)  # CPU tensors
    report.assert_clean()

It shows what Triton's interpreter cannot: layouts, shared memory, barriers, asynchronous copies, tensor cores. What it
cannot show: ptxas' work (registers, scheduling), rounding of the hardware's approximations, speed.

Files, in the order of a launch: `driver` (Triton's side), `parser`, `translate` (PTX to Python), `machine` (threads,
barriers, asynchronous work), `memory` (accesses and their checks), `matrix` (tensor-core fragments), `values`
(arithmetic).
"""

from .driver import Launch, Report, emulated
from .memory import Fault
from .parser import Unsupported

__all__ = ["Fault", "Launch", "Report", "Unsupported", "emulated"]

"""Rates of named devices, for bounds by issue, memory and pipes.

The bounds are of throughput alone: latencies, bank conflicts and misses of caches come on top. Clocks are those that
the devices hold under such a load, below the boost clock: every bound but that of memory scales with them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..compile_report import ARCHITECTURES
from ..roofline import DEVICES


@dataclass(frozen=True)
class Machine:
    """A device as the bounds see it."""

    target: str
    """A key of `ARCHITECTURES`."""
    clock: float
    """Clocks a second."""
    bandwidth: float
    """Bytes a second of device memory."""
    l2: int
    """Bytes of the second-level cache."""
    num_sms: int
    fp32_clocks: int = 1
    """Clocks that a warp's float32 instruction holds its pipe."""

    @property
    def slots(self) -> float:
        """Warp-instructions a second."""
        return 4 * self.num_sms * self.clock


def _machine(name: str, target: str, clock: float, l2: int, **options: int) -> Machine:
    return Machine(target, clock, DEVICES[name].bandwidth, l2 << 20, ARCHITECTURES[target].num_sms, **options)


MACHINES: dict[str, Machine] = {
    "H100": _machine("H100", "sm_90", 1.7e9, 50),  # boost 1.98 GHz
    "H200": _machine("H200", "sm_90", 1.7e9, 50),
    "A100": _machine("A100", "sm_80", 1.3e9, 40, fp32_clocks=2),  # boost 1.41 GHz
    "B200": _machine("B200", "sm_100", 1.7e9, 126),
    "RTX 4090": _machine("RTX 4090", "sm_89", 2.4e9, 72),  # boost 2.52 GHz
}
CLOCKS = {"ALU": 2, "IMAD": 2, "MUFU": 8}
"""Clocks that a warp-instruction holds its pipe in a sub-partition."""


def machines_of(target: str) -> dict[str, Machine]:
    """Devices with a target's machine code."""
    return {name: machine for name, machine in MACHINES.items() if machine.target == target}

"""Rates of named devices: peaks for the roofline, and rates under load for the bounds of `machine-code`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .compile_report import ARCHITECTURES


@dataclass(frozen=True)
class Device:
    """Peak rates per second, dense, at the vendor's boost clock."""

    bandwidth: float
    """Bytes."""
    half: float
    """Matrix operations of bfloat16 and float16 with float32 accumulation."""
    tf32: float
    """Matrix operations of TF32 (of float32 on AMD)."""
    fp32: float
    """Other operations of float32."""
    exponentials: float
    """Derived, not published: see `_exponentials`."""

    def matrix(self, dtype: torch.dtype) -> float:
        """Matrix operations of a dtype; float32 takes three products of TF32, or no tensor cores."""
        return self.half if dtype in (torch.bfloat16, torch.float16) else max(self.tf32 / 3, self.fp32)


def _exponentials(fp32: float, lanes: int) -> float:
    """Rate of the exponential unit: 16 per multiprocessor and clock, in which `lanes` float32 multiply-adds start.

    NVIDIA: CUDA C++ programming guide, "Throughput of Native Arithmetic Instructions", row of reciprocal, exp2, log2.
    AMD: a quarter of the rate of 64 lanes (CDNA 3, transcendental instructions). The clock follows from `fp32`.
    """
    return fp32 / (2 * lanes) * 16


DEVICES: dict[str, Device] = {
    # NVIDIA A100 80GB SXM datasheet: 2,039 GB/s, 312, 156 and 19.5 TFLOPS. 64 lanes: GA100 whitepaper.
    "A100": Device(2.039e12, 312e12, 156e12, 19.5e12, _exponentials(19.5e12, 64)),
    # NVIDIA H100 SXM datasheet: 3.35 TB/s; 1,979, 989 (both with sparsity) and 67 TFLOPS.
    "H100": Device(3.35e12, 989.5e12, 494.5e12, 67e12, _exponentials(67e12, 128)),
    # NVIDIA H200 SXM datasheet: 4.8 TB/s, the rest as H100.
    "H200": Device(4.8e12, 989.5e12, 494.5e12, 67e12, _exponentials(67e12, 128)),
    # NVIDIA Blackwell architecture brief, HGX B200: 8 TB/s; 4,500, 2,200 (both with sparsity) and 80 TFLOPS.
    "B200": Device(8e12, 2250e12, 1100e12, 80e12, _exponentials(80e12, 128)),
    # AMD Instinct MI300X datasheet: 5.3 TB/s; 1,307.4, 163.4 (float32 matrix) and 163.4 TFLOPS. 128 lanes: two
    # multiply-adds a lane and clock.
    "MI300X": Device(5.3e12, 1307.4e12, 163.4e12, 163.4e12, _exponentials(163.4e12, 128)),
    # NVIDIA L40S datasheet: 864 GB/s; 362.05, 183 and 91.6 TFLOPS.
    "L40S": Device(0.864e12, 362.05e12, 183e12, 91.6e12, _exponentials(91.6e12, 128)),
    # NVIDIA Ada whitepaper, RTX 4090: 1,008 GB/s; 165.2 (adding in float32), 82.6 and 82.6 TFLOPS.
    "RTX 4090": Device(1.008e12, 165.2e12, 82.6e12, 82.6e12, _exponentials(82.6e12, 128)),
}


def device_named(name: str) -> Device | None:
    """The device whose name is in the name that a driver reports, such as `NVIDIA H100 80GB HBM3`."""
    return next((device for key, device in DEVICES.items() if key in name), None)


@dataclass(frozen=True)
class Machine:
    """A device as the bounds of `machine-code` see it.

    They are of throughput alone: latencies, bank conflicts and misses of caches come on top. Clocks are those that the
    devices hold under such a load, below the boost clock: every bound but that of memory scales with them.
    """

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
    # NVIDIA RTX Blackwell whitepaper, RTX 5090: 1,792 GB/s, boost 2.41 GHz.
    "RTX 5090": Machine("sm_120", 2.3e9, 1.792e12, 96 << 20, ARCHITECTURES["sm_120"].num_sms),
}
CLOCKS = {"ALU": 2, "IMAD": 2, "MUFU": 8}
"""Clocks that a warp-instruction holds its pipe in a sub-partition."""


def first_machine(target: str) -> tuple[str]:
    """Name of the first device in the table with a target's machine code.

    Raises:
        ValueError: there is none.
    """
    for name, machine in MACHINES.items():
        if machine.target == target:
            return (name,)
    raise ValueError(f"no device with {target} is known; target must be one of {_targets()}")


def _targets() -> str:
    return ", ".join(dict.fromkeys(machine.target for machine in MACHINES.values()))

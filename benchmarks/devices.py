"""Rates of named devices: peaks for the roofline, and rates under load for the bounds of `machine-code`.

Each figure names the document that gives it. Three kinds are in no document that could be found, and say so: clocks
under load, which are assumed; the rates at which sub-partitions of Blackwell take integer instructions; and a B300's
share of the chip's multiprocessors.
"""

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


def _exponentials(fp32: float, lanes: int, per_clock: int = 16) -> float:
    """Rate of the exponential unit: `per_clock` per multiprocessor and clock, while `lanes` multiply-adds start.

    The clock follows from `fp32`. NVIDIA, 16: CUDA C++ programming guide, "Throughput of Native Arithmetic
    Instructions", row of reciprocal, exp2, log2; Zadouri et al., "FlashAttention-4" (2026), for Blackwell. AMD: a
    quarter of the rate of 64 lanes (AMD Instinct MI300 instruction set architecture, transcendental instructions).
    """
    return fp32 / (2 * lanes) * per_clock


DEVICES: dict[str, Device] = {
    # NVIDIA A100 80GB SXM datasheet: 2,039 GB/s, 312, 156 and 19.5 TFLOPS. 64 lanes: GA100 whitepaper.
    "A100": Device(2.039e12, 312e12, 156e12, 19.5e12, _exponentials(19.5e12, 64)),
    # NVIDIA H100 SXM datasheet: 3.35 TB/s; 1,979, 989 (both with sparsity) and 67 TFLOPS.
    "H100": Device(3.35e12, 989.5e12, 494.5e12, 67e12, _exponentials(67e12, 128)),
    # NVIDIA H200 SXM datasheet: 4.8 TB/s, the rest as H100.
    "H200": Device(4.8e12, 989.5e12, 494.5e12, 67e12, _exponentials(67e12, 128)),
    # NVIDIA Blackwell architecture technical brief, per GPU of an HGX B200: 7.7 TB/s; 2,250, 1,100 (both dense) and 75
    # TFLOPS; 5 tera-exponentials/s. Its first edition had 8 TB/s and 80 TFLOPS.
    "B200": Device(7.7e12, 2250e12, 1100e12, 75e12, _exponentials(75e12, 128)),
    # The same, of an HGX B300: as B200, but 10.7 tera-exponentials/s, which is twice the rate a multiprocessor ("Inside
    # NVIDIA Blackwell Ultra", NVIDIA Technical Blog, 2025).
    "B300": Device(7.7e12, 2250e12, 1100e12, 75e12, _exponentials(75e12, 128, 32)),
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

    They are of throughput alone: latencies, bank conflicts and misses of caches come on top.
    """

    target: str
    """A key of `ARCHITECTURES`."""
    clock: float
    """Clocks a second, assumed: what a device may hold under such a load, below the boost clock that is published.
    Every bound but that of memory scales with it."""
    bandwidth: float
    """Bytes a second of device memory."""
    l2: int
    """Bytes of the second-level cache."""
    num_sms: int
    fp32_clocks: int = 1
    """Clocks that a warp's float32 instruction holds its pipe in a sub-partition."""
    alu_clocks: int = 2
    """The same for integer and logical instructions."""
    mufu_clocks: int = 8
    """The same for the exponential unit."""

    @property
    def slots(self) -> float:
        """Warp-instructions a second."""
        return 4 * self.num_sms * self.clock

    @property
    def clocks(self) -> dict[str, int]:
        """Clocks that a warp-instruction holds its pipe in a sub-partition, by pipe.

        Float32 and the exponential unit: see `DEVICES`. Integers, to compute capability 9.0: CUDA C++ programming
        guide, "Throughput of Native Arithmetic Instructions". Blackwell has lanes for float32 and int32 alike (NVIDIA
        RTX Blackwell whitepaper; "Inside NVIDIA Blackwell Ultra"): one clock is the least, and whether every logical
        instruction, and B200 at all, reaches it was not found. Nor was IMAD's rate there, which is Hopper's.
        """
        return {"FP32": self.fp32_clocks, "ALU": self.alu_clocks, "IMAD": 2, "MUFU": self.mufu_clocks}


def _machine(name: str, target: str, clock: float, l2: int, **options: int) -> Machine:
    return Machine(target, clock, DEVICES[name].bandwidth, l2 << 20, ARCHITECTURES[target].num_sms, **options)


MACHINES: dict[str, Machine] = {
    # NVIDIA H100 Tensor Core GPU architecture whitepaper: 50 MB, boost 1.98 GHz (1.83 GHz for tensor cores). H200: the
    # same chip.
    "H100": _machine("H100", "sm_90", 1.7e9, 50),
    "H200": _machine("H200", "sm_90", 1.7e9, 50),
    # NVIDIA A100 Tensor Core GPU architecture whitepaper: 40 MB, boost 1.41 GHz, 64 float32 lanes.
    "A100": _machine("A100", "sm_80", 1.3e9, 40, fp32_clocks=2),
    # NVIDIA Blackwell tuning guide: 126 MB. The boost clock, 1.98 GHz, follows from 75 TFLOPS on 148 multiprocessors.
    "B200": _machine("B200", "sm_100", 1.7e9, 126, alu_clocks=1),
    # 75 TFLOPS say that 148 of the chip's 160 multiprocessors are in use at B200's clock, or all at a lower one: which
    # of the two was not found. L2 as B200's.
    "B300": _machine("B300", "sm_103", 1.7e9, 126, alu_clocks=1, mufu_clocks=4),
    # NVIDIA Ada whitepaper: 72 MB, boost 2.52 GHz.
    "RTX 4090": _machine("RTX 4090", "sm_89", 2.4e9, 72),
    # NVIDIA RTX Blackwell whitepaper: 1,792 GB/s, 96 MB, boost 2.41 GHz.
    "RTX 5090": Machine("sm_120", 2.3e9, 1.792e12, 96 << 20, ARCHITECTURES["sm_120"].num_sms, alu_clocks=1),
}


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

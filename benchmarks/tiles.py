"""Constants of the launchers whose best value machine code does not tell: those that `ssm-bench gpu-suite` times.

Instructions, registers and bytes are the same, or nearly so, for each value. What differs is how well programs hide
each other's latency, which only a GPU shows. A value that wins there is written into the launcher by hand.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import NamedTuple

import ssm_kernels

from .options import Mode


class Choice(NamedTuple):
    """A constant, the values that may be best, and the call that it is timed in."""

    module: str
    """Module in `ssm_kernels`, the only one that reads the constant."""
    constant: str
    values: tuple[int, ...]
    """In ascending order; the shipped one is among them."""
    op: str
    mode: Mode

    @property
    def shipped(self) -> int:
        return getattr(self._loaded(), self.constant)

    @contextlib.contextmanager
    def set_to(self, value: int) -> Iterator[None]:
        """Launch with this value, forward and backward, inside a `with` block."""
        shipped = self.shipped
        setattr(self._loaded(), self.constant, value)
        try:
            yield
        finally:
            setattr(self._loaded(), self.constant, shipped)

    def _loaded(self) -> object:
        return importlib.import_module(f"{ssm_kernels.__name__}.{self.module}")

    def __str__(self) -> str:
        return f"{self.module}.{self.constant}"


CHOICES = (
    Choice("causal_conv1d.triton.forward", "TILE_BYTES", (1024, 2048, 4096), "causal_conv1d", "fwd"),
    Choice("causal_conv1d.triton.backward", "TILE_BYTES", (512, 1024, 2048), "causal_conv1d", "fwd+bwd"),
    Choice("causal_conv1d.triton.step", "BLOCK", (128, 256, 512), "causal_conv1d_step", "fwd"),
    Choice("cross_scan.triton.tile", "TILE", (512, 1024, 2048, 4096), "cross_scan", "fwd+bwd"),
    Choice("selective_scan.triton.backward", "PROGRAMS_PER_SM", (8, 16, 32), "selective_scan", "fwd+bwd"),
    Choice("selective_scan.triton.step", "STATE_ELEMENTS", (256, 512, 1024), "selective_scan_step", "fwd"),
    Choice("ssd.triton.step", "STATE_ELEMENTS", (1024, 2048, 4096), "ssd_step", "fwd"),
)

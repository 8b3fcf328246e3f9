"""Connector config as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ssm_kernels import BIDIRECTIONAL, CROSS, ScanDirection

MAX_SIZE = 2**20
"""Largest dimension. Beyond it the config is damaged, and rejected before memory is allocated."""
Kind = Literal["mlp", "vss-mlp", "vss-l2", "mamba2-mlp", "mamba2-basic", "mamba2-advanced"]
Scan = Literal["bidirectional", "cross"]
VSS = Literal["ss2d", "mamba"]


@dataclass(frozen=True)
class ConnectorConfig:
    """Kind and sizes of a connector.

    The first three kinds are VL-Mamba's (arXiv 2403.13600, section 3.2), the others ML-Mamba's (2407.19832,
    section 3.3). VL-Mamba's weights and details were never published; details that its paper leaves open follow VMamba.
    """

    kind: Kind = "vss-l2"
    scan: Scan = "bidirectional"
    """`bidirectional` scans rows forward and backward; `cross` scans columns too."""
    vss: VSS = "ss2d"
    """Layer that scans in VL-Mamba's connectors: `ss2d` is VMamba's, with parameters for each direction; `mamba` one
    Mamba-1 mixer that runs along each. The paper's words, a scan mechanism and one Mamba layer, allow both."""
    d_state: int | None = None
    """N; None is 16 in VL-Mamba's connectors and 128 in ML-Mamba's."""
    expand: int = 2
    d_conv: int = 4
    """Width K of the convolution in ML-Mamba's scans and in `vss="mamba"`."""
    headdim: int = 64
    """ML-Mamba only, like `ngroups`, `n_layer` and `chunk_size`."""
    ngroups: int = 1
    n_layer: int = 2
    chunk_size: int = 64

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"connector kind must be one of {', '.join(get_args(Kind))}; got {self.kind!r}")
        if self.scan not in get_args(Scan):
            raise ValueError(f"scan must be 'bidirectional' or 'cross', got {self.scan!r}")
        if self.vss not in get_args(VSS):
            raise ValueError(f"vss must be 'ss2d' or 'mamba', got {self.vss!r}")
        for name in ("d_state", "expand", "d_conv", "headdim", "ngroups", "n_layer", "chunk_size"):
            value = getattr(self, name)
            if name == "d_state" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} must be int, got {value!r}")
            most = 64 if name == "n_layer" else MAX_SIZE
            if not 1 <= value <= most:
                bound = "at least 1" if value < 1 else f"at most {most}"
                raise ValueError(f"{name} must be {bound}, got {value}")

    @property
    def directions(self) -> tuple[ScanDirection, ...]:
        """Scan directions over the grid."""
        return BIDIRECTIONAL if self.scan == "bidirectional" else CROSS

"""Tensors of a layer that a fused step reads and writes."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor, nn

from ..mamba import Mamba
from ..mamba2 import Mamba2
from ..norm import RMSNorm
from ..quantized import GROUP, QuantizedLinear
from ..state import MixerState

Layer: TypeAlias = tuple[RMSNorm, Mamba | Mamba2]
"""A pre-norm residual layer: `residual + mixer(norm(residual))`."""
# Columns of the table that gives a kernel the addresses of a layer's tensors.
(
    NORM, IN_PROJ, IN_BIAS, CONV_WEIGHT, CONV_BIAS, X_PROJ, DT_PROJ, DT_BIAS, A_LOG, SKIP, MIXER_NORM, OUT_PROJ,
    OUT_BIAS, CONV_STATE, SCAN_STATE, IN_SCALE, X_SCALE, OUT_SCALE,
) = range(18)  # fmt: skip
N_COLUMNS = 18

PROJECTIONS: dict[type, tuple[str, ...]] = {Mamba: ("in_proj", "x_proj", "out_proj"), Mamba2: ("in_proj", "out_proj")}
"""Layers of a mixer whose matrices may be quantized."""


def tensors(norm: RMSNorm, mixer: Mamba | Mamba2, state: MixerState) -> dict[int, tuple[Tensor | None, int]]:
    """Return the tensors of a layer by column, each with its number of elements."""
    width, inner, n = mixer.d_model, mixer.d_inner, mixer.d_state
    batch = len(state.conv)
    if isinstance(mixer, Mamba):
        rows, channels = 2 * inner, inner
        own = {
            **matrix(mixer.x_proj, X_PROJ, X_SCALE, mixer.dt_rank + 2 * n, inner),
            DT_PROJ: (mixer.dt_proj.weight, inner * mixer.dt_rank),
            DT_BIAS: (mixer.dt_proj.bias, inner),
            A_LOG: (mixer.A_log, inner * n),
            SKIP: (mixer.D, inner),
        }
    else:
        channels = mixer.d_conv_channels
        rows = inner + channels + mixer.nheads
        own = {
            DT_BIAS: (mixer.dt_bias, mixer.nheads),
            A_LOG: (mixer.A_log, mixer.nheads),
            SKIP: (mixer.D, inner if mixer.D_has_hdim else mixer.nheads),
            MIXER_NORM: (mixer.norm.weight if mixer.rmsnorm else None, inner),
        }
    return own | {
        NORM: (norm.weight, width),
        **matrix(mixer.in_proj, IN_PROJ, IN_SCALE, rows, width),
        IN_BIAS: (mixer.in_proj.bias, rows),
        CONV_WEIGHT: (mixer.conv1d.weight, channels * mixer.d_conv),
        CONV_BIAS: (mixer.conv1d.bias, channels),
        **matrix(mixer.out_proj, OUT_PROJ, OUT_SCALE, width, inner),
        OUT_BIAS: (mixer.out_proj.bias, width),
        CONV_STATE: (state.conv, batch * (mixer.d_conv - 1) * channels),
        SCAN_STATE: (state.ssm, batch * inner * n),
    }


def matrix(
    layer: nn.Linear | QuantizedLinear, column: int, scale_column: int, rows: int, columns: int
) -> dict[int, tuple[Tensor | None, int]]:
    """Return the elements of a layer's matrix, and their scales where it has some, each with its number of elements."""
    if isinstance(layer, nn.Linear):
        return {column: (layer.weight, rows * columns), scale_column: (None, 0)}
    n_elements, groups = (rows * columns, 1) if layer.bits == 8 else (rows * columns // 2, columns // GROUP)
    return {column: (layer.qdata, n_elements), scale_column: (layer.scale, rows * groups)}

"""Tensors of a layer that a fused step reads and writes."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

from ..mamba import Mamba
from ..mamba2 import Mamba2
from ..norm import RMSNorm
from ..state import MixerState

Layer: TypeAlias = tuple[RMSNorm, Mamba | Mamba2]
"""A pre-norm residual layer: `residual + mixer(norm(residual))`."""
# Columns of the table that gives a kernel the addresses of a layer's tensors.
(
    NORM, IN_PROJ, IN_BIAS, CONV_WEIGHT, CONV_BIAS, X_PROJ, DT_PROJ, DT_BIAS, A_LOG, SKIP, MIXER_NORM, OUT_PROJ,
    OUT_BIAS, CONV_STATE, SCAN_STATE,
) = range(15)  # fmt: skip
N_COLUMNS = 15


def tensors(norm: RMSNorm, mixer: Mamba | Mamba2, state: MixerState) -> dict[int, tuple[Tensor | None, int]]:
    """Return the tensors of a layer by column, each with its number of elements."""
    width, inner, n = mixer.d_model, mixer.d_inner, mixer.d_state
    batch = len(state.conv)
    if isinstance(mixer, Mamba):
        rows, channels = 2 * inner, inner
        own = {
            X_PROJ: (mixer.x_proj.weight, (mixer.dt_rank + 2 * n) * inner),
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
        IN_PROJ: (mixer.in_proj.weight, rows * width),
        IN_BIAS: (mixer.in_proj.bias, rows),
        CONV_WEIGHT: (mixer.conv1d.weight, channels * mixer.d_conv),
        CONV_BIAS: (mixer.conv1d.bias, channels),
        OUT_PROJ: (mixer.out_proj.weight, width * inner),
        OUT_BIAS: (mixer.out_proj.bias, width),
        CONV_STATE: (state.conv, batch * (mixer.d_conv - 1) * channels),
        SCAN_STATE: (state.ssm, batch * inner * n),
    }

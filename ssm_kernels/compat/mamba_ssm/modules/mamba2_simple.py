"""`mamba_ssm.modules.mamba2_simple`."""

from __future__ import annotations

import torch
from torch import Tensor

from .... import modules
from ....modules import MixerState
from .._shared import UNLIMITED, check_activation
from .mamba2 import Mamba2


class Mamba2Simple(Mamba2):
    """`mamba_ssm.modules.mamba2_simple.Mamba2Simple`.

    Args:
        learnable_init_states: the state before each row, `init_states` (H, P, N), is a parameter.
        activation: that of the convolution: `"silu"` or `"swish"`.
        use_mem_eff_path: the norm has G groups; without, it has one, as in the original's two paths.
        deterministic: ignored: results are always the same from run to run.

    The other arguments are as in `Mamba2`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 128,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = UNLIMITED,
        learnable_init_states: bool = False,
        activation: str = "swish",
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        deterministic: bool | None = None,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if check_activation(activation) is None:
            raise NotImplementedError("activation must be 'silu' or 'swish', got None")
        super().__init__(
            d_model, d_state, d_conv, conv_init, expand, headdim, None, ngroups, A_init_range, dt_min=dt_min,
            dt_max=dt_max, dt_init_floor=dt_init_floor, dt_limit=dt_limit, bias=bias, conv_bias=conv_bias,
            chunk_size=chunk_size, use_mem_eff_path=use_mem_eff_path, layer_idx=layer_idx, device=device, dtype=dtype,
        )  # fmt: skip
        self.learnable_init_states, self.activation = learnable_init_states, activation
        self.deterministic = deterministic
        if not use_mem_eff_path:
            self.norm.group_size = self.d_inner
        if learnable_init_states:
            shape = (self.nheads, self.headdim, d_state)  # (H, P, N)
            self.init_states = modules.without_weight_decay(torch.zeros(shape, device=device, dtype=dtype))

    def forward(self, u: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """Mix over time.

        Args:
            u: (B, L, D).
            seq_idx: (B, L) number of the sequence that a step belongs to, as in `Mamba2`.

        Returns:
            (B, L, D).
        """
        if not self.learnable_init_states:
            return super().forward(u, seq_idx=seq_idx)
        if seq_idx is not None:
            return self._packed(u, seq_idx, self.init_states).view(u.shape)
        state = self.new_state(u.shape[0])
        ssm = self.init_states.to(state.ssm).expand_as(state.ssm)  # (B, H, P, N)
        return modules.Mamba2.forward(self, u, MixerState(state.conv, ssm), return_state=True).y

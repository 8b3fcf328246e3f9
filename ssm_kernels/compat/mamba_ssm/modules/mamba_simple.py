"""`mamba_ssm.modules.mamba_simple`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .... import modules
from ....modules import conv_weight, decay_rate
from ..causal_conv1d import causal_conv1d_update
from ..state_update import selective_state_update
from .construction import cast_parameters, on_device
from .inference import CachedMixer, InferenceParams, check_one_token


class Mamba(CachedMixer, modules.Mamba):
    """`mamba_ssm.Mamba`.

    Args:
        d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init_floor, conv_bias, bias: as in
            `ssm_kernels.modules.Mamba`.
        dt_init, dt_scale: `dt_proj.weight` is `dt_scale * dt_rank**-0.5`, or uniform between minus that and that.
        use_fast_path: recompute the convolution and the step sizes in the backward rather than save them.
        layer_idx: key of this layer's caches.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if dt_init not in ("random", "constant"):
            raise ValueError(f"dt_init must be 'random' or 'constant', got {dt_init!r}")
        with on_device(device):
            super().__init__(
                d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init_floor, conv_bias, bias, use_fast_path
            )  # fmt: skip
            scale = self.dt_rank**-0.5 * dt_scale
            if dt_init == "constant":
                nn.init.constant_(self.dt_proj.weight, scale)
            else:
                nn.init.uniform_(self.dt_proj.weight, -scale, scale)
        self.layer_idx = layer_idx
        self.activation, self.act = "silu", nn.SiLU()
        cast_parameters(self, dtype)

    @property
    def use_fast_path(self) -> bool:
        return self.use_mem_eff_path

    @use_fast_path.setter
    def use_fast_path(self, value: bool) -> None:
        self.use_mem_eff_path = value

    def forward(self, hidden_states: Tensor, inference_params: InferenceParams | None = None) -> Tensor:
        """Mix over time.

        Args:
            hidden_states: (B, L, D).
            inference_params: run a prompt where its `seqlen_offset` is 0, else one step.

        Returns:
            (B, L, D).
        """
        if inference_params is None:
            return super().forward(hidden_states)
        caches = self._get_states_from_cache(inference_params, hidden_states.shape[0])
        if inference_params.seqlen_offset > 0:
            return self.step(hidden_states, *caches)[0]
        projected = self.in_proj(hidden_states)  # (B, L, 2 E)
        return self._prefill(projected, projected[..., : self.d_inner], caches)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Advance by one token, and update the caches in place. No gradients.

        Args:
            hidden_states: (B, 1, D).
            conv_state: (B, E, K) last inputs of the convolution.
            ssm_state: (B, E, N).

        Returns:
            (B, 1, D), and the two caches.

        Raises:
            ValueError: `hidden_states` holds more than one token.
        """
        check_one_token(hidden_states)
        x, z = self.in_proj(hidden_states.squeeze(1)).chunk(2, dim=-1)  # (B, E) each
        x = causal_conv1d_update(x, conv_state, *conv_weight("conv1d", self.conv1d), self.activation)
        low_rank_dt, B, C = self.ssm_inputs(x)  # (B, R), (B, N), (B, N)
        dt, dt_bias = self.expand_dt(low_rank_dt)  # (B, E), (E,)
        A = decay_rate(self.A_log)  # (E, N)
        y = selective_state_update(ssm_state, x, dt, A, B, C, self.D, z, dt_bias, dt_softplus=True)
        return self.out_proj(y).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return zeros: conv_state (B, E, K) and ssm_state (B, E, N).

        Args:
            batch_size: batch size B.
            max_seqlen: no effect: the size of a state does not depend on the length.
            dtype: of the caches; that of the convolution's weight by default.
            kwargs: ignored, as in the original.
        """
        zeros = self.conv1d.weight.new_zeros
        return (
            zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype),
            zeros(batch_size, self.d_inner, self.d_state, dtype=dtype),
        )

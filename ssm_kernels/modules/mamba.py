"""The Mamba-1 mixer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core.recompute import recompute_in_backward
from .._core.slots import StateSlots
from ..causal_conv1d import causal_conv1d_step
from ..selective_scan import selective_scan, selective_scan_step
from .conv import conv_weight, convolve, depthwise_conv
from .mixer import StatefulMixer
from .parameters import decay_rate, initial_dt_bias, is_plain, without_weight_decay
from .state import (
    AnyMixerState,
    MixerState,
    StateLayout,
    count_writes,
    finish,
    format_options,
    initial_states,
    is_decoding_step,
    n_sequences,
)


class Mamba(StatefulMixer):
    """The Mamba-1 mixer (arXiv 2312.00752, section 3.4).

    A layer that replaces a projection (an adapter, a quantized layer) is called once a forward, and hooks run once. A
    layer that replaces `dt_proj` adds the bias itself, in the dtype of the activations; `dt_proj` itself leaves that to
    the scan, which adds it in float32.

    Args:
        d_model: width D of the input and the output.
        d_state: state size N.
        d_conv: taps K of the convolution.
        expand: E / D; E is rounded down.
        dt_rank: R; `"auto"` is ceil(D / 16).
        dt_min, dt_max, dt_init_floor: range of the step sizes at initialization.
        conv_bias: the convolution has a bias.
        bias: the in and out projections have a bias.
        use_mem_eff_path: recompute the convolution and the step sizes in the backward rather than save them.
        dt_bc_norm_eps: divide dt (while of rank R), B and C by their root mean square, with this epsilon (Falcon-Mamba,
            arXiv 2410.05355); None does not.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_mem_eff_path: bool = True,
        dt_bc_norm_eps: float | None = None,
    ):
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.use_mem_eff_path, self.dt_bc_norm_eps = use_mem_eff_path, dt_bc_norm_eps
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias)
        self.conv1d = depthwise_conv(self.d_inner, d_conv, conv_bias)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt_bias = nn.Parameter(initial_dt_bias((self.d_inner,), dt_min, dt_max, dt_init_floor))
        dt_bias._no_reinit = True  # pyright: ignore[reportAttributeAccessIssue]
        self.dt_proj.bias = dt_bias
        steps = torch.arange(1, d_state + 1, dtype=torch.float32)
        self.A_log = without_weight_decay(steps.log().repeat(self.d_inner, 1))  # (E, N)
        self.D = without_weight_decay(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def _state_layout(self) -> StateLayout:
        return StateLayout.of(self.conv1d, (self.d_inner, self.d_state))

    def _run(
        self,
        projected: Tensor,
        state: AnyMixerState | None,
        cu_seqlens: Tensor | None,
        in_place: bool,
        slots: StateSlots | None = None,
    ) -> tuple[Tensor, MixerState | None]:
        """Mix (B, L, 2 E) to (B, L, D), and return the final state unless it is written into `state`."""
        layout = self._state_layout()
        if state is not None:
            layout.check(state, n_sequences(projected, cu_seqlens) if slots is None else len(state.conv), in_place)
        x, z = projected.chunk(2, dim=-1)  # (B, L, E) each
        if state is not None and slots is not None:
            return self.out_proj(self._step(x, z, state, slots)), None
        if state is not None and is_decoding_step(projected, cu_seqlens):
            final = None if in_place else MixerState(state.conv.clone(), state.ssm.clone())
            y = self._step(x[:, 0], z[:, 0], final or state).unsqueeze(1)  # (B, 1, E)
            return self.out_proj(y), final
        A = decay_rate(self.A_log)  # (E, N)
        start = initial_states(state, in_place)
        x, final_conv, recompute_x = convolve(self.conv1d, x, start.conv, cu_seqlens)  # (B, L, E)
        saves_memory = self.use_mem_eff_path
        with recompute_in_backward((x, recompute_x), enabled=saves_memory):
            low_rank_dt, B, C = self.ssm_inputs(x)  # (B, L, R), (B, L, N), (B, L, N)
        dt, dt_bias = self.expand_dt(low_rank_dt)  # (B, L, E), (E,)
        recomputed = [(x, recompute_x)]
        if dt_bias is not None:
            # A layer that replaces dt_proj may draw or count: it is not called again, and its output is saved.
            recomputed.append((dt, lambda: self.expand_dt(low_rank_dt)[0]))
        with recompute_in_backward(*recomputed, enabled=saves_memory):
            # The scan and its gate silu(z).
            y, final_ssm = selective_scan(
                x, dt, A, B, C, self.D, z, dt_bias, True, start.ssm, cu_seqlens=cu_seqlens
            )  # (B, L, E)
        final = finish(state, final_conv, final_ssm, layout, projected.shape[1], cu_seqlens, in_place)
        return self.out_proj(y), final  # (B, L, D)

    def _step(self, x: Tensor, z: Tensor, state: AnyMixerState, slots: StateSlots | None = None) -> Tensor:
        """Advance by one token: x and z (B, E) -> y (B, E); with slots by T tokens, (B, T, E)."""
        x = causal_conv1d_step(state.conv, x, *conv_weight("conv1d", self.conv1d), "silu", slots=slots)  # (B, E)
        low_rank_dt, B, C = self.ssm_inputs(x)  # (B, R), (B, N), (B, N)
        dt, dt_bias = self.expand_dt(low_rank_dt)  # (B, E), (E,)
        B, C = B.unsqueeze(-2), C.unsqueeze(-2)  # (B, 1, N): one group
        A = decay_rate(self.A_log)  # (E, N)
        y = selective_scan_step(
            state.ssm, x, dt, A, B, C, self.D, z, dt_bias, dt_softplus=True, slots=slots,
            **format_options(state, slots),
        )  # fmt: skip
        count_writes(state, slots, len(x), 1 if slots is None else x.shape[1])
        return y

    def ssm_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project the convolution's output to the input-dependent parameters (arXiv 2312.00752, algorithm 2).

        Args:
            x: (..., E) output of the convolution.

        Returns:
            dt of rank R (..., R), B (..., N) and C (..., N).
        """
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return self._normalized(dt), self._normalized(B), self._normalized(C)

    def _normalized(self, part: Tensor) -> Tensor:
        if self.dt_bc_norm_eps is None:
            return part
        compute = torch.promote_types(part.dtype, torch.float32)
        return F.rms_norm(part.to(compute), part.shape[-1:], eps=self.dt_bc_norm_eps).to(part.dtype)

    def expand_dt(self, low_rank_dt: Tensor) -> tuple[Tensor, Tensor | None]:
        """Project dt to the step sizes before softplus.

        Args:
            low_rank_dt: (..., R).

        Returns:
            dt (..., E), and the bias (E,) that the scan has to add; None where dt includes it.
        """
        if is_plain(self.dt_proj, nn.Linear):
            # The backward may run this outside the autocast of the forward.
            return F.linear(low_rank_dt, self.dt_proj.weight.to(low_rank_dt.dtype)), self.dt_proj.bias
        if low_rank_dt.dtype not in (torch.bfloat16, torch.float16):
            return self.dt_proj(low_rank_dt), None
        # nn.Linear takes half-precision weights with a float32 bias under autocast only.
        with torch.autocast(low_rank_dt.device.type, low_rank_dt.dtype):
            return self.dt_proj(low_rank_dt), None

"""The Mamba-2 mixer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .._core.dispatch import bind_backend
from .._core.recompute import recompute_in_backward
from .._core.slots import StateSlots
from .._core.transforms import is_transformed
from ..causal_conv1d import causal_conv1d_step
from ..ssd import ssd, ssd_step
from .conv import conv_weight, convolve, depthwise_conv
from .mixer import StatefulMixer
from .norm import RMSNorm
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


class Mamba2(StatefulMixer):
    """The Mamba-2 mixer (arXiv 2405.21060, section 7).

    A layer that replaces a projection or the norm (an adapter, a quantized layer) is called once a forward, and hooks
    run once.

    Args:
        d_model: width D of the input and the output.
        d_state: state size N.
        d_conv: taps K of the convolution.
        expand: E / D.
        headdim: channels P of a head.
        ngroups: groups G of B and C.
        A_init_range: range of -A at initialization.
        dt_min, dt_max, dt_init_floor: range of the step sizes at initialization.
        dt_limit: bounds of the step size.
        conv_bias: the convolution has a bias.
        bias: the in and out projections have a bias.
        norm_eps: epsilon of the gated norm.
        chunk_size: steps that the scan treats as one matrix product. Results do not depend on it.
        use_mem_eff_path: recompute the convolution and the norm in the backward rather than save them.
        d_ssm: channels that are scanned, H P; a gated MLP takes the rest of E. All of E by default.
        D_has_hdim: the skip connection D has a weight for each channel, (H P,), not for each head.
        rmsnorm: gate by a gated norm, rather than by `y * silu(z)` alone.
        norm_before_gate: the gate multiplies the norm's output rather than its input.

    Raises:
        ValueError: sizes do not fit; the message names the argument.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        conv_bias: bool = True,
        bias: bool = False,
        norm_eps: float = 1e-5,
        chunk_size: int = 64,
        use_mem_eff_path: bool = True,
        d_ssm: int | None = None,
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
    ):
        super().__init__()
        self.use_mem_eff_path = use_mem_eff_path
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner, self.headdim, self.ngroups = int(expand * d_model), headdim, ngroups
        if self.d_inner != expand * d_model:
            raise ValueError(f"expand * d_model must be an integer, got {expand} * {d_model}")
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        if not 0 < self.d_ssm <= self.d_inner:
            raise ValueError(f"d_ssm must be in [1, expand * d_model = {self.d_inner}], got {d_ssm}")
        if self.d_ssm % headdim:
            name = "expand * d_model" if d_ssm is None else "d_ssm"
            raise ValueError(f"headdim must divide {name} = {self.d_ssm}, got {headdim}")
        self.nheads, self.d_mlp = self.d_ssm // headdim, self.d_inner - self.d_ssm
        if self.nheads % ngroups:
            raise ValueError(f"ngroups must divide the {self.nheads} heads, got {ngroups}")
        self.dt_limit, self.chunk_size = dt_limit, chunk_size
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate = D_has_hdim, rmsnorm, norm_before_gate
        self.d_conv_channels = self.d_ssm + 2 * ngroups * d_state
        # MLP (gate, up), z, convolution (x, B, C), dt: see `split_projected`.
        self.in_proj = nn.Linear(d_model, 2 * self.d_mlp + self.d_ssm + self.d_conv_channels + self.nheads, bias=bias)
        self.conv1d = depthwise_conv(self.d_conv_channels, d_conv, conv_bias)
        self.dt_bias = without_weight_decay(initial_dt_bias((self.nheads,), dt_min, dt_max, dt_init_floor))
        self.A_log = without_weight_decay(torch.empty(self.nheads).uniform_(*A_init_range).log())
        self.D = without_weight_decay(torch.ones(self.d_ssm if D_has_hdim else self.nheads))
        if rmsnorm:
            self.norm = RMSNorm(self.d_ssm, norm_eps, self.d_ssm // ngroups, norm_before_gate)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def _state_layout(self) -> StateLayout:
        return StateLayout.of(self.conv1d, (self.nheads, self.headdim, self.d_state))

    def _run(
        self,
        projected: Tensor,
        state: AnyMixerState | None,
        cu_seqlens: Tensor | None,
        in_place: bool,
        slots: StateSlots | None = None,
    ) -> tuple[Tensor, MixerState | None]:
        """Mix (B, L, ...) to (B, L, D), and return the final state unless it is written into `state`."""
        layout = self._state_layout()
        if state is not None:
            layout.check(state, n_sequences(projected, cu_seqlens) if slots is None else len(state.conv), in_place)
        mlp, z, xBC, dt = self.split_projected(projected)  # (B, L, ...), (B, L, H P), (B, L, channels), (B, L, H)
        if state is not None and slots is not None:
            y = self._step(z, xBC, dt, state, slots)  # (B, T, H, P)
            return self.out_proj(self.gate(y, z, mlp)), None
        if state is not None and is_decoding_step(projected, cu_seqlens):
            final = None if in_place else MixerState(state.conv.clone(), state.ssm.clone())
            y = self._step(z[:, 0], xBC[:, 0], dt[:, 0], final or state).unsqueeze(1)  # (B, 1, H, P)
            return self.out_proj(self.gate(y, z, mlp)), final
        A = decay_rate(self.A_log)  # (H,)
        start = initial_states(state, in_place)
        xBC, final_conv, recompute_xBC = convolve(self.conv1d, xBC, start.conv, cu_seqlens)  # (B, L, channels)
        with recompute_in_backward((xBC, recompute_xBC), enabled=self.use_mem_eff_path):
            x, B, C = self.ssm_inputs(xBC)  # (B, L, H, P), (B, L, G, N), (B, L, G, N)
            y, final_ssm = ssd(
                x, dt, A, B, C, self.skip_weight, self.scan_gate(z), self.dt_bias, True, self.dt_limit,
                start.ssm, chunk_size=self.chunk_size, cu_seqlens=cu_seqlens,
            )  # fmt: skip  # (B, L, H, P)
        final = finish(state, final_conv, final_ssm, layout, projected.shape[1], cu_seqlens, in_place)
        return self._gate_and_project(y, z, mlp), final  # (B, L, D)

    def _step(
        self, z: Tensor, xBC: Tensor, dt: Tensor, state: AnyMixerState, slots: StateSlots | None = None
    ) -> Tensor:  # fmt: skip
        """Advance by one token: z (B, H P), xBC (B, channels), dt (B, H) -> y (B, H, P); with slots by T tokens."""
        weight, bias = conv_weight("conv1d", self.conv1d)
        xBC = causal_conv1d_step(state.conv, xBC, weight, bias, "silu", slots=slots)  # (B, channels)
        x, B, C = self.ssm_inputs(xBC)  # (B, H, P), (B, G, N), (B, G, N)
        A = decay_rate(self.A_log)  # (H,)
        gate = self.scan_gate(z)
        y = ssd_step(
            state.ssm, x, dt, A, B, C, self.skip_weight, gate, self.dt_bias, True, self.dt_limit, slots=slots,
            **format_options(state, slots),
        )  # fmt: skip
        count_writes(state, slots, len(x), 1 if slots is None else x.shape[1])
        return y

    @property
    def skip_weight(self) -> Tensor:
        """D: (H,), or (H, P) where each channel has its own."""
        return self.D.view(self.nheads, self.headdim) if self.D_has_hdim else self.D

    def split_projected(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Split the output of `in_proj`.

        Args:
            projected: (..., 2 E_mlp + H P + channels + H), where E_mlp = E - H P.

        Returns:
            the MLP's (gate, up) (..., 2 E_mlp), z (..., H P), (x, B, C) (..., channels) and dt (..., H).
        """
        mlp, z, xBC, dt = projected.split([2 * self.d_mlp, self.d_ssm, self.d_conv_channels, self.nheads], dim=-1)
        return mlp, z, xBC, dt

    def ssm_inputs(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split the convolution's output into the inputs of the scan.

        Args:
            xBC: (..., channels), where channels = H P + 2 G N.

        Returns:
            x (..., H, P), B (..., G, N) and C (..., G, N).
        """
        shared = self.ngroups * self.d_state
        x, B, C = xBC.split([self.d_ssm, shared, shared], dim=-1)
        groups = (self.ngroups, self.d_state)
        return x.unflatten(-1, (self.nheads, self.headdim)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def scan_gate(self, z: Tensor) -> Tensor | None:
        """Return the gate of the scan.

        Args:
            z: (..., H P).

        Returns:
            z (..., H, P), or None where the gated norm applies it.
        """
        return None if self.rmsnorm else z.unflatten(-1, (self.nheads, self.headdim))

    def gate(self, y: Tensor, z: Tensor, mlp: Tensor) -> Tensor:
        """Return the input of `out_proj`: the MLP's output and the scan's, normalized and gated.

        Args:
            y: (..., H, P) output of the scan.
            z: (..., H P) gate of the norm.
            mlp: (..., 2 E_mlp) the MLP's (gate, up).

        Returns:
            (..., E).
        """
        y = y.flatten(-2)  # (..., H P)
        if self.rmsnorm:
            y = self.norm(y, z)
        if self.d_mlp:
            gate, up = mlp.chunk(2, dim=-1)
            y = torch.cat([F.silu(gate) * up, y], dim=-1)  # (..., E)
        return y

    def _gate_and_project(self, y: Tensor, z: Tensor, mlp: Tensor) -> Tensor:
        """Gate, normalize and project y (B, L, H, P) to (B, L, D), without saving the gated activations."""
        # A norm with hooks is not called again; without norm and MLP there is nothing to discard.
        can_recompute = is_plain(self.norm, RMSNorm) if self.rmsnorm else self.d_mlp > 0
        is_tracing = torch.compiler.is_compiling() or is_transformed()  # transforms take no hooks
        if not (can_recompute and self.use_mem_eff_path and torch.is_grad_enabled()) or is_tracing:
            return self.out_proj(self.gate(y, z, mlp))
        gate = bind_backend(self.gate)
        gated = checkpoint(gate, y, z, mlp, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(gated, Tensor)
        # The projection is outside of the checkpoint: adapters there may draw, and hooks count.
        with recompute_in_backward((gated, lambda: gate(y, z, mlp))):
            return self.out_proj(gated)

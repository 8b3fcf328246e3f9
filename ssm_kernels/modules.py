"""The Mamba and Mamba-2 mixers on these ops, with the parameter names of the published checkpoints.

Letters: B batch, L length, D model width, E = expand * D inner width, N state, R rank of dt, H heads, P head
dimension, G groups, K convolution width, S sequences in a pack.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ._backend import as_now
from ._recompute import not_kept
from .causal_conv1d import CausalConv1dOutput, causal_conv1d, causal_conv1d_step
from .context_parallel import (
    SequenceSplit,
    after_the_whole,
    current_split,
    split_selective_scan,
    split_ssd,
    with_window_before,
)
from .norm import rms_norm
from .selective_scan import selective_scan_step
from .ssd import ssd_step


class MixerState(NamedTuple):
    """What a mixer remembers of a batch of sequences. Its size does not depend on their length."""

    conv: Tensor
    """The last K - 1 inputs of the convolution, (B, K - 1, channels)."""
    ssm: Tensor
    """The state of the scan: (B, E, N), or (B, H, P, N) in Mamba-2. At least float32."""


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last dimension; with a gate, of `x * silu(z)` (arXiv 2405.21060, section 7)."""

    def __init__(self, width: int, eps: float = 1e-5, group_size: int | None = None):
        super().__init__()
        self.eps, self.group_size = eps, group_size
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return rms_norm(x, self.weight, z=z, eps=self.eps, group_size=self.group_size)


class Mamba(nn.Module):
    """The Mamba-1 mixer (arXiv 2312.00752, section 3.4).

    Args:
        d_model: width D of the input and the output.
        d_state, d_conv, expand: N, K and E / D.
        dt_rank: R; `"auto"` is ceil(D / 16).
        dt_min, dt_max, dt_init_floor: range of the step sizes at initialisation.
        conv_bias, bias: whether the convolution, and the in and out projections, have a bias.
        use_mem_eff_path: compute the convolution and the step sizes again in the backward rather than keep them.
        dt_bc_norm_eps: divide dt (while of rank R), B and C by their root mean square, with this epsilon (Falcon-Mamba,
            arXiv 2410.05355); None does not.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
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
        self.d_inner, self.d_state = expand * d_model, d_state
        self.use_mem_eff_path, self.dt_bc_norm_eps = use_mem_eff_path, dt_bc_norm_eps
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias)
        self.conv1d = depthwise_conv(self.d_inner, d_conv, conv_bias)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        self.dt_proj.bias = nn.Parameter(initial_dt_bias((self.d_inner,), dt_min, dt_max, dt_init_floor))
        steps = torch.arange(1, d_state + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(steps.log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def new_state(self, batch: int) -> MixerState:
        """An empty state on the mixer's device."""
        weight = self.conv1d.weight
        conv = weight.new_zeros(batch, weight.shape[2] - 1, self.d_inner)
        return MixerState(conv, _state_zeros(weight, batch, self.d_inner, self.d_state))

    def forward(self, hidden: Tensor, state: MixerState | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D). A `state` is where the sequences stand before, and is updated in place.

        With `cu_seqlens` the batch is one row of packed sequences, and `state` holds one entry for each.
        """
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        A = -torch.exp(self.A_log.float())
        weight = self.conv1d.weight.squeeze(1)
        if _is_one_step(hidden, state, cu_seqlens):
            x = causal_conv1d_step(state.conv, x[:, 0], weight, self.conv1d.bias, "silu")
            low_rank, B, C = self._project(x)
            dt = self._steps(low_rank)
            y = selective_scan_step(state.ssm, x, dt, A, B, C, self.D, z[:, 0], self.dt_proj.bias, dt_softplus=True)
            return self.out_proj(y.unsqueeze(1))
        conv, ssm = _before(state)
        split = current_split()
        before, conv, bounds = with_window_before(split, x, weight.shape[1], conv, cu_seqlens)

        def convolve() -> CausalConv1dOutput:
            return causal_conv1d(before, weight, self.conv1d.bias, "silu", conv, cu_seqlens=bounds)

        x, conv_end = convolve()
        convolved = (x, as_now(lambda: convolve().y))
        with self._maybe_not_kept(convolved):
            low_rank, B, C = self._project(x)
        dt = self._steps(low_rank)
        with self._maybe_not_kept(convolved, (dt, lambda: self._steps(low_rank))):
            y, ssm_end = split_selective_scan(
                split, x, dt, A, B, C, self.D, z, self.dt_proj.bias, True, ssm, cu_seqlens=cu_seqlens
            )
        _update(state, conv_end, ssm_end, split, hidden.shape[1], cu_seqlens)
        return self.out_proj(y)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt (of rank R), B and C of each step."""
        parts = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if self.dt_bc_norm_eps is None:
            return parts
        compute = torch.promote_types(x.dtype, torch.float32)
        return tuple(F.rms_norm(p.to(compute), p.shape[-1:], eps=self.dt_bc_norm_eps).to(p.dtype) for p in parts)

    def _steps(self, low_rank: Tensor) -> Tensor:
        # The backward may run this outside of the autocast that the forward is in.
        return F.linear(low_rank, self.dt_proj.weight.to(low_rank.dtype))

    def _maybe_not_kept(self, *activations) -> contextlib.AbstractContextManager:
        return not_kept(*activations) if self.use_mem_eff_path else contextlib.nullcontext()


class Mamba2(nn.Module):
    """The Mamba-2 mixer (arXiv 2405.21060, section 7).

    Args:
        d_model: width D of the input and the output.
        d_state, d_conv, expand, headdim, ngroups: N, K, E / D, P and G.
        A_init_range, dt_min, dt_max, dt_init_floor: ranges of -A and of the step sizes at initialisation.
        dt_limit: bounds of the step size.
        conv_bias, bias: whether the convolution, and the in and out projections, have a bias.
        norm_eps: epsilon of the gated norm.
        chunk_size: steps that the scan treats as one matrix product; the result does not depend on it.
        use_mem_eff_path: compute the convolution and the norm again in the backward rather than keep them.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
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
    ):
        super().__init__()
        self.use_mem_eff_path = use_mem_eff_path
        self.d_inner, self.d_state, self.headdim, self.ngroups = expand * d_model, d_state, headdim, ngroups
        if self.d_inner % headdim:
            raise ValueError(f"headdim must divide expand * d_model = {self.d_inner}, got {headdim}")
        self.nheads = self.d_inner // headdim
        if self.nheads % ngroups:
            raise ValueError(f"ngroups must divide the {self.nheads} heads, got {ngroups}")
        self.dt_limit, self.chunk_size = dt_limit, chunk_size
        self.d_conv_channels = self.d_inner + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + self.d_conv_channels + self.nheads, bias=bias)
        self.conv1d = depthwise_conv(self.d_conv_channels, d_conv, conv_bias)
        self.dt_bias = nn.Parameter(initial_dt_bias((self.nheads,), dt_min, dt_max, dt_init_floor))
        self.A_log = nn.Parameter(torch.empty(self.nheads).uniform_(*A_init_range).log())
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = RMSNorm(self.d_inner, norm_eps, self.d_inner // ngroups)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def new_state(self, batch: int) -> MixerState:
        """An empty state on the mixer's device."""
        weight = self.conv1d.weight
        conv = weight.new_zeros(batch, weight.shape[2] - 1, self.d_conv_channels)
        return MixerState(conv, _state_zeros(weight, batch, self.nheads, self.headdim, self.d_state))

    def forward(self, hidden: Tensor, state: MixerState | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D). A `state` is where the sequences stand before, and is updated in place.

        With `cu_seqlens` the batch is one row of packed sequences, and `state` holds one entry for each.
        """
        z, xBC, dt = self.in_proj(hidden).split([self.d_inner, self.d_conv_channels, self.nheads], dim=-1)
        A = -torch.exp(self.A_log.float())
        weight = self.conv1d.weight.squeeze(1)
        if _is_one_step(hidden, state, cu_seqlens):
            xBC = causal_conv1d_step(state.conv, xBC[:, 0], weight, self.conv1d.bias, "silu")
            x, B, C = self._scan_inputs(xBC)
            y = ssd_step(state.ssm, x, dt[:, 0], A, B, C, self.D, None, self.dt_bias, True, self.dt_limit).unsqueeze(1)
            return self.out_proj(self.norm(y.flatten(-2), z))
        conv, ssm = _before(state)
        split = current_split()
        before, conv, bounds = with_window_before(split, xBC, weight.shape[1], conv, cu_seqlens)

        def convolve() -> CausalConv1dOutput:
            return causal_conv1d(before, weight, self.conv1d.bias, "silu", conv, cu_seqlens=bounds)

        xBC, conv_end = convolve()
        with not_kept((xBC, as_now(lambda: convolve().y))) if self.use_mem_eff_path else contextlib.nullcontext():
            x, B, C = self._scan_inputs(xBC)
            y, ssm_end = split_ssd(
                split, x, dt, A, B, C, self.D, None, self.dt_bias, True, self.dt_limit, ssm,
                chunk_size=self.chunk_size, cu_seqlens=cu_seqlens,
            )  # fmt: skip
        _update(state, conv_end, ssm_end, split, hidden.shape[1], cu_seqlens)
        if self.use_mem_eff_path and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return checkpoint(as_now(self._gated_projection), y, z, use_reentrant=False, preserve_rng_state=False)
        return self._gated_projection(y, z)

    def _gated_projection(self, y: Tensor, z: Tensor) -> Tensor:
        return self.out_proj(self.norm(y.flatten(-2), z))

    def _scan_inputs(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shared = self.ngroups * self.d_state
        x, B, C = xBC.split([self.d_inner, shared, shared], dim=-1)
        groups = (self.ngroups, self.d_state)
        return x.unflatten(-1, (self.nheads, self.headdim)), B.unflatten(-1, groups), C.unflatten(-1, groups)


def depthwise_conv(channels: int, width: int, bias: bool) -> nn.Conv1d:
    """Holds weight (channels, 1, width) and bias under the names of the checkpoints; the op reads them."""
    return nn.Conv1d(channels, channels, width, groups=channels, bias=bias)


def initial_dt_bias(shape: tuple[int, ...], dt_min: float, dt_max: float, floor: float) -> Tensor:
    """The inverse softplus of step sizes drawn log-uniformly from [dt_min, dt_max]."""
    dt = torch.exp(torch.rand(shape) * math.log(dt_max / dt_min) + math.log(dt_min)).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


def _is_one_step(hidden: Tensor, state: MixerState | None, cu_seqlens: Tensor | None) -> bool:
    # The step ops have no gradients, and see no other rank.
    can_step = current_split() is None and not torch.is_grad_enabled()
    return can_step and state is not None and cu_seqlens is None and hidden.shape[1] == 1


def _state_zeros(weight: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))


def _before(state: MixerState | None) -> tuple[Tensor | None, Tensor | None]:
    """Where the sequences stand before; copies where a backward may need them, since the state is updated in place."""
    if state is None:
        return None, None
    return (state.conv.clone(), state.ssm.clone()) if torch.is_grad_enabled() else state


def _update(
    state: MixerState | None,
    conv_end: Tensor,
    ssm_end: Tensor,
    split: SequenceSplit | None,
    length: int,
    cu_seqlens: Tensor | None,
) -> None:
    if state is not None:
        for part, end in zip(state, (conv_end, ssm_end), strict=True):
            part.copy_(after_the_whole(split, end.detach(), length, cu_seqlens))

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
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

from ._core.dispatch import bind_backend
from ._core.recompute import recompute_in_backward
from .causal_conv1d import CausalConv1dOutput, causal_conv1d, causal_conv1d_step
from .context_parallel import (
    SequenceSplit,
    conv_halo,
    current_split,
    gather_final_states,
    split_selective_scan,
    split_ssd,
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
    """`x / rms(x) * weight` over the last dimension; with a gate, of `x * silu(z)` (arXiv 2405.21060, section 7).

    With `norm_before_gate` the gate multiplies the result instead.
    """

    def __init__(self, width: int, eps: float = 1e-5, group_size: int | None = None, norm_before_gate: bool = False):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return rms_norm(
            x, self.weight, z=z, eps=self.eps, group_size=self.group_size, norm_before_gate=self.norm_before_gate
        )


class Mamba(nn.Module):
    """The Mamba-1 mixer (arXiv 2312.00752, section 3.4).

    Args:
        d_model: width D of the input and the output.
        d_state, d_conv, expand: N, K and E / D; E is rounded down.
        dt_rank: R; `"auto"` is ceil(D / 16).
        dt_min, dt_max, dt_init_floor: range of the step sizes at initialisation.
        conv_bias, bias: whether the convolution, and the in and out projections, have a bias.
        use_mem_eff_path: compute the convolution and the step sizes again in the backward rather than keep them.
        dt_bc_norm_eps: divide dt (while of rank R), B and C by their root mean square, with this epsilon (Falcon-Mamba,
            arXiv 2410.05355); None does not.

    Adapters, hooks and quantised layers in the place of a projection are called, once a forward. One in the place of
    `dt_proj` adds the bias itself, in the dtype of the activations; else the scan adds it in float32.
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
        self.dt_proj.bias = nn.Parameter(initial_dt_bias((self.d_inner,), dt_min, dt_max, dt_init_floor))
        self.dt_proj.bias._no_reinit = True
        steps = torch.arange(1, d_state + 1, dtype=torch.float32)
        self.A_log = without_weight_decay(steps.log().repeat(self.d_inner, 1))
        self.D = without_weight_decay(torch.ones(self.d_inner))
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
        return self.mix(self.in_proj(hidden), state, cu_seqlens)

    def mix(self, projected: Tensor, state: MixerState | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """What follows `in_proj`: (B, L, 2 E) -> (B, L, D), as `forward`."""
        x, z = projected.chunk(2, dim=-1)  # (B, L, E) each
        A = -torch.exp(self.A_log.float())
        weight, conv_bias = conv_weight("conv1d", self.conv1d)
        if _is_one_step(projected, state, cu_seqlens):
            x = causal_conv1d_step(state.conv, x[:, 0], weight, conv_bias, "silu")  # (B, E)
            low_rank, B, C = self._project(x)
            dt, dt_bias = self._steps(low_rank)
            B, C = B.unsqueeze(1), C.unsqueeze(1)  # (B, 1, N)
            y = selective_scan_step(state.ssm, x, dt, A, B, C, self.D, z[:, 0], dt_bias, dt_softplus=True)
            return self.out_proj(y.unsqueeze(1))
        conv, ssm = _before(state)
        split = current_split()
        before, conv, bounds = conv_halo(split, x, weight.shape[1], conv, cu_seqlens)

        def convolve() -> CausalConv1dOutput:
            return causal_conv1d(before, weight, conv_bias, "silu", conv, cu_seqlens=bounds)

        x, conv_end = convolve()
        convolved = (x, bind_backend(lambda: convolve().y))
        with self._maybe_not_kept(convolved):
            low_rank, B, C = self._project(x)
        dt, dt_bias = self._steps(low_rank)
        # A layer that was called may draw or count: it is not called again, and what it gave is kept.
        again = [] if dt_bias is None else [(dt, lambda: self._steps(low_rank)[0])]
        with self._maybe_not_kept(convolved, *again):
            y, ssm_end = split_selective_scan(
                split, x, dt, A, B, C, self.D, z, dt_bias, True, ssm, cu_seqlens=cu_seqlens
            )
        _update(state, conv_end, ssm_end, split, projected.shape[1], cu_seqlens)
        return self.out_proj(y)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt (of rank R), B and C of each step."""
        parts = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if self.dt_bc_norm_eps is None:
            return parts
        compute = torch.promote_types(x.dtype, torch.float32)
        return tuple(F.rms_norm(p.to(compute), p.shape[-1:], eps=self.dt_bc_norm_eps).to(p.dtype) for p in parts)

    def _steps(self, low_rank: Tensor) -> tuple[Tensor, Tensor | None]:
        """(..., R) -> step sizes before softplus (..., E), and the bias that the scan is still to add."""
        if is_plain(self.dt_proj, nn.Linear):
            # The backward may run this outside of the autocast that the forward is in.
            return F.linear(low_rank, self.dt_proj.weight.to(low_rank.dtype)), self.dt_proj.bias
        if low_rank.dtype not in (torch.bfloat16, torch.float16):
            return self.dt_proj(low_rank), None
        # Weights in half precision go with a bias in float32, which nn.Linear takes under autocast alone.
        with torch.autocast(low_rank.device.type, low_rank.dtype):
            return self.dt_proj(low_rank), None

    def _maybe_not_kept(self, *activations) -> contextlib.AbstractContextManager:
        return recompute_in_backward(*activations) if self.use_mem_eff_path else contextlib.nullcontext()


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
        d_ssm: channels that are scanned, H P; a gated MLP takes the rest of E. All of E by default.
        D_has_hdim: the skip connection D has a weight for each channel, (H P,), not for each head.
        rmsnorm: gate by a gated norm; else by `y * silu(z)` alone.
        norm_before_gate: the gate multiplies the norm's result rather than its input.

    Adapters, hooks and quantised layers in the place of a projection or of the norm are called, once a forward.
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
            raise ValueError(f"expand * d_model must be a whole number, got {expand} * {d_model}")
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        if not 0 < self.d_ssm <= self.d_inner:
            raise ValueError(f"d_ssm must lie in [1, expand * d_model = {self.d_inner}], got {d_ssm}")
        if self.d_ssm % headdim:
            name = "expand * d_model" if d_ssm is None else "d_ssm"
            raise ValueError(f"headdim must divide {name} = {self.d_ssm}, got {headdim}")
        self.nheads, self.d_mlp = self.d_ssm // headdim, self.d_inner - self.d_ssm
        if self.nheads % ngroups:
            raise ValueError(f"ngroups must divide the {self.nheads} heads, got {ngroups}")
        self.dt_limit, self.chunk_size = dt_limit, chunk_size
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate = D_has_hdim, rmsnorm, norm_before_gate
        self.d_conv_channels = self.d_ssm + 2 * ngroups * d_state
        # Of the MLP two times d_mlp; z; x, B and C; dt.
        self.in_proj = nn.Linear(d_model, 2 * self.d_mlp + self.d_ssm + self.d_conv_channels + self.nheads, bias=bias)
        self.conv1d = depthwise_conv(self.d_conv_channels, d_conv, conv_bias)
        self.dt_bias = without_weight_decay(initial_dt_bias((self.nheads,), dt_min, dt_max, dt_init_floor))
        self.A_log = without_weight_decay(torch.empty(self.nheads).uniform_(*A_init_range).log())
        self.D = without_weight_decay(torch.ones(self.d_ssm if D_has_hdim else self.nheads))
        if rmsnorm:
            self.norm = RMSNorm(self.d_ssm, norm_eps, self.d_ssm // ngroups, norm_before_gate)
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
        return self.mix(self.in_proj(hidden), state, cu_seqlens)

    def mix(self, projected: Tensor, state: MixerState | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """What follows `in_proj`, whose result is (B, L, ...), as `forward`."""
        mlp, z, xBC, dt = self.split_projected(projected)
        A = -torch.exp(self.A_log.float())
        weight, conv_bias = conv_weight("conv1d", self.conv1d)
        z_of_scan = None if self.rmsnorm else z.unflatten(-1, (self.nheads, self.headdim))
        if _is_one_step(projected, state, cu_seqlens):
            xBC = causal_conv1d_step(state.conv, xBC[:, 0], weight, conv_bias, "silu")
            x, B, C = self.scan_inputs(xBC)
            z_of_scan = None if z_of_scan is None else z_of_scan[:, 0]
            y = ssd_step(
                state.ssm, x, dt[:, 0], A, B, C, self.skip_weight, z_of_scan, self.dt_bias, True, self.dt_limit
            ).unsqueeze(1)
            return self.out_proj(self.gated(y, z, mlp))
        conv, ssm = _before(state)
        split = current_split()
        before, conv, bounds = conv_halo(split, xBC, weight.shape[1], conv, cu_seqlens)

        def convolve() -> CausalConv1dOutput:
            return causal_conv1d(before, weight, conv_bias, "silu", conv, cu_seqlens=bounds)

        xBC, conv_end = convolve()
        with (
            recompute_in_backward((xBC, bind_backend(lambda: convolve().y)))
            if self.use_mem_eff_path
            else contextlib.nullcontext()
        ):
            x, B, C = self.scan_inputs(xBC)
            y, ssm_end = split_ssd(
                split, x, dt, A, B, C, self.skip_weight, z_of_scan, self.dt_bias, True, self.dt_limit, ssm,
                chunk_size=self.chunk_size, cu_seqlens=cu_seqlens,
            )  # fmt: skip
        _update(state, conv_end, ssm_end, split, projected.shape[1], cu_seqlens)
        # A norm with hooks is not called again; without norm and MLP there is nothing that could be let go.
        can_repeat = is_plain(self.norm, RMSNorm) if self.rmsnorm else self.d_mlp > 0
        if not (can_repeat and self.use_mem_eff_path and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return self.out_proj(self.gated(y, z, mlp))
        gate = bind_backend(lambda *inputs: self.gated(*inputs))
        gated = checkpoint(gate, y, z, mlp, use_reentrant=False, preserve_rng_state=False)
        # The projection is outside of the checkpoint: adapters there may draw, and hooks count.
        with recompute_in_backward((gated, lambda: gate(y, z, mlp))):
            return self.out_proj(gated)

    def split_projected(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `in_proj` gives: the MLP's (gate, up), z, (x, B, C), dt."""
        return projected.split([2 * self.d_mlp, self.d_ssm, self.d_conv_channels, self.nheads], dim=-1)

    def scan_inputs(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is convolved: x (..., H, P), B and C (..., G, N)."""
        shared = self.ngroups * self.d_state
        x, B, C = xBC.split([self.d_ssm, shared, shared], dim=-1)
        groups = (self.ngroups, self.d_state)
        return x.unflatten(-1, (self.nheads, self.headdim)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    @property
    def skip_weight(self) -> Tensor:
        """D: (H,), or (H, P) where each channel has its own."""
        return self.D.view(self.nheads, self.headdim) if self.D_has_hdim else self.D

    def gated(self, y: Tensor, z: Tensor, mlp: Tensor) -> Tensor:
        """The input of `out_proj`, (..., E): the MLP's part, and what the scan gave, (..., H, P), gated."""
        y = y.flatten(-2)
        if self.rmsnorm:
            y = self.norm(y, z)
        if self.d_mlp:
            gate, up = mlp.chunk(2, dim=-1)
            y = torch.cat([F.silu(gate) * up, y], dim=-1)
        return y


def depthwise_conv(channels: int, width: int, bias: bool) -> nn.Conv1d:
    """Holds weight (channels, 1, width) and bias under the names of the checkpoints; see `conv_weight`.

    Called with (B, channels, L), its first L results are those of the causal convolution.
    """
    return nn.Conv1d(channels, channels, width, groups=channels, padding=width - 1, bias=bias)


def conv_weight(name: str, conv: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (channels, K) and bias of a `depthwise_conv`, for the op that convolves in its place.

    Hooks that are registered for all modules at once (flop counters, profilers) see the mixer, and not this layer.

    Raises:
        TypeError: the layer has been replaced, or has hooks of its own, which the op would pass by.
    """
    kind, extras = type(conv), _extras(conv)
    if kind.forward is not nn.Conv1d.forward or extras:
        got = f"one with {extras}" if kind.forward is nn.Conv1d.forward else f"{kind.__module__}.{kind.__name__}"
        raise TypeError(
            f"{name} must be a plain torch.nn.Conv1d, since a fused op reads its weight and never calls it; got {got}. "
            "Leave it out of what is adapted, quantised or hooked, or merge it back"
        )
    return conv.weight.squeeze(1), conv.bias


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether to call the module is to run `kind.forward` and no more, so that an op may read its weights instead.

    It is not for an adapter or a quantised layer in its place, and with hooks. A parametrisation is computed whenever
    its weight is read, and does no harm.
    """
    return type(module).forward is kind.forward and not _extras(module) and not torch_module._has_any_global_hook()


def _extras(module: nn.Module) -> str | None:
    """What a call of the module would run besides the `forward` of its class."""
    if "forward" in module.__dict__:
        return "a forward of its own"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "hooks"
    return None


def without_weight_decay(value: Tensor) -> nn.Parameter:
    """A parameter with the mark that training code written for `mamba_ssm` looks for."""
    parameter = nn.Parameter(value)
    parameter._no_weight_decay = True
    return parameter


def initial_dt_bias(shape: tuple[int, ...], dt_min: float, dt_max: float, floor: float) -> Tensor:
    """The inverse softplus of step sizes drawn log-uniformly from [dt_min, dt_max]."""
    dt = torch.exp(torch.rand(shape) * math.log(dt_max / dt_min) + math.log(dt_min)).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


def _is_one_step(projected: Tensor, state: MixerState | None, cu_seqlens: Tensor | None) -> bool:
    # The step ops have no gradients, and see no other rank.
    can_step = current_split() is None and not torch.is_grad_enabled()
    return can_step and state is not None and cu_seqlens is None and projected.shape[1] == 1


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
            part.copy_(gather_final_states(split, end.detach(), length, cu_seqlens))

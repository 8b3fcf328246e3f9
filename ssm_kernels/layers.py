"""Stateless modules for the functions that `transformers` lists in `use_kernels`, on the ops of this package.

The kernel repository of the Hub (`integrations.hub_kernel`) has this file as its `layers`; a `LayerRepository` or a
`KernelConfig` looks a class up by the function's name. Each takes the arguments of the library's function, in its
order: `kernels` compares the two signatures, and allows a class no member besides those it knows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .compat import mamba_ssm as ops
from .compat.mamba_ssm._shared import pair, single

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "selective_scan_fn",
    "selective_state_update",
]


class causal_conv1d_fn(nn.Module):
    """Causal convolution over complete sequences, (B, D, L)."""

    can_torch_compile = True

    # The library passes `seq_idx` among **kwargs.
    def forward(
        self,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **kwargs,
    ) -> Tensor:
        seq_idx = kwargs.pop("seq_idx", None)
        refuse_cu_seqlens(kwargs)
        return single(ops.causal_conv1d_fn(hidden_states, weight, bias, seq_idx, activation=activation))  # (B, D, L)


class causal_conv1d_update(nn.Module):
    """Causal convolution of new steps (B, D, L) after `conv_state` (B, D, W), which is updated in place."""

    can_torch_compile = True
    has_backward = False

    def forward(
        self,
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        # `kernels` heeds `has_backward` in its training mode alone.
        _check_no_gradients(hidden_states, conv_state, weight, bias)
        return ops.causal_conv1d_update(hidden_states, conv_state, weight, bias, activation)  # (B, D, L)


class selective_scan_fn(nn.Module):
    """Selective scan, (B, D, L)."""

    can_torch_compile = True

    def forward(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        use_mambapy: bool = False,
        use_associative_scan: bool = False,
        **kwargs,
    ) -> Tensor | tuple[Tensor, Tensor]:
        # use_mambapy and use_associative_scan choose between the library's own implementations.
        if kwargs.get("seq_idx") is not None:
            raise ValueError("seq_idx must be None: the convolution before this scan does not take it")
        refuse_cu_seqlens(kwargs)
        # (B, D, L), and the last state (B, D, N) where asked for
        return ops.selective_scan_fn(hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


class selective_state_update(nn.Module):
    """One step of either scan; `state` is updated in place."""

    can_torch_compile = True
    has_backward = False

    def forward(
        self,
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        _check_no_gradients(state, hidden_states, dt, A, B, C, D, dt_bias, z)
        # `mamba_ssm` has z before dt_bias, the library after dt_softplus.
        return ops.selective_state_update(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus)


class mamba_chunk_scan_combined(nn.Module):
    """SSD, (B, L, H, P)."""

    can_torch_compile = True

    def forward(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **kwargs,
    ) -> Tensor | tuple[Tensor, Tensor]:
        refuse_cu_seqlens(kwargs)
        # The library passes z and seq_idx by name, or not at all. (B, L, H, P), and final states (B, H, P, N)
        out = ops.mamba_chunk_scan_combined(
            hidden_states, dt, A, B, C, chunk_size, D=D, z=kwargs.get("z"), dt_bias=dt_bias,
            initial_states=initial_states, dt_softplus=dt_softplus, dt_limit=dt_limit,
            return_final_states=return_final_states, seq_idx=kwargs.get("seq_idx"),
        )  # fmt: skip
        return pair(out) if return_final_states else single(out)


class mamba_inner_fn(nn.Module):
    """Returns None, so that a mixer calls its separate functions: a fused one would skip its padding mask."""

    can_torch_compile = True

    def forward(
        self,
        xz: Tensor,
        conv1d_weight: Tensor,
        conv1d_bias: Tensor | None,
        x_proj_weight: Tensor,
        delta_proj_weight: Tensor,
        out_proj_weight: Tensor,
        out_proj_bias: Tensor | None,
        A: Tensor,
        B: Tensor | None = None,
        C: Tensor | None = None,
        D: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = True,
        b_rms_weight: Tensor | None = None,
        c_rms_weight: Tensor | None = None,
        dt_rms_weight: Tensor | None = None,
        b_c_dt_rms_eps: float = 1e-6,
        **kwargs,
    ) -> None:
        return None


class mamba_split_conv1d_scan_combined(nn.Module):
    """Returns None, as `mamba_inner_fn` does."""

    can_torch_compile = True

    # None is used, but `kernels` compares the number and kinds of parameters.
    def forward(
        self,
        zxbcdt: Tensor,
        conv1d_weight: Tensor,
        conv1d_bias: Tensor | None,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        chunk_size: int,
        initial_states: Tensor | None = None,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        activation: str = "silu",
        rmsnorm_weight: Tensor | None = None,
        rmsnorm_eps: float = 1e-6,
        outproj_weight: Tensor | None = None,
        outproj_bias: Tensor | None = None,
        headdim: int | None = None,
        ngroups: int = 1,
        norm_before_gate: bool = True,
        **kwargs,
    ) -> None:
        return None


def _check_no_gradients(*tensors: Tensor | None) -> None:
    # The op updates its state in place, which a backward of the step before would need as it was.
    if needs_gradients(*tensors):
        raise RuntimeError("a decoding step has no gradients: run it under torch.no_grad()")


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd records a function of these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def refuse_cu_seqlens(kwargs: dict[str, Any]) -> None:
    """Raise a ValueError for a `cu_seqlens` that the library passes, which these functions do not take."""
    if kwargs.get("cu_seqlens") is not None:
        raise ValueError("cu_seqlens must be None here: pass seq_idx to the model instead")

"""Entry points of the originals' compiled extensions, for code that calls these past the Python functions.

They are `selective_scan_cuda`, VMamba's `selective_scan_cuda_oflex` and `selective_scan_cuda_core`, and
`causal_conv1d_cuda` with `causal_conv1d.cpp_functions`. Each has a forward that autograd does not see, and a backward
that is given what the forward was. Nothing is kept between the two: the backward computes the forward again. Device and
dtype are free, as everywhere in this package.

Letters: B batch, L length, D channels, N state, G groups, K convolution width, W inputs that a state holds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .mamba_ssm import causal_conv1d_fn, causal_conv1d_update, selective_scan_fn


@torch.no_grad()
def selective_scan_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """`selective_scan_cuda.fwd`. Arguments as in `selective_scan_fn`.

    Gives y without the gate (B, D, L), and x (B, D, 1, 2 N), where `x[:, :, -1, 1::2]` is the last state as in the
    original; with z, the gated y too.
    """
    y, last = selective_scan_fn(u, delta, A, B, C, D, None, delta_bias, delta_softplus, True)
    x = torch.stack([torch.zeros_like(last), last], -1).flatten(-2).unsqueeze(2)  # (B, D, 1, 2 N)
    if z is None:
        return [y, x]
    return [y, x, selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)]


def selective_scan_bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    dz: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
) -> list[Tensor | None]:
    """`selective_scan_cuda.bwd`: gradients for `dout` (B, D, L), that of y, or of the gated y with z.

    Args:
        x, out: what the forward gave; not needed here.
        dz: (B, D, L), written to where given.
        recompute_out_z: give the gated y too.

    Gives those of u, delta, A, B, C, D and delta_bias (None where the input is); with z, that of z; and the gated y.
    """

    def forward(*inputs: Tensor | None) -> Tensor:
        return selective_scan_fn(*inputs, delta_softplus)

    y, grads = _vjp(forward, (u, delta, A, B, C, D, z, delta_bias), dout)
    *grads, z_grad, bias_grad = grads
    grads.append(bias_grad)
    if z is not None:
        grads.append(z_grad if dz is None else dz.copy_(z_grad))
    if recompute_out_z:
        grads.append(y)
    return grads


def selective_scan_core_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int,
) -> list[Tensor]:
    """`selective_scan_cuda_core.fwd`, of VMamba: `selective_scan_fwd` without a gate. `nrows` has no effect."""
    return selective_scan_fwd(u, delta, A, B, C, D, None, delta_bias, delta_softplus)


def selective_scan_core_bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    delta_softplus: bool,
    nrows: int,
) -> list[Tensor | None]:
    """`selective_scan_cuda_core.bwd`, and that of `selective_scan_cuda_oflex`. `nrows` has no effect."""

    def forward(u: Tensor, *inputs: Tensor | None) -> Tensor:
        u = u.to(torch.promote_types(u.dtype, dout.dtype))  # as in the forward with `out_float`
        return selective_scan_fn(u, *inputs[:5], None, inputs[5], delta_softplus)

    return _vjp(forward, (u, delta, A, B, C, D, delta_bias), dout)[1]


def selective_scan_oflex_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int,
    out_float: bool,
) -> list[Tensor]:
    """`selective_scan_cuda_oflex.fwd`, of VMamba: with `out_float`, y is not rounded to the dtype of u."""
    u = u.to(torch.promote_types(u.dtype, torch.float32)) if out_float else u
    return selective_scan_core_fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows)


@torch.no_grad()
def causal_conv1d_fwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    final_states_out: Tensor | None,
    silu_activation: bool,
) -> Tensor:
    """Convolve x (B, D, L), and write the last inputs to `final_states_out` (B, D, K - 1). Gives (B, D, L)."""
    keep, activation = final_states_out is not None, "silu" if silu_activation else None
    y = causal_conv1d_fn(x, weight, bias, seq_idx, initial_states, keep, final_states_out, activation)
    return y[0] if isinstance(y, tuple) else y


def causal_conv1d_bwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor | None,
    return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and initial states for `dout` (B, D, L) and `dfinal_states` (B, D, K - 1).

    Args:
        dx: (B, D, L), written to where given.
        return_dinitial_states: give that of the initial states, rather than None.
    """

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, states: Tensor | None) -> Tensor | tuple[Tensor, ...]:
        activation = "silu" if silu_activation else None
        return causal_conv1d_fn(x, weight, bias, seq_idx, states, dfinal_states is not None, None, activation)

    if return_dinitial_states and initial_states is None:
        initial_states = x.new_zeros(*x.shape[:2], weight.shape[1] - 1)
    states = initial_states if seq_idx is None else None
    douts = dout if dfinal_states is None else (dout, dfinal_states)
    _, (grad, dweight, dbias, dstates) = _vjp(forward, (x, weight, bias, states), douts)
    return grad if dx is None else dx.copy_(grad), dweight, dbias, dstates if return_dinitial_states else None


def causal_conv1d_update_function(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu_activation: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> Tensor:
    """Convolve a few steps x (B, D, L) and update `conv_state` (B, D, W) in place. Gives (B, D, L)."""
    activation = "silu" if silu_activation else None
    return causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)


def causal_conv1d_fwd(*args) -> Tensor | None:
    """`causal_conv1d_cuda.causal_conv1d_fwd` in the forms of 1.1 (5 arguments), 1.2 (7) and 1.5 (8, with `out`)."""
    if len(args) == 8:
        *given, out, final_states_out, silu = args
        out.copy_(causal_conv1d_fwd_function(*given, final_states_out, silu))
        return None
    if len(args) == 5:
        args = (*args[:4], None, None, args[4])
    _check_count("causal_conv1d_fwd", args, 7, "5, 7 or 8")
    return causal_conv1d_fwd_function(*args)


def causal_conv1d_bwd(*args) -> tuple[Tensor | None, ...] | None:
    """`causal_conv1d_cuda.causal_conv1d_bwd` in the forms of 1.1 (7 arguments), 1.2 (10) and 1.5 (12, written to)."""
    if len(args) == 12:
        *given, dx, dweight, dbias, dinitial_states, silu = args
        grads = causal_conv1d_bwd_function(*given, dx, dinitial_states is not None, silu)
        for place, grad in zip((dweight, dbias, dinitial_states), grads[1:], strict=True):
            if place is not None:
                place.copy_(grad)
        return None
    if len(args) == 7:
        x, weight, bias, dout, seq_idx, dx, silu = args
        return causal_conv1d_bwd_function(x, weight, bias, dout, seq_idx, None, None, dx, False, silu)[:3]
    _check_count("causal_conv1d_bwd", args, 10, "7, 10 or 12")
    return causal_conv1d_bwd_function(*args)


def causal_conv1d_step(*args) -> Tensor | None:
    """`causal_conv1d_cuda.causal_conv1d_update` in the forms of 1.1 (5), 1.4 (6 or 7) and 1.5 (8, with `out`)."""
    if len(args) == 8:
        *given, out, silu, cache_seqlens, indices = args
        out.copy_(causal_conv1d_update_function(*given, silu, cache_seqlens, indices))
        return None
    if len(args) in (5, 6):
        args = (*args, *[None] * (7 - len(args)))
    _check_count("causal_conv1d_update", args, 7, "5, 6, 7 or 8")
    return causal_conv1d_update_function(*args)


def _check_count(name: str, args: tuple, count: int, known: str) -> None:
    if len(args) != count:
        raise TypeError(f"{name} takes {known} arguments, as the releases of causal_conv1d do, got {len(args)}")


def _vjp(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: tuple[Tensor | None, ...],
    douts: Tensor | tuple[Tensor, ...],
) -> tuple[Tensor | tuple[Tensor, ...], list[Tensor | None]]:
    """Output of the function, and the gradients of its inputs (None where one is) for those of the output."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    with torch.enable_grad():
        output = function(*leaves)
    given = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad(output, given, douts))
    detached = output.detach() if isinstance(output, Tensor) else tuple(t.detach() for t in output)
    return detached, [None if t is None else next(grads) for t in leaves]

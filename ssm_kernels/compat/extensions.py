"""Entry points of the originals' compiled extensions, for code that calls them directly.

They are `selective_scan_cuda`, VMamba's `selective_scan_cuda_oflex` and `selective_scan_cuda_core`, and
`causal_conv1d_cuda` with `causal_conv1d.cpp_functions`. Each has a forward that autograd does not record, and a
backward that takes the inputs of the forward. Nothing is saved between the two: the backward recomputes the forward.
Any device and dtype will do, as everywhere in this package.

Letters: B batch, L length, D channels, N state, G groups, K convolution width, W inputs that a state holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .mamba_ssm import causal_conv1d_fn, causal_conv1d_update, selective_scan_fn
from .mamba_ssm._shared import pair, single


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
    """`selective_scan_cuda.fwd`.

    Args:
        u, delta, A, B, C, D, z, delta_bias, delta_softplus: as in `selective_scan_fn`.

    Returns:
        y without the gate (B, D, L), and x (B, D, 1, 2 N), whose odd entries are the last state as in the original;
        with z, the gated y too.
    """
    y, last = pair(selective_scan_fn(u, delta, A, B, C, D, None, delta_bias, delta_softplus, True))
    # The original has the products of decays in the even entries, which only its own backward reads.
    x = torch.stack([torch.zeros_like(last), last], -1).flatten(-2).unsqueeze(2)  # (B, D, 1, 2 N)
    if z is None:
        return [y, x]
    return [y, x, single(selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus))]


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
    """`selective_scan_cuda.bwd`.

    Args:
        u, delta, A, B, C, D, z, delta_bias, delta_softplus: inputs of the forward.
        dout: (B, D, L) gradient of y, or of the gated y with z.
        x, out: outputs of the forward; not needed here.
        dz: (B, D, L) to write the gradient of z to, or None.
        recompute_out_z: return the gated y too.

    Returns:
        gradients of u, delta, A, B, C, D and delta_bias (None where the input is); with z, that of z; and the gated y.
    """

    def forward(u, delta, A, B, C, D, z, delta_bias) -> Tensor:
        return single(selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus))

    y, grads = _vjp(forward, (u, delta, A, B, C, D, z, delta_bias), dout)
    *input_grads, z_grad, bias_grad = grads
    # The original's order: z after delta_bias.
    results = [*input_grads, bias_grad]
    if z_grad is not None:
        results.append(z_grad if dz is None else dz.copy_(z_grad))
    if recompute_out_z:
        results.append(single(y))
    return results


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

    def forward(u, delta, A, B, C, D, delta_bias) -> Tensor:
        u = u.to(torch.promote_types(u.dtype, dout.dtype))  # as in the forward with `out_float`
        return single(selective_scan_fn(u, delta, A, B, C, D, None, delta_bias, delta_softplus))

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
    # The scan returns y in the dtype of u.
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
    """Convolve x (B, D, L) to y (B, D, L), and write the last inputs to `final_states_out` (B, D, K - 1)."""
    has_states, activation = final_states_out is not None, "silu" if silu_activation else None
    y = causal_conv1d_fn(x, weight, bias, seq_idx, initial_states, has_states, final_states_out, activation)
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
    """Backward of `causal_conv1d_fwd_function`.

    Args:
        x, weight, bias, seq_idx, initial_states, silu_activation: inputs of the forward.
        dout: (B, D, L) gradient of y.
        dfinal_states: (B, D, K - 1) gradient of the final states, or None.
        dx: (B, D, L) to write the gradient of x to, or None.
        return_dinitial_states: return the gradient of the initial states, rather than None.

    Returns:
        gradients of x, weight, bias and initial states.
    """

    def forward(x, weight, bias, states) -> Tensor | tuple[Tensor, ...]:
        activation = "silu" if silu_activation else None
        return causal_conv1d_fn(x, weight, bias, seq_idx, states, dfinal_states is not None, None, activation)

    if return_dinitial_states and initial_states is None:
        initial_states = x.new_zeros(*x.shape[:2], weight.shape[1] - 1)  # (B, D, K - 1)
    # `causal_conv1d_fn` refuses states together with `seq_idx`.
    states = initial_states if seq_idx is None else None
    douts = dout if dfinal_states is None else (dout, dfinal_states)
    _, (x_grad, dweight, dbias, dstates) = _vjp(forward, (x, weight, bias, states), douts)
    if dx is not None and x_grad is not None:
        x_grad = dx.copy_(x_grad)
    return x_grad, dweight, dbias, dstates if return_dinitial_states else None


def causal_conv1d_update_function(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu_activation: bool,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Convolve a few steps x (B, D, L) to y (B, D, L), and update `conv_state` (B, D, W) in place."""
    activation = "silu" if silu_activation else None
    return causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)


def causal_conv1d_fwd(*args: Any) -> Tensor | None:
    """`causal_conv1d_cuda.causal_conv1d_fwd` in the forms of 1.1 (5 arguments), 1.2 (7) and 1.5 (8, with `out`)."""
    # Releases are told apart by the number of their arguments.
    if len(args) == 8:
        x, weight, bias, seq_idx, initial_states, out, final_states_out, silu = args
        out.copy_(causal_conv1d_fwd_function(x, weight, bias, seq_idx, initial_states, final_states_out, silu))
        return None
    if len(args) == 5:
        x, weight, bias, seq_idx, silu = args
        return causal_conv1d_fwd_function(x, weight, bias, seq_idx, None, None, silu)
    _check_count("causal_conv1d_fwd", args, 7, "5, 7 or 8")
    return causal_conv1d_fwd_function(*args)


def causal_conv1d_bwd(*args: Any) -> tuple[Tensor | None, ...] | None:
    """`causal_conv1d_cuda.causal_conv1d_bwd` in the forms of 1.1 (7 arguments), 1.2 (10) and 1.5 (12, written to)."""
    if len(args) == 12:
        x, weight, bias, dout, seq_idx, states, dfinal_states, dx, dweight, dbias, dinitial_states, silu = args
        # The gradient of x is written to dx by the function itself.
        _, *grads = causal_conv1d_bwd_function(
            x, weight, bias, dout, seq_idx, states, dfinal_states, dx, dinitial_states is not None, silu
        )
        for out, grad in zip((dweight, dbias, dinitial_states), grads, strict=True):
            if out is not None:
                out.copy_(grad)
        return None
    if len(args) == 7:
        x, weight, bias, dout, seq_idx, dx, silu = args
        # 1.1 has no initial states, and no gradient of them.
        return causal_conv1d_bwd_function(x, weight, bias, dout, seq_idx, None, None, dx, False, silu)[:3]
    _check_count("causal_conv1d_bwd", args, 10, "7, 10 or 12")
    return causal_conv1d_bwd_function(*args)


def causal_conv1d_step(*args: Any) -> Tensor | None:
    """`causal_conv1d_cuda.causal_conv1d_update` in the forms of 1.1 (5), 1.4 (6 or 7) and 1.5 (8, with `out`)."""
    if len(args) == 8:
        x, conv_state, weight, bias, out, silu, cache_seqlens, indices = args
        out.copy_(causal_conv1d_update_function(x, conv_state, weight, bias, silu, cache_seqlens, indices))
        return None
    if len(args) not in (5, 6):
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
    """Return the output of the function, and the vector-Jacobian product for each input (None where one is).

    Args:
        function: takes the inputs.
        inputs: tensors, or None.
        douts: gradients of the outputs.
    """
    # Detached, so that the inputs' own graphs are left alone.
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    with torch.enable_grad():
        output = function(*leaves)
    grads = iter(torch.autograd.grad(output, [t for t in leaves if t is not None], douts))
    detached = output.detach() if isinstance(output, Tensor) else tuple(t.detach() for t in output)
    return detached, [None if t is None else next(grads) for t in leaves]

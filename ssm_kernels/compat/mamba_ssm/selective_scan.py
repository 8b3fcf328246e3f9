"""`mamba_ssm.ops.selective_scan_interface`: the scan of Mamba-1, and its mixer as one function.

The names that Vim's fork of `mamba_ssm` 1.1 adds are here too: `mamba_inner_fn_no_out_proj` and `bimamba_inner_fn`.

Letters: B batch, L length, D channels, N state, R rank of dt, G groups, K convolution width.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core.dispatch import bind_backend
from ..._core.recompute import recompute_in_backward
from ..._core.validation import check_tensor
from ...causal_conv1d import causal_conv1d
from ...norm import rms_norm
from ...selective_scan import selective_scan
from ._shared import single, time_before_channels, time_before_state
from .causal_conv1d import causal_conv1d_ref
from .layernorm_gated import rms_norm_ref

logger = logging.getLogger("ssm_kernels")
_already_logged: set[str] = set()


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The scan of Mamba-1.

    A may be complex. Then y is twice the real part, a constant B or C is complex, one that changes in time holds
    real and imaginary parts side by side, (B, N, 2 L) or (B, G, N, 2 L), and the scan runs step by step in PyTorch:
    correct, but slow, on every backend. That is logged once.

    Args:
        u, delta, z: (B, D, L).
        A: (D, N).
        B, C: (D, N), (B, N, L) or (B, G, N, L).
        D, delta_bias: (D,).
        delta_softplus: pass delta (after the bias) through softplus.
        return_last_state: return the final state too.

    Returns:
        y (B, D, L); with `return_last_state`, y and the final state (B, D, N).
    """
    if isinstance(A, Tensor) and A.is_complex():
        _warn_slow("selective_scan_fn")
        return selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    u, delta = time_before_channels("u", u), time_before_channels("delta", delta)  # (B, L, D)
    z = time_before_channels("z", z)
    B, C = time_before_state(B), time_before_state(C)
    y, state = selective_scan(u, delta, A, B, C, D, z, delta_bias, bool(delta_softplus))
    return (y.transpose(1, 2), state) if return_last_state else y.transpose(1, 2)


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan_fn` step by step (arXiv 2312.00752, algorithm 2), in float32 or complex64 at least.

    Args:
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state: as in `selective_scan_fn`.

    Returns:
        y (B, D, L) in the dtype of u; with `return_last_state`, y and the final state (B, D, N).
    """
    real = torch.promote_types(u.dtype, torch.float32)
    dtype = torch.promote_types(real, torch.complex64) if A.is_complex() else real
    batch, dim, length = u.shape
    dt = delta.to(real) if delta_bias is None else delta.to(real) + delta_bias.to(real).unsqueeze(-1)  # (B, D, L)
    dt = F.softplus(dt) if delta_softplus else dt

    def of_channels(matrix: Tensor) -> Tensor:
        """Expand B or C to (B or 1, D, N, L or 1)."""
        if matrix.dim() == 2:
            return matrix.to(dtype)[None, :, :, None]
        if A.is_complex():
            matrix = torch.view_as_complex(matrix.to(real).unflatten(-1, (length, 2)).contiguous())
        grouped = matrix.to(dtype) if matrix.dim() == 4 else matrix.to(dtype).unsqueeze(1)  # (B, G, N, L)
        return grouped.repeat_interleave(dim // grouped.shape[1], 1)

    B, C, x = of_channels(B).expand(-1, -1, -1, length), of_channels(C).expand(-1, -1, -1, length), u.to(real)
    state = torch.zeros(batch, *A.shape, dtype=dtype, device=u.device)  # (B, D, N)
    ys = []
    for t in range(length):
        step = dt[..., t, None]  # (B, D, 1)
        # Equation 2: h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, (B, D, N)
        state = torch.exp(step * A.to(dtype)) * state + step * x[..., t, None] * B[..., t]
        y = (state * C[..., t]).sum(-1)  # (B, D)
        # Complex states come in conjugate pairs, of which one is computed: the sum of both is twice the real part.
        ys.append(2 * y.real if A.is_complex() else y)
    y = torch.stack(ys, -1) if ys else torch.zeros_like(x)  # (B, D, L)
    y = y if D is None else y + D.to(real).unsqueeze(-1) * x
    y = (y if z is None else y * F.silu(z.to(real))).to(u.dtype)
    return (y, state) if return_last_state else y


def mamba_inner_fn(
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
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """The Mamba-1 mixer after its first projection.

    Args:
        xz: (B, 2 D, L) output of the first projection.
        conv1d_weight: (D, 1, K).
        x_proj_weight: (R + 2 N, D), or (R + 4 N, D) where A is complex.
        delta_proj_weight: (D, R).
        out_proj_weight: (width, D).
        A, D, delta_bias, delta_softplus: as in `selective_scan_fn`.
        B, C: as in `selective_scan_fn`; None computes them from x.
        B_proj_bias, C_proj_bias: (N,), for a B and C that are computed.
        b_rms_weight, c_rms_weight: (N,), RMS norm of a B and C that change in time.
        dt_rms_weight: (D,), RMS norm of the step sizes, after `delta_proj_weight` and before `delta_bias`.
        b_c_dt_rms_eps: epsilon of these norms.
        checkpoint_lvl: 1 recomputes the convolution and the step sizes in the backward, 0 saves them.

    Returns:
        (B, L, width).
    """
    y = mamba_inner_fn_no_out_proj(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias,
        C_proj_bias, delta_softplus, checkpoint_lvl, b_rms_weight, c_rms_weight, dt_rms_weight, b_c_dt_rms_eps,
    )  # fmt: skip
    return _project_out(y, out_proj_weight, out_proj_bias)


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """`mamba_inner_fn` of Vim's fork, without the last projection.

    Args:
        xz: (B, 2 D, L) output of the first projection. The others are as in `mamba_inner_fn`.

    Returns:
        (B, D, L).
    """
    check_tensor("xz", xz, ("B", "2 D", "L"))
    check_tensor("conv1d_weight", conv1d_weight, (xz.shape[1] // 2, 1, "K"), like=xz)
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"checkpoint_lvl must be 0 or 1, got {checkpoint_lvl!r}")
    for name, matrix, bias, scale in (("B", B, B_proj_bias, b_rms_weight), ("C", C, C_proj_bias, c_rms_weight)):
        if matrix is not None and bias is not None:
            raise ValueError(f"{name}_proj_bias is for a {name} that is computed from x, but {name} is not None")
        if matrix is not None and matrix.dim() == 2 and scale is not None:
            raise ValueError(f"{name.lower()}_rms_weight is for a {name} that changes in time, got (D, N)")
    if dt_rms_weight is not None:
        check_tensor("dt_rms_weight", dt_rms_weight, (xz.shape[1] // 2,), like=xz)
    if A.is_complex():
        _warn_slow("mamba_inner_fn")
        return _inner_ref(
            xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias,
            C_proj_bias, delta_softplus, b_rms_weight, c_rms_weight, dt_rms_weight, b_c_dt_rms_eps,
        )  # fmt: skip
    rank, n = delta_proj_weight.shape[1], A.shape[1]
    x, z = xz.transpose(1, 2).chunk(2, dim=-1)  # (B, L, D)
    weight = conv1d_weight.squeeze(1)  # (D, K)

    def convolve() -> Tensor:
        return causal_conv1d(x, weight, conv1d_bias, "silu").y

    def steps() -> Tensor:
        # The backward may run outside the autocast of the forward.
        dt = F.linear(low_rank, delta_proj_weight.to(low_rank.dtype))
        return dt if dt_rms_weight is None else rms_norm(dt, dt_rms_weight, eps=b_c_dt_rms_eps)

    def in_time(given: Tensor | None, part: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
        """Return B or C as (D, N), (B, L, N) or (B, L, G, N)."""
        if given is not None:
            part = time_before_state(given)
        part = part if bias is None else part + bias.to(part.dtype)
        return part if scale is None else rms_norm(part, scale, eps=b_c_dt_rms_eps)

    convolved = convolve()  # (B, L, D)
    # A short convolution costs little to compute again, and its output as much memory as x.
    recompute_conv = (convolved, bind_backend(convolve))
    with recompute_in_backward(recompute_conv, enabled=checkpoint_lvl == 1):
        parts = F.linear(convolved, x_proj_weight)  # (B, L, R + 2 N)
    low_rank = parts[..., :rank]  # (B, L, R)
    B = in_time(B, parts[..., rank : rank + n], B_proj_bias, b_rms_weight)
    C = in_time(C, parts[..., -n:], C_proj_bias, c_rms_weight)
    dt = steps()  # (B, L, D)
    with recompute_in_backward(recompute_conv, (dt, bind_backend(steps)), enabled=checkpoint_lvl == 1):
        y = selective_scan(convolved, dt, A, B, C, D, z, delta_bias, bool(delta_softplus)).y
    return y.transpose(1, 2)  # (B, D, L)


def bimamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """Vim's first bidirectional mixer: one convolution, scanned forward with A and backward with A_b, and added.

    Args:
        A_b: (D, N). The others are as in `mamba_inner_fn`.

    Returns:
        (B, L, width).
    """
    for name, matrix in (("B", B), ("C", C)):
        if matrix is not None:
            raise NotImplementedError(f"{name} must be None here: it is computed from x")
    x, z = xz.transpose(1, 2).chunk(2, dim=-1)  # (B, L, D)
    x = causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, "silu").y  # (B, L, D)
    rank, n = delta_proj_weight.shape[1], A.shape[1]
    low_rank, B, C = F.linear(x, x_proj_weight).split([rank, n, n], dim=-1)  # (B, L, R), (B, L, N), (B, L, N)
    B = B if B_proj_bias is None else B + B_proj_bias.to(B.dtype)
    C = C if C_proj_bias is None else C + C_proj_bias.to(C.dtype)
    dt = F.linear(low_rank, delta_proj_weight.to(low_rank.dtype))  # (B, L, D)

    def scan(A: Tensor, inputs: list[Tensor]) -> Tensor:
        x, dt, B, C, z = inputs
        return selective_scan(x, dt, A, B, C, D, z, delta_bias, bool(delta_softplus)).y

    inputs = [x, dt, B, C, z]
    # Time is reversed after the convolution, which is causal in the forward direction for both scans.
    y = scan(A, inputs) + scan(A_b, [t.flip(1) for t in inputs]).flip(1)
    return _project_out(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def mamba_inner_ref(
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
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """`mamba_inner_fn` from `causal_conv1d_ref`, `selective_scan_ref`, linear layers and `rms_norm_ref`.

    Args:
        xz: (B, 2 D, L) output of the first projection. The others are as in `mamba_inner_fn`.

    Returns:
        (B, L, width).

    Raises:
        NotImplementedError: A is complex, with a norm of B or C.
    """
    y = _inner_ref(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias,
        C_proj_bias, delta_softplus, b_rms_weight, c_rms_weight, dt_rms_weight, b_c_dt_rms_eps,
    )  # fmt: skip
    return _project_out(y, out_proj_weight, out_proj_bias)


def bimamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """`bimamba_inner_fn` from `causal_conv1d_ref`, `selective_scan_ref` and linear layers.

    Args:
        xz: (B, 2 D, L) output of the first projection.
        A, A_b: (D, N), of the forward and the backward scan.
        B, C: as in `selective_scan_fn`; None computes them from x. The others are as in `mamba_inner_fn`.

    Returns:
        (B, L, width).
    """
    x, dt, B, C, z = _projected(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias
    )
    y = single(selective_scan_ref(x, dt, A, B, C, D, z, delta_bias, delta_softplus))
    # A constant B or C has no time to reverse.
    x, dt, B, C, z = (t if t.dim() == 2 else t.flip(-1) for t in (x, dt, B, C, z))
    back = single(selective_scan_ref(x, dt, A_b, B, C, D, z, delta_bias, delta_softplus))
    return _project_out(y + back.flip(-1), out_proj_weight, out_proj_bias)


class SelectiveScanFn:
    """`SelectiveScanFn.apply(...)` for code that calls the autograd function of the original: `selective_scan_fn`."""

    apply = staticmethod(selective_scan_fn)


class MambaInnerFn:
    """`MambaInnerFn.apply(...)` for code that calls the autograd function of the original: `mamba_inner_fn`."""

    apply = staticmethod(mamba_inner_fn)


def _inner_ref(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias, C_proj_bias,
    delta_softplus, b_rms_weight, c_rms_weight, dt_rms_weight, eps,
) -> Tensor:  # fmt: skip
    """Run the mixer up to its last projection, (B, D, L)."""
    x, dt, B, C, z = _projected(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias
    )

    def normed(t: Tensor, weight: Tensor | None) -> Tensor:
        return t if weight is None else rms_norm_ref(t.transpose(-1, -2), weight, None, eps=eps).transpose(-1, -2)

    if A.is_complex() and (b_rms_weight is not None or c_rms_weight is not None):
        raise NotImplementedError("b_rms_weight and c_rms_weight must be None where A is complex")
    # The norms are over N and D, which are before L here.
    B, C, dt = normed(B, b_rms_weight), normed(C, c_rms_weight), normed(dt, dt_rms_weight)
    return single(selective_scan_ref(x, dt, A, B, C, D, z, delta_bias, delta_softplus))


def _projected(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias
) -> tuple[Tensor, ...]:
    """Return x, dt, B, C and z in the layout of `selective_scan_ref`."""
    x, z = xz.chunk(2, dim=1)  # (B, D, L)
    x = single(causal_conv1d_ref(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu"))  # (B, D, L)
    rank, n = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    parts = F.linear(x.transpose(1, 2), x_proj_weight)  # (B, L, R + 2 N)

    def in_time(part: Tensor, bias: Tensor | None) -> Tensor:
        part = part if bias is None else part + bias.to(part.dtype)
        if not A.is_complex():
            return part.transpose(1, 2)  # (B, N, L)
        return part.unflatten(-1, (-1, 2)).transpose(1, 2).flatten(-2)  # (B, N, 2 L), parts side by side

    B = in_time(parts[..., rank : rank + n], B_proj_bias) if B is None else B
    C = in_time(parts[..., -n:], C_proj_bias) if C is None else C
    dt = F.linear(parts[..., :rank], delta_proj_weight.to(parts.dtype)).transpose(1, 2)  # (B, D, L)
    return x, dt, B, C, z


def _project_out(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Project (B, D, L) to (B, L, width)."""
    return F.linear(y.transpose(1, 2), weight, None if bias is None else bias.to(weight.dtype))


def _warn_slow(name: str) -> None:
    if name not in _already_logged:
        _already_logged.add(name)
        logger.warning("%s with a complex A runs step by step in PyTorch: there is no fast backend for it", name)

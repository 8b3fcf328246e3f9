"""The functions of `mamba_ssm` and `causal_conv1d`, with their signatures and layouts.

Everything runs on a CPU too. An argument that these ops cannot honour is refused by name, with a `ValueError` where
the original refuses it too and a `NotImplementedError` where it does not. Where the originals drop a gradient
(`return_last_state`), it flows here. As there, the two `*_update` functions have none.

Letters: B batch, L length, D channels, N state, R rank of dt, H heads, P head dimension, G groups, K convolution
width, S sequences in a pack.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._backend import as_now
from ..._checks import check_tensor
from ..._recompute import not_kept
from ...causal_conv1d import causal_conv1d
from ...norm import add_rms_norm, rms_norm
from ...selective_scan import selective_scan, selective_scan_step
from ...ssd import ssd, ssd_step

_INDICES = (torch.int32, torch.int64)
_UNLIMITED = (0.0, float("inf"))


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve over time. x: (B, D, L); weight: (D, K); both states: (B, D, K - 1); activation: None, silu or swish.

    Gives y (B, D, L); with `return_final_states`, (y, final states), the latter written to `final_states_out` if given.
    Where `seq_idx` (B, L) is negative, y is zero.
    """
    if seq_idx is not None and (initial_states is not None or return_final_states):
        name = "return_final_states" if return_final_states else "initial_states"
        raise ValueError(f"{name} cannot be had together with seq_idx")
    if final_states_out is not None and not return_final_states:
        raise ValueError("final_states_out needs return_final_states=True")
    states = _swapped("initial_states", initial_states)
    y, final_states = causal_conv1d(
        _swapped("x", x), weight, bias, _activation(activation), states, seq_idx=seq_idx
    )  # fmt: skip
    y, final_states = y.transpose(1, 2), final_states.transpose(1, 2)
    if seq_idx is not None:
        y = y.masked_fill((seq_idx < 0).unsqueeze(1), 0)
    if final_states_out is not None:
        check_tensor("final_states_out", final_states_out, tuple(final_states.shape), like=x)
        final_states = final_states_out.copy_(final_states)
    return (y, final_states) if return_final_states else y


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Convolve one step or a few, and bring `conv_state` up to date in place. Gives y like x; no gradients.

    Args:
        x: (B, D), or (B, D, L).
        conv_state: (B, D, W), the last W >= K - 1 inputs.
        weight, bias, activation: as in `causal_conv1d_fn`.
        cache_seqlens: (B,) inputs seen before; `conv_state` is then a ring, whose next place is that modulo W.
        conv_state_indices: (B,) rows of `conv_state` that are meant; it may then have more of them.
    """
    if isinstance(x, Tensor) and x.dim() == 2:
        one = causal_conv1d_update(
            x.unsqueeze(-1), conv_state, weight, bias, activation, cache_seqlens, conv_state_indices
        )
        return one.squeeze(-1)
    check_tensor("x", x, ("B", "D", "L"))
    check_tensor("weight", weight, (x.shape[1], "K"), like=x)
    rows = _rows("conv_state_indices", conv_state_indices, conv_state, x)
    check_tensor("conv_state", conv_state, (rows, x.shape[1], "W"), like=x)
    length, before, size = x.shape[2], weight.shape[1] - 1, conv_state.shape[2]
    if size < before:
        raise ValueError(f"conv_state must hold at least K - 1 = {before} inputs, got {size}")
    old = conv_state if conv_state_indices is None else conv_state[conv_state_indices]
    if cache_seqlens is None:
        window = old[..., size - before :]
        new = torch.cat([old, x.to(old.dtype)], dim=-1)[..., length:]
    else:
        check_tensor("cache_seqlens", cache_seqlens, (x.shape[0],), like=x, dtypes=_INDICES)

        def places(first: int, last: int) -> Tensor:
            steps = cache_seqlens.long()[:, None] + torch.arange(first, last, device=x.device)
            return (steps % size).unsqueeze(1).expand(-1, x.shape[1], -1)

        window = old.gather(2, places(-before, 0))
        kept = max(length - size, 0)
        new = old.scatter(2, places(kept, length), x[..., kept:].to(old.dtype))
    y = causal_conv1d(x.transpose(1, 2), weight, bias, _activation(activation), window.transpose(1, 2)).y
    if conv_state_indices is None:
        conv_state.copy_(new)
    else:
        conv_state[conv_state_indices] = new
    return y.transpose(1, 2)


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
    """The scan of Mamba-1. u, delta, z: (B, D, L); A: (D, N); B, C: (D, N), (B, N, L) or (B, G, N, L).

    Gives y (B, D, L); with `return_last_state`, (y, last state (B, D, N)).
    """
    _refuse_complex(A)
    u, delta, z = _swapped("u", u), _swapped("delta", delta), _swapped("z", z)
    y, state = selective_scan(u, delta, A, _in_time(B), _in_time(C), D, z, delta_bias, bool(delta_softplus))
    return (y.transpose(1, 2), state) if return_last_state else y.transpose(1, 2)


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
    """The Mamba-1 mixer between its two projections, and the second. xz: (B, 2 D, L); gives (B, L, width).

    Args:
        conv1d_weight: (D, 1, K). x_proj_weight: (R + 2 N, D). delta_proj_weight: (D, R). out_proj_weight: (width, D).
        B, C: as in `selective_scan_fn`; None computes them from x.
        B_proj_bias, C_proj_bias, b_rms_weight, c_rms_weight: (N,), for a B and C that are computed.
        dt_rms_weight: (R,).
        checkpoint_lvl: 1 computes the convolution and the step sizes again in the backward, 0 keeps them.
    """
    _refuse_complex(A)
    check_tensor("xz", xz, ("B", "2 D", "L"))
    check_tensor("conv1d_weight", conv1d_weight, (xz.shape[1] // 2, 1, "K"), like=xz)
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"checkpoint_lvl must be 0 or 1, got {checkpoint_lvl!r}")
    given = {"B": (B, B_proj_bias, b_rms_weight), "C": (C, C_proj_bias, c_rms_weight)}
    for name, (matrix, bias, scale) in given.items():
        if matrix is not None and (bias is not None or scale is not None):
            wrong = f"{name}_proj_bias" if bias is not None else f"{name.lower()}_rms_weight"
            raise ValueError(f"{wrong} is for a {name} that is computed from x, but {name} was given")
    rank, n = delta_proj_weight.shape[1], A.shape[1]
    x, z = xz.transpose(1, 2).chunk(2, dim=-1)  # (B, L, D)
    weight = conv1d_weight.squeeze(1)

    def convolve() -> Tensor:
        return causal_conv1d(x, weight, conv1d_bias, "silu").y

    def steps() -> Tensor:
        # The backward may run outside of the autocast that the forward is in.
        return F.linear(low_rank, delta_proj_weight.to(low_rank.dtype))

    def computed(part: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
        part = part if bias is None else part + bias.to(part.dtype)
        return part if scale is None else rms_norm(part, scale, eps=b_c_dt_rms_eps)

    convolved = convolve()
    again = (convolved, as_now(convolve))
    with not_kept(again) if checkpoint_lvl else contextlib.nullcontext():
        parts = F.linear(convolved, x_proj_weight)
    low_rank = computed(parts[..., :rank], None, dt_rms_weight)
    B = computed(parts[..., rank : rank + n], B_proj_bias, b_rms_weight) if B is None else _in_time(B)
    C = computed(parts[..., -n:], C_proj_bias, c_rms_weight) if C is None else _in_time(C)
    dt = steps()
    with not_kept(again, (dt, steps)) if checkpoint_lvl else contextlib.nullcontext():
        y = selective_scan(convolved, dt, A, B, C, D, z, delta_bias, bool(delta_softplus)).y
    return F.linear(y, out_proj_weight, None if out_proj_bias is None else out_proj_bias.to(out_proj_weight.dtype))


@torch.no_grad()
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """Advance either scan by one step, and `state` in place. Gives y like x; no gradients.

    Args:
        state: (B, D, N), or (B, H, P, N); of any floating-point dtype.
        x, dt, z: (B, D), or (B, H, P). A: (D, N), or (H, P, N). D, dt_bias: (D,), or (H, P).
        B, C: (B, N), or (B, G, N).
        state_batch_indices: (B,) rows of `state` that are meant; it may then have more of them.
    """
    heads = isinstance(state, Tensor) and state.dim() == 4
    check_tensor("x", x, ("B", "H", "P") if heads else ("B", "D"))
    rows = _rows("state_batch_indices", state_batch_indices, state, x)
    check_tensor("state", state, (rows, *x.shape[1:], "N"), like=x)
    each = tuple(x.shape[1:])
    for name, tensor, shape in (
        ("dt", dt, tuple(x.shape)),
        ("A", A, (*each, state.shape[-1])),
        ("D", D, each),
        ("z", z, tuple(x.shape)),
        ("dt_bias", dt_bias, each),
    ):
        if tensor is not None or name in ("dt", "A"):
            check_tensor(name, tensor, shape, like=x)
    for name, tensor in (("B", B), ("C", C)):
        if isinstance(tensor, Tensor) and tensor.dim() == 2:
            check_tensor(name, tensor, (x.shape[0], state.shape[-1]), like=x)
        else:
            check_tensor(name, tensor, (x.shape[0], "G", state.shape[-1]), like=x)
    B, C = (m.unsqueeze(1) if m.dim() == 2 else m for m in (B, C))
    # A head's channels share A and dt where these were expanded from (H,): Mamba-2.
    tied = heads and all(t is None or t.stride(-1) == 0 for t in (A, dt, dt_bias)) and A.stride(1) == 0
    work = state if state_batch_indices is None else state[state_batch_indices]
    work = work.to(torch.promote_types(state.dtype, torch.float32))
    if tied:
        bias = None if dt_bias is None else dt_bias[:, 0]
        y = ssd_step(work, x, dt[..., 0], A[:, 0, 0], B, C, D, z, bias, bool(dt_softplus))
    else:
        work = work.contiguous().view(x.shape[0], -1, state.shape[-1])
        flat = [t if t is None else t.flatten(1) for t in (x, dt, z)]
        A, D, dt_bias = A.reshape(-1, A.shape[-1]), *(t if t is None else t.flatten() for t in (D, dt_bias))
        y = selective_scan_step(work, flat[0], flat[1], A, B, C, D, flat[2], dt_bias, bool(dt_softplus)).view(x.shape)
    if state_batch_indices is not None:
        state[state_batch_indices] = work.view(-1, *state.shape[1:]).to(state.dtype)
    else:
        state.copy_(work.view(state.shape))  # nothing happens where it is the same memory
    return y


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _UNLIMITED,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """The scan of Mamba-2. x, z: (B, L, H, P); dt: (B, L, H); A: (H,); B, C: (B, L, G, N); D: (H,) or (H, P).

    Gives y (B, L, H, P), followed by the final states (B, H, P, N) with `return_final_states`, and by those of each
    sequence (S, H, P, N) with `return_varlen_states`.

    Args:
        initial_states: (B, H, P, N), of each row's first sequence.
        seq_idx: (B, L); a new sequence starts where it changes.
        cu_seqlens: (S + 1,) the same bounds, for `return_varlen_states`; B is 1. It needs `seq_idx`, since in the
            original `cu_seqlens` alone does not keep sequences apart.
    """
    if return_varlen_states and cu_seqlens is None:
        raise ValueError("return_varlen_states needs cu_seqlens")
    if cu_seqlens is not None and seq_idx is None:
        raise ValueError("cu_seqlens needs seq_idx: alone, it does not keep the sequences of y apart in mamba_ssm")
    options = (D, z, dt_bias, bool(dt_softplus), tuple(dt_limit))
    if not return_varlen_states:
        y, final = ssd(x, dt, A, B, C, *options, initial_states, chunk_size=chunk_size, seq_idx=seq_idx)
        return (y, final) if return_final_states else y
    if initial_states is not None:
        check_tensor("initial_states", initial_states, (1, *x.shape[2:], B.shape[-1]), like=x)
        others = initial_states.new_zeros(len(cu_seqlens) - 2, *initial_states.shape[1:])
        initial_states = torch.cat([initial_states, others])
    y, states = ssd(x, dt, A, B, C, *options, initial_states, chunk_size=chunk_size, cu_seqlens=cu_seqlens)
    return (y, states[-1:], states) if return_final_states else (y, states)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = _UNLIMITED,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """The Mamba-2 mixer between its two projections, with the second where `outproj_weight` is given.

    Args:
        zxbcdt: (B, L, 2 M + 2 H P + 2 G N + H): a gated MLP of width M, mostly 0, then z, x, B, C and dt.
        conv1d_weight: (H P + 2 G N, K).
        D: (H, P), or (H,) together with `headdim`.
        rmsnorm_weight: (H P,), norm of each group with the gate in it; without it the gate multiplies the scan's y.

    Gives (B, L, M + H P), or the projection of it; with `return_final_states`, a pair with (B, H, P, N).
    """
    check_tensor("zxbcdt", zxbcdt, ("B", "L", "2 M + 2 H P + 2 G N + H"))
    check_tensor("D", D, ("H", "P") if isinstance(D, Tensor) and D.dim() == 2 else ("H",), like=zxbcdt)
    check_tensor("conv1d_weight", conv1d_weight, ("H P + 2 G N", "K"), like=zxbcdt)
    if D.dim() == 1 and headdim is None:
        raise ValueError("headdim must be given where D has shape (H,)")
    if outproj_bias is not None and outproj_weight is None:
        raise ValueError("outproj_bias needs outproj_weight")
    heads, headdim = D.shape[0], D.shape[1] if D.dim() == 2 else headdim
    inner, channels = heads * headdim, conv1d_weight.shape[0]
    n = (channels - inner) // (2 * ngroups)
    mlp = zxbcdt.shape[-1] - inner - channels - heads
    if n < 1 or inner + 2 * ngroups * n != channels or mlp < 0 or mlp % 2:
        raise ValueError(
            f"zxbcdt of width {zxbcdt.shape[-1]} and conv1d_weight of {channels} channels do not fit {heads} heads of "
            f"headdim {headdim} in ngroups {ngroups}"
        )
    gated, z, before, dt = zxbcdt.split([mlp, inner, channels, heads], dim=-1)

    def convolve() -> Tensor:
        return causal_conv1d(before, conv1d_weight, conv1d_bias, _activation(activation), seq_idx=seq_idx).y

    xBC = convolve()
    with not_kept((xBC, as_now(convolve))):
        x, B, C = xBC.split([inner, ngroups * n, ngroups * n], dim=-1)
        y, final = ssd(
            x.unflatten(-1, (heads, headdim)), dt, A, B.unflatten(-1, (ngroups, n)), C.unflatten(-1, (ngroups, n)),
            D, z.unflatten(-1, (heads, headdim)) if rmsnorm_weight is None else None, dt_bias, True, tuple(dt_limit),
            initial_states, chunk_size=chunk_size, seq_idx=seq_idx,
        )  # fmt: skip
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = rmsnorm_fn(y, rmsnorm_weight, None, z, rmsnorm_eps, inner // ngroups, norm_before_gate)
    if mlp:
        gate, value = gated.chunk(2, dim=-1)
        y = torch.cat([F.silu(gate) * value, y], dim=-1)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, final) if return_final_states else y


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """RMS norm with a gate, of `mamba_ssm.ops.triton.layernorm_gated`. x, z: (..., D); weight, bias: (D,)."""
    if bias is None:
        return rms_norm(x, weight, z=z, eps=eps, group_size=group_size, norm_before_gate=norm_before_gate)
    check_tensor("bias", bias, (x.shape[-1],), like=x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = rms_norm(wide, weight, z=None if norm_before_gate else z, eps=eps, group_size=group_size) + bias
    if z is not None and norm_before_gate:
        check_tensor("z", z, tuple(x.shape), like=x)
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype)


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor | None, ...]:
    """Add to the residual stream and normalise, of `mamba_ssm.ops.triton.layer_norm`.

    The sum is `dropout(x * rowscale) + dropout(x1) + residual`. All of x, x1, residual: (..., D).

    Args:
        weight, bias, weight1, bias1: (D,); the second pair normalises the same sum once more.
        rowscale: x's shape without D; not together with `x1`.
        prenorm: give the sum too.
        residual_in_fp32: keep the sum in float32 where there is no `residual`, whose dtype it takes otherwise.
        is_rms_norm: RMS norm rather than layer norm.
        return_dropout_mask: give the masks of x and x1 too (true where kept; None without dropout).

    Gives y, or a tuple: y, the second y if `weight1`, the sum if `prenorm`, both masks if `return_dropout_mask`.
    """
    check_tensor("x", x, tuple(x.shape) if isinstance(x, Tensor) else ("...", "D"))
    width = x.shape[-1:]
    for name, tensor, shape in (
        ("weight", weight, width), ("bias", bias, width), ("weight1", weight1, width), ("bias1", bias1, width),
        ("residual", residual, x.shape), ("x1", x1, x.shape), ("rowscale", rowscale, x.shape[:-1]),
    ):  # fmt: skip
        if tensor is not None or name == "weight":
            check_tensor(name, tensor, tuple(shape), like=x)
    if x1 is not None and rowscale is not None:
        raise ValueError("rowscale cannot be had together with x1")
    if bias1 is not None and weight1 is None:
        raise ValueError("bias1 needs weight1")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and less than 1, got {dropout_p!r}")
    compute = torch.promote_types(x.dtype, torch.float32)
    added, masks = x, (None, None)
    if rowscale is not None:
        added = added.to(compute) * rowscale.to(compute).unsqueeze(-1)
    if dropout_p > 0:
        masks = tuple(None if t is None else torch.rand(t.shape, device=t.device) > dropout_p for t in (x, x1))
        added = added.to(compute) * masks[0] / (1 - dropout_p)
    if x1 is not None:
        other = x1.to(compute) if masks[1] is None else x1.to(compute) * masks[1] / (1 - dropout_p)
        added = added.to(compute) + other
    stream = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    if is_rms_norm:
        y, total = add_rms_norm(added, weight, residual, eps=eps, residual_dtype=stream)
    else:
        total = (added if residual is None else added + residual).to(stream)
        y = F.layer_norm(total.to(compute), width, weight.to(compute), None, eps)
    outputs = [(y if bias is None else y + bias).to(x.dtype)]
    if weight1 is not None:
        wide = total.to(compute)
        y1 = (
            rms_norm(wide, weight1, eps=eps)
            if is_rms_norm
            else F.layer_norm(wide, width, weight1.to(compute), None, eps)
        )
        outputs.append((y1 if bias1 is None else y1 + bias1).to(x.dtype))
    if prenorm:
        outputs.append(total)
    if return_dropout_mask:
        outputs.extend(masks)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor | None, ...]:
    """`layer_norm_fn` with `is_rms_norm`."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32, True,
        return_dropout_mask,
    )  # fmt: skip


def _swapped(name: str, tensor: Tensor | None) -> Tensor | None:
    """(B, D, L) -> (B, L, D)."""
    if tensor is None:
        return None
    check_tensor(name, tensor, ("B", "D", "L"))
    return tensor.transpose(1, 2)


def _in_time(matrix: Tensor) -> Tensor:
    """(B, N, L) or (B, G, N, L) with L after B; (D, N) as it is."""
    if not isinstance(matrix, Tensor) or matrix.dim() < 3:
        return matrix
    return matrix.movedim(-1, 1)


def _activation(name: str | None) -> str | None:
    if name not in (None, "silu", "swish"):
        raise NotImplementedError(f"activation must be None, 'silu' or 'swish', got {name!r}")
    return None if name is None else "silu"


def _rows(name: str, indices: Tensor | None, state: Tensor, x: Tensor) -> int:
    """How many rows the state must have. Indices are looked at on a CPU only, as a GPU would have to be waited for."""
    if indices is None:
        return x.shape[0]
    check_tensor(name, indices, (x.shape[0],), like=x, dtypes=_INDICES)
    if indices.device.type == "cpu" and ((indices < 0) | (indices >= len(state))).any():
        raise ValueError(f"{name} must be rows of the state, of which there are {len(state)}, got {indices.tolist()}")
    return len(state)


def _refuse_complex(A: Tensor) -> None:
    if isinstance(A, Tensor) and A.is_complex():
        raise NotImplementedError("A must be real here, got a complex tensor")

"""`mamba_ssm.ops.triton.ssd_combined` and `mamba_ssm.modules.ssd_minimal`: the scan of Mamba-2, and its mixer.

Letters: B batch, L length, H heads, P head dimension, N state, G groups, K convolution width, M width of a gated MLP,
S sequences in a pack.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core.dispatch import bind_backend
from ..._core.recompute import recompute_in_backward
from ..._core.validation import check_divides, check_tensor
from ...causal_conv1d import causal_conv1d
from ...ssd import ssd
from ._shared import UNLIMITED, check_activation, single
from .causal_conv1d import causal_conv1d_ref
from .layernorm_gated import rms_norm_ref, rmsnorm_fn
from .selective_scan import selective_scan_fn, selective_scan_ref


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
    dt_limit: tuple[float, float] = UNLIMITED,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """The scan of Mamba-2.

    Args:
        x, z: (B, L, H, P).
        dt: (B, L, H).
        A, dt_bias: (H,).
        B, C: (B, L, G, N).
        chunk_size: steps that are treated as one matrix product. Results do not depend on it.
        D: (H,) or (H, P).
        initial_states: (B, H, P, N), of each row's first sequence.
        seq_idx: (B, L); a new sequence starts where it changes. Steps with a negative number are padding: y is 0 there
            and no state depends on them.
        cu_seqlens: (S + 1,) the same bounds, for `return_varlen_states`; B is 1. Steps after the last are padding. It
            needs `seq_idx`, since in the original `cu_seqlens` alone does not keep sequences apart.
        dt_softplus, dt_limit: as in `ssm_kernels.ssd`.
        return_final_states: return the final state of each row too.
        return_varlen_states: return the final state of each sequence too.
        state_dtype: least precision of the states between chunks. They are always float32 here, or float64 where `x`
            is; a request for more is refused.

    Returns:
        y (B, L, H, P), followed by the final states (B, H, P, N) with `return_final_states`, and by those of each
        sequence (S, H, P, N) with `return_varlen_states`.

    Raises:
        ValueError: `return_varlen_states` without `cu_seqlens`, or `cu_seqlens` without `seq_idx`.
        NotImplementedError: `state_dtype` is wider than the states.
    """
    _check_state_dtype(state_dtype, x)
    if return_varlen_states and cu_seqlens is None:
        raise ValueError("return_varlen_states needs cu_seqlens")
    if cu_seqlens is not None and seq_idx is None:
        raise ValueError("cu_seqlens needs seq_idx: alone, it does not keep the sequences of y apart in mamba_ssm")
    options = (D, z, dt_bias, bool(dt_softplus), dt_limit)
    if not return_varlen_states or cu_seqlens is None:
        y, final = ssd(x, dt, A, B, C, *options, initial_states, chunk_size=chunk_size, seq_idx=seq_idx)
        return (y, final) if return_final_states else y
    if initial_states is not None:
        check_tensor("initial_states", initial_states, (1, *x.shape[2:], B.shape[-1]), like=x)
        # The state is that of the first sequence; the others start from zeros.
        others = initial_states.new_zeros(len(cu_seqlens) - 2, *initial_states.shape[1:])
        initial_states = torch.cat([initial_states, others])  # (S, H, P, N)
    y, states = ssd(x, dt, A, B, C, *options, initial_states, chunk_size=chunk_size, cu_seqlens=cu_seqlens)
    # The row ends with its last sequence.
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
    dt_limit: tuple[float, float] = UNLIMITED,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The Mamba-2 mixer after its first projection, with the second where there is an `outproj_weight`.

    Args:
        zxbcdt: (B, L, 2 M + 2 H P + 2 G N + H): a gated MLP of width M, mostly 0, then z, x, B, C and dt.
        conv1d_weight: (H P + 2 G N, K).
        D: (H, P), or (H,) together with `headdim`.
        rmsnorm_weight: (H P,), gated norm of each group; without it the gate multiplies the scan's y.
        seq_idx, state_dtype: as in `mamba_chunk_scan_combined`.

    Returns:
        (B, L, M + H P), or its projection; with `return_final_states`, also the final states (B, H, P, N).

    Raises:
        ValueError: sizes do not fit.
    """
    check_tensor("zxbcdt", zxbcdt, ("B", "L", "2 M + 2 H P + 2 G N + H"))
    _check_state_dtype(state_dtype, zxbcdt)
    check_tensor("D", D, ("H", "P") if isinstance(D, Tensor) and D.dim() == 2 else ("H",), like=zxbcdt)
    check_tensor("conv1d_weight", conv1d_weight, ("H P + 2 G N", "K"), like=zxbcdt)
    if outproj_bias is not None and outproj_weight is None:
        raise ValueError("outproj_bias needs outproj_weight")
    heads, headdim = D.shape[0], _headdim(D, headdim)
    inner, channels = heads * headdim, conv1d_weight.shape[0]
    n = (channels - inner) // (2 * ngroups)
    mlp = zxbcdt.shape[-1] - inner - channels - heads
    if n < 1 or inner + 2 * ngroups * n != channels or mlp < 0 or mlp % 2:
        raise ValueError(
            f"zxbcdt of width {zxbcdt.shape[-1]} and conv1d_weight of {channels} channels do not fit {heads} heads of "
            f"headdim {headdim} in ngroups {ngroups}"
        )
    # (B, L, 2 M), (B, L, H P), (B, L, H P + 2 G N), (B, L, H)
    gated, z, before, dt = zxbcdt.split([mlp, inner, channels, heads], dim=-1)

    def convolve() -> Tensor:
        return causal_conv1d(before, conv1d_weight, conv1d_bias, check_activation(activation), seq_idx=seq_idx).y

    xBC = convolve()  # (B, L, H P + 2 G N)
    with recompute_in_backward((xBC, bind_backend(convolve))):
        x, B, C = xBC.split([inner, ngroups * n, ngroups * n], dim=-1)
        # The gated norm below takes z; without it, the scan does.
        y, final = ssd(
            x.unflatten(-1, (heads, headdim)), dt, A, B.unflatten(-1, (ngroups, n)), C.unflatten(-1, (ngroups, n)),
            D, z.unflatten(-1, (heads, headdim)) if rmsnorm_weight is None else None, dt_bias, True, dt_limit,
            initial_states, chunk_size=chunk_size, seq_idx=seq_idx,
        )  # fmt: skip
    y = y.flatten(-2)  # (B, L, H P)
    if rmsnorm_weight is not None:
        y = rmsnorm_fn(y, rmsnorm_weight, None, z, rmsnorm_eps, inner // ngroups, norm_before_gate)
    if mlp:
        gate, value = gated.chunk(2, dim=-1)
        y = torch.cat([F.silu(gate) * value, y], dim=-1)  # (B, L, M + H P)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)  # (B, L, width)
    return (y, final) if return_final_states else y


def mamba_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`mamba_chunk_scan_combined` with fewer arguments.

    Args:
        x, z: (B, L, H, P). dt: (B, L, H). A, dt_bias: (H,). B, C: (B, L, G, N). D: (H,) or (H, P).
        chunk_size, dt_softplus: as in `mamba_chunk_scan_combined`.

    Returns:
        (B, L, H, P).
    """
    return single(mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D, z, dt_bias, dt_softplus=dt_softplus))


def ssd_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = UNLIMITED,
) -> Tensor:
    """The scan of Mamba-2 by that of Mamba-1, whose channels need not share A and dt.

    Args:
        x, z: (B, L, H, P). B, C: (B, L, G, N).
        dt: (B, L, H), or (B, L, H, P). dt_bias: (H,), or (H, P). A: (H,), or (H P, N). D: (H,), or (H, P).
        dt_softplus, dt_limit: as in `ssm_kernels.ssd`.

    Returns:
        (B, L, H, P).
    """
    return _by_selective_scan(selective_scan_fn, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit)


def ssd_chunk_scan_combined_ref(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`mamba_chunk_scan_combined` step by step, in float32 at least.

    Args:
        x, z: (B, L, H, P). dt: (B, L, H). A, dt_bias: (H,). B, C: (B, L, G, N). D: (H,) or (H, P).
        chunk_size: no effect.
        dt_softplus: pass dt (after the bias) through softplus.

    Returns:
        (B, L, H, P).
    """
    return _by_selective_scan(selective_scan_ref, x, dt, A, B, C, D, z, dt_bias, dt_softplus, UNLIMITED)


def mamba_conv1d_scan_ref(
    xBC: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt: Tensor,
    A: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = UNLIMITED,
    activation: str | None = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
) -> Tensor:
    """Convolution and scan of the Mamba-2 mixer, step by step; `chunk_size` has no effect.

    Args:
        xBC: (B, L, H P + 2 G N).
        z: (B, L, H P).
        dt: (B, L, H). The others are as in `mamba_split_conv1d_scan_combined`.

    Returns:
        (B, L, H P).
    """
    heads = dt.shape[2]
    if z is not None:
        headdim = z.shape[-1] // heads
    elif D is not None and D.dim() == 2:
        headdim = D.shape[1]
    elif headdim is None:
        raise ValueError("headdim must not be None without z and without a D of shape (H, P)")
    inner = heads * headdim
    xBC = single(causal_conv1d_ref(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, activation=activation))
    xBC = xBC.transpose(1, 2)  # (B, L, H P + 2 G N)
    x, B, C = xBC.split([inner, *[(xBC.shape[-1] - inner) // 2] * 2], dim=-1)
    x, B, C = x.unflatten(-1, (heads, headdim)), B.unflatten(-1, (ngroups, -1)), C.unflatten(-1, (ngroups, -1))
    z = None if z is None else z.unflatten(-1, (heads, headdim))  # (B, L, H, P)
    y = _by_selective_scan(selective_scan_ref, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit)
    return y.flatten(-2)  # (B, L, H P)


def mamba_split_conv1d_scan_ref(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    dt_limit: tuple[float, float] = UNLIMITED,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor:
    """`mamba_split_conv1d_scan_combined` without a gated MLP, step by step.

    Args:
        zxbcdt: (B, L, 2 H P + 2 G N + H): z, x, B, C and dt.
        chunk_size: no effect. The others are as in `mamba_split_conv1d_scan_combined`.

    Returns:
        (B, L, H P), or its projection.
    """
    heads, headdim = D.shape[0], _headdim(D, headdim)
    z, xBC, dt = zxbcdt.split([heads * headdim, conv1d_weight.shape[0], heads], dim=-1)
    gate = z if rmsnorm_weight is None else None
    y = mamba_conv1d_scan_ref(
        xBC, conv1d_weight, conv1d_bias, dt, A, chunk_size, D, gate, dt_bias, True, dt_limit, activation, headdim,
        ngroups,
    )  # fmt: skip
    if rmsnorm_weight is not None:
        y = rms_norm_ref(y, rmsnorm_weight, None, z, rmsnorm_eps, y.shape[-1] // ngroups, norm_before_gate)
    return y if outproj_weight is None else F.linear(y, outproj_weight, outproj_bias)


def segsum(x: Tensor) -> Tensor:
    """Segment sums, (..., L) -> (..., L, L): entry (i, j) is x_{j+1} + ... + x_i, and -inf above the diagonal."""
    length = x.shape[-1]
    after = torch.ones(length, length, dtype=torch.bool, device=x.device).tril(-1)
    # Each segment is summed by itself: differences of one running sum would cancel.
    sums = x.unsqueeze(-1).expand(*x.shape, length).masked_fill(~after, 0).cumsum(-2)  # (..., L, L)
    return sums.masked_fill(~(after | torch.eye(length, dtype=torch.bool, device=x.device)), -torch.inf)


def ssd_minimal_discrete(
    X: Tensor, A: Tensor, B: Tensor, C: Tensor, block_len: int, initial_states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The scan of Mamba-2 on discretised inputs (arXiv 2405.21060, listing 1).

    Args:
        X: (B, L, H, P), multiplied by dt. A: (B, L, H), multiplied by dt. B, C: (B, L, H, N).
        block_len: a divisor of L. Results do not depend on it.
        initial_states: (B, 1, H, P, N).

    Returns:
        Y (B, L, H, P) and the final states (B, H, P, N), in the dtype of X.

    Raises:
        ValueError: `block_len` does not divide L.
    """
    check_divides("block_len", block_len, "L", X.shape[1])
    blocks = X.shape[1] // block_len
    X, B, C = (t.unflatten(1, (blocks, block_len)) for t in (X, B, C))  # (B, c, l, H, ...)
    decay = A.unflatten(1, (blocks, block_len)).permute(0, 3, 1, 2)  # (B, H, c, l)
    summed = decay.cumsum(-1)  # (B, H, c, l)
    # Outputs from inputs of the same block: the diagonal blocks of listing 1.
    within = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, segsum(decay).exp(), X)  # (B, c, l, H, P)
    arriving = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, (summed[..., -1:] - summed).exp(), X)  # (B, c, H, P, N)
    first = torch.zeros_like(arriving[:, :1]) if initial_states is None else initial_states  # (B, 1, H, P, N)
    # States passed from block to block.
    between = segsum(F.pad(summed[..., -1], (1, 0))).exp()  # (B, H, c + 1, c + 1)
    states = torch.einsum("bhzc,bchpn->bzhpn", between, torch.cat([first, arriving], 1))  # (B, c + 1, H, P, N)
    # Outputs from the state before each block.
    before = torch.einsum("bclhn,bchpn,bhcl->bclhp", C, states[:, :-1], summed.exp())  # (B, c, l, H, P)
    return (within + before).flatten(1, 2), states[:, -1]


def _by_selective_scan(scan, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit) -> Tensor:
    """Run the scan of Mamba-2 as one of Mamba-1 over H P channels."""
    heads, headdim, n = *x.shape[2:], B.shape[-1]
    compute = torch.promote_types(x.dtype, torch.float32)

    def per_channel(t: Tensor, dims: int) -> Tensor:
        """Expand (..., H), of `dims` dimensions, or flatten (..., H, P), to (..., H P)."""
        return (t.unsqueeze(-1).expand(*t.shape, headdim) if t.dim() == dims else t).flatten(-2)

    step = per_channel(dt, 3).to(compute)  # (B, L, H P)
    if dt_bias is not None:
        step = step + per_channel(dt_bias, 1).to(compute)
    step = F.softplus(step) if dt_softplus else step
    step = step.clamp(*dt_limit)
    A = per_channel(A, 1).unsqueeze(-1).expand(-1, n) if A.dim() == 1 else A  # (H P, N)
    D = None if D is None else per_channel(D, 1)
    x_flat, z = x.flatten(2).transpose(1, 2), None if z is None else z.flatten(2).transpose(1, 2)
    B, C = (m.movedim(1, -1) for m in (B, C))  # (B, G, N, L)
    y = scan(x_flat, step.transpose(1, 2), A.to(compute), B, C, D, z)  # (B, H P, L)
    return y.transpose(1, 2).unflatten(-1, (heads, headdim))  # (B, L, H, P)


def _headdim(D: Tensor, headdim: int | None) -> int:
    """Return P: of D (H, P), or as passed where D is (H,)."""
    if D.dim() == 2:
        return D.shape[1]
    if headdim is None:
        raise ValueError("headdim must not be None where D has shape (H,)")
    return headdim


def _check_state_dtype(state_dtype: torch.dtype | None, x: Tensor) -> None:
    if state_dtype is None:
        return
    if not isinstance(state_dtype, torch.dtype) or not state_dtype.is_floating_point:
        raise TypeError(f"state_dtype must be a floating-point dtype or None, got {state_dtype!r}")
    states = torch.promote_types(x.dtype, torch.float32)
    if torch.finfo(state_dtype).bits > torch.finfo(states).bits:
        raise NotImplementedError(f"state_dtype must be {states} at most where x is {x.dtype}, got {state_dtype}")

"""`mamba_ssm.ops.triton.selective_state_update`: one step of either scan.

Letters: B batch, D channels, N state, H heads, P head dimension, G groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core.slots import StateSlots
from ..._core.validation import check_tensor
from ...selective_scan import selective_scan_step
from ...ssd import ssd_step
from ._shared import _rows


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
    """Advance either scan by one step, and update `state` in place. No gradients.

    Args:
        state: (B, D, N), or (B, H, P, N); of any floating-point dtype.
        x, dt, z: (B, D), or (B, H, P). A: (D, N), or (H, P, N). D, dt_bias: (D,), or (H, P).
        B, C: (B, N), or (B, G, N).
        dt_softplus: pass dt (after the bias) through softplus.
        state_batch_indices: (B,) rows of `state`, which may then have more of them. A negative one is padding: y is 0
            there and no state is changed.

    Returns:
        y, of the shape of x.
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
    B, C = (m.unsqueeze(1) if m.dim() == 2 else m for m in (B, C))  # (B, G, N)
    # A head's channels share A and dt where these were expanded from (H,): Mamba-2.
    tied = heads and all(t is None or t.stride(-1) == 0 for t in (A, dt, dt_bias)) and A.stride(1) == 0
    slots = None if state_batch_indices is None else StateSlots(state_batch_indices)
    if tied:
        bias = None if dt_bias is None else dt_bias[:, 0]  # (H,)
        return ssd_step(state, x, dt[..., 0], A[:, 0, 0], B, C, D, z, bias, bool(dt_softplus), slots=slots)
    dt, z = dt.flatten(1), None if z is None else z.flatten(1)  # (B, H P)
    A = A.reshape(-1, A.shape[-1])  # (H P, N)
    D, dt_bias = (t if t is None else t.flatten() for t in (D, dt_bias))
    pool = state.flatten(1, -2)  # (rows, H P, N)
    y = selective_scan_step(pool, x.flatten(1), dt, A, B, C, D, z, dt_bias, bool(dt_softplus), slots=slots)
    if pool.data_ptr() != state.data_ptr():  # of strides that no view has
        state.copy_(pool.view(state.shape))
    return y.view(x.shape)


def selective_state_update_ref(
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
) -> Tensor:
    """`selective_state_update` as the equation reads, in float32 at least. `state` is updated in place.

    Args:
        state: (B, D, N), or (B, H, P, N).
        x, dt, z: (B, D), or (B, H, P). A: (D, N), or (H, P, N). D, dt_bias: (D,), or (H, P).
        B, C: (B, N), or (B, G, N).
        dt_softplus: pass dt (after the bias) through softplus.

    Returns:
        y, of the shape of x.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    groups, channels = (1 if B.dim() == 2 else B.shape[1]), x[0].numel()
    B, C = (m.view(len(x), groups, -1).repeat_interleave(channels // groups, 1) for m in (B, C))
    B, C = (m.view(state.shape).to(compute) for m in (B, C))  # (B, D, N) or (B, H, P, N)
    step = dt.to(compute) if dt_bias is None else dt.to(compute) + dt_bias.to(compute)
    step = F.softplus(step) if dt_softplus else step
    # h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t
    new = torch.exp(step.unsqueeze(-1) * A.to(compute)) * state.to(compute)
    new = new + (step * x).unsqueeze(-1) * B
    state.copy_(new)
    y = (new * C).sum(-1)  # (B, D) or (B, H, P)
    y = y if D is None else y + D.to(compute) * x
    return (y if z is None else y * F.silu(z.to(compute))).to(x.dtype)

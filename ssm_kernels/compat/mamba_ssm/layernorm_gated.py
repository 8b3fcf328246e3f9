"""`mamba_ssm.ops.triton.layernorm_gated`: norms with a gate. x, z: (..., D); weight, bias: (D,)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._core.validation import check_divides, check_tensor
from ...norm import rms_norm


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """Layer norm, or RMS norm with `is_rms_norm`, of each run of `group_size` channels, gated by `silu(z)`.

    Computed in float32 at least.

    Args:
        x, z: (..., D).
        weight, bias: (D,).
        eps: added to the variance, or to the mean square.
        group_size: channels that are normalized together, a divisor of D; None is D.
        norm_before_gate: the gate multiplies the result, rather than x.
        is_rms_norm: RMS norm rather than layer norm.

    Returns:
        (..., D) in the dtype of x.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    if is_rms_norm:
        return rmsnorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate)
    check_tensor("x", x, tuple(x.shape) if isinstance(x, Tensor) else ("...", "D"))
    width = x.shape[-1]
    for name, tensor, shape in (("weight", weight, (width,)), ("bias", bias, (width,)), ("z", z, tuple(x.shape))):
        if tensor is not None or name == "weight":
            check_tensor(name, tensor, shape, like=x)
    group_size = width if group_size is None else group_size
    check_divides("group_size", group_size, "D", width)
    compute = torch.promote_types(x.dtype, torch.float32)
    gate = None if z is None else F.silu(z.to(compute))
    wide = x.to(compute) if gate is None or norm_before_gate else x.to(compute) * gate
    normal = F.layer_norm(wide.unflatten(-1, (-1, group_size)), (group_size,), eps=eps).flatten(-2)  # (..., D)
    y = normal * weight.to(compute)
    y = y if bias is None else y + bias.to(compute)
    return (y * gate if gate is not None and norm_before_gate else y).to(x.dtype)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """RMS norm with a gate: `layernorm_fn` with `is_rms_norm`.

    Args:
        x, z: (..., D). weight, bias: (D,).
        eps, group_size, norm_before_gate: as in `layernorm_fn`.

    Returns:
        (..., D) in the dtype of x.
    """
    if bias is None:
        return rms_norm(x, weight, z=z, eps=eps, group_size=group_size, norm_before_gate=norm_before_gate)
    # The op has no bias. A gate after the norm multiplies the bias too, so that it is applied here.
    check_tensor("bias", bias, (x.shape[-1],), like=x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = rms_norm(wide, weight, z=None if norm_before_gate else z, eps=eps, group_size=group_size) + bias
    if z is not None and norm_before_gate:
        check_tensor("z", z, tuple(x.shape), like=x)
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    upcast: bool = True,
) -> Tensor:
    """`rmsnorm_fn` as the equation reads.

    Args:
        x, z: (..., D). weight, bias: (D,).
        eps, group_size, norm_before_gate: as in `layernorm_fn`.
        upcast: compute in float32 at least, rather than in the dtype of x.

    Returns:
        (..., D) in the dtype of x.
    """
    compute = torch.promote_types(x.dtype, torch.float32) if upcast else x.dtype
    wide, gate = x.to(compute), None if z is None else F.silu(z.to(compute))
    # The gate first: norm(x silu(z)); or last: norm(x) silu(z).
    wide = wide if gate is None or norm_before_gate else wide * gate
    groups = wide.unflatten(-1, (-1, group_size or x.shape[-1]))  # (..., D / group_size, group_size)
    # arXiv 1910.07467, equation 4, in each group
    normal = groups / torch.sqrt(groups.square().mean(-1, keepdim=True) + eps)
    y = normal.flatten(-2) * weight.to(compute)  # (..., D)
    y = y if bias is None else y + bias.to(compute)
    return (y * gate if gate is not None and norm_before_gate else y).to(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm with a gate.

    Args:
        hidden_size: width D.
        eps, group_size, norm_before_gate: as in `layernorm_fn`.
        device, dtype: of the parameters `weight` and `bias`.
    """

    is_rms_norm = False

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        bias = None if self.is_rms_norm else nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weights to one and biases to zero."""
        nn.init.ones_(self.weight)
        if isinstance(self.bias, Tensor):
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalize x (..., D), gated by z of the same shape."""
        bias = self.bias if isinstance(self.bias, Tensor) else None
        options = (self.eps, self.group_size, self.norm_before_gate, self.is_rms_norm)
        return layernorm_fn(x, self.weight, bias, z, *options)


class RMSNorm(LayerNorm):
    """RMS norm with a gate, without a bias. Arguments as of `LayerNorm`."""

    is_rms_norm = True

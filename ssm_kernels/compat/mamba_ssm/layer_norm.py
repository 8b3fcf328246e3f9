"""`mamba_ssm.ops.triton.layer_norm`: the residual sum and its norm in one function.

`layernorm`, the module of this name up to `mamba_ssm` 1.2, has the same functions with fewer arguments:
`layer_norm_fn_v1` and `rms_norm_fn_v1` here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._core.validation import check_tensor
from ...norm import add_rms_norm, rms_norm
from ._shared import pair


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
    """Add to the residual stream and normalize, as a Mamba block does before its mixer.

    The sum is `dropout(x * rowscale) + dropout(x1) + residual`.

    Args:
        x, x1, residual: (..., D).
        weight, bias, weight1, bias1: (D,); the second pair normalizes the same sum once more.
        eps: added to the variance, or to the mean square.
        dropout_p: probability of dropping an element of x and of x1.
        rowscale: (...,); not together with `x1`.
        prenorm: return the sum too.
        residual_in_fp32: keep the sum in float32 where there is no `residual`, whose dtype it takes otherwise.
        is_rms_norm: RMS norm rather than layer norm.
        return_dropout_mask: return the masks of x and x1 too (true where not dropped; None without dropout).

    Returns:
        y, or a tuple of y, the second y if `weight1`, the sum if `prenorm`, both masks if `return_dropout_mask`.

    Raises:
        ValueError: arguments exclude each other, or a shape does not fit.
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
        raise ValueError("rowscale excludes x1; got both")
    if bias1 is not None and weight1 is None:
        raise ValueError("bias1 needs weight1")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and less than 1, got {dropout_p!r}")
    compute = torch.promote_types(x.dtype, torch.float32)
    added, mask, mask1 = x, None, None
    if rowscale is not None:
        added = added.to(compute) * rowscale.to(compute).unsqueeze(-1)  # (..., D) * (..., 1)
    if dropout_p > 0:
        # What remains is divided by its probability, so that the expectation does not change.
        mask = torch.rand(x.shape, device=x.device) > dropout_p
        mask1 = None if x1 is None else torch.rand(x1.shape, device=x1.device) > dropout_p
        added = added.to(compute) * mask / (1 - dropout_p)
    if x1 is not None:
        other = x1.to(compute) if mask1 is None else x1.to(compute) * mask1 / (1 - dropout_p)
        added = added.to(compute) + other
    # From block to block, the stream does not change its dtype.
    stream = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    if is_rms_norm:
        y, total = add_rms_norm(added, weight, residual, eps=eps, residual_dtype=stream)  # (..., D) each
    else:
        total = (added if residual is None else added + residual).to(stream)
        # The bias is added below, as for RMS norm, whose op has none.
        y = F.layer_norm(total.to(compute), width, weight.to(compute), None, eps)
    outputs: list[Tensor | None] = [(y if bias is None else y + bias).to(x.dtype)]
    if weight1 is not None:
        # The second norm of parallel blocks, on the same sum.
        wide = total.to(compute)
        y1 = (
            rms_norm(wide, weight1, eps=eps)
            if is_rms_norm
            else F.layer_norm(wide, width, weight1.to(compute), None, eps)
        )
        outputs.append((y1 if bias1 is None else y1 + bias1).to(x.dtype))
    # The original's order: y, the second y, the sum, the masks.
    if prenorm:
        outputs.append(total)
    if return_dropout_mask:
        outputs += [mask, mask1]
    first, *others = outputs
    assert first is not None
    return (first, *others) if others else first


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
    """`layer_norm_fn` with `is_rms_norm`.

    Args:
        x, x1, residual: (..., D). weight, bias, weight1, bias1: (D,). rowscale: (...,).
        eps, dropout_p, prenorm, residual_in_fp32, return_dropout_mask: as in `layer_norm_fn`.

    Returns:
        as `layer_norm_fn`: y (..., D), or a tuple that starts with it.
    """
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32, True,
        return_dropout_mask,
    )  # fmt: skip


def layer_norm_fn_v1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor | None, ...]:
    """`layer_norm_fn` with the arguments of `mamba_ssm` 1.0 to 1.2."""
    return layer_norm_fn(
        x, weight, bias, residual, eps=eps, prenorm=prenorm, residual_in_fp32=residual_in_fp32, is_rms_norm=is_rms_norm
    )


def rms_norm_fn_v1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor | None, ...]:
    """`rms_norm_fn` with the arguments of `mamba_ssm` 1.0 to 1.2."""
    return layer_norm_fn_v1(x, weight, bias, residual, eps, prenorm, residual_in_fp32, True)


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`layer_norm_fn` and a linear layer after it.

    Args:
        x, residual: (..., D).
        norm_weight, norm_bias: (D,).
        linear_weight: (width, D). linear_bias: (width,).
        eps, prenorm, residual_in_fp32, is_rms_norm: as in `layer_norm_fn`.

    Returns:
        (..., width); with `prenorm`, also the sum (..., D).
    """
    y, total = pair(
        layer_norm_fn(
            x, norm_weight, norm_bias, residual, eps=eps, prenorm=True, residual_in_fp32=residual_in_fp32,
            is_rms_norm=is_rms_norm,
        )
    )  # fmt: skip
    bias = None if linear_bias is None else linear_bias.to(y.dtype)
    out = F.linear(y, linear_weight.to(y.dtype), bias)  # (..., width)
    return (out, total) if prenorm else out


def layer_norm_ref(
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
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`layer_norm_fn` as the equations read.

    Args:
        x, x1, residual: (..., D). weight, bias, weight1, bias1: (D,). rowscale: (...,).
        eps, dropout_p, prenorm: as in `layer_norm_fn`.
        dropout_mask, dropout_mask1: (..., D), true where x and x1 are not dropped; drawn here where None.
        upcast: compute in float32 at least, rather than in the dtype of x.

    Returns:
        y (..., D), or a tuple of y, the second y if `weight1`, the sum if `prenorm`.
    """
    return _norm_ref(
        False, x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, dropout_mask,
        dropout_mask1, upcast,
    )  # fmt: skip


def rms_norm_ref(
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
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`layer_norm_ref` without the mean: RMS norm.

    Args:
        x, x1, residual: (..., D). weight, bias, weight1, bias1: (D,). rowscale: (...,).
        eps, dropout_p, prenorm, dropout_mask, dropout_mask1, upcast: as in `layer_norm_ref`.

    Returns:
        as `layer_norm_ref`: y (..., D), or a tuple that starts with it.
    """
    return _norm_ref(
        True, x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, dropout_mask,
        dropout_mask1, upcast,
    )  # fmt: skip


def _norm_ref(
    is_rms_norm, x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, mask, mask1, upcast
) -> Tensor | tuple[Tensor, ...]:
    compute = torch.promote_types(x.dtype, torch.float32) if upcast else x.dtype

    def dropped(t: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return F.dropout(t, dropout_p)
        return t * mask / (1 - dropout_p)

    total = x.to(compute) if rowscale is None else x.to(compute) * rowscale.to(compute).unsqueeze(-1)
    total = dropped(total, mask)  # (..., D)
    if x1 is not None:
        total = total + dropped(x1.to(compute), mask1)
    total = total if residual is None else total + residual.to(compute)
    # Layer norm: y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias (arXiv 1607.06450).
    # RMS norm leaves the mean out (arXiv 1910.07467, equation 4).
    centered = total if is_rms_norm else total - total.mean(-1, keepdim=True)
    normal = centered / torch.sqrt(centered.square().mean(-1, keepdim=True) + eps)  # (..., D) / (..., 1)
    outputs = []
    for scale, shift in ((weight, bias), (weight1, bias1)):
        if scale is not None:
            y = normal * scale.to(compute)
            outputs.append((y if shift is None else y + shift.to(compute)).to(x.dtype))
    if prenorm:
        outputs.append(total)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


class RMSNorm(nn.Module):
    """RMS norm of the residual sum.

    Args:
        hidden_size: width D.
        eps: added to the mean square.
        dropout_p: dropout of the input, before it is added to the residual; in training.
        device, dtype: of the parameter `weight`.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weights to one."""
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Tensor | tuple[Tensor | None, ...]:
        """Normalize the sum of x and the residual.

        Args:
            x, residual: (..., D).
            prenorm, residual_in_fp32: as in `layer_norm_fn`.

        Returns:
            y (..., D); with `prenorm`, also the sum (..., D).
        """
        bias = self.bias if isinstance(self.bias, Tensor) else None
        return rms_norm_fn(
            x, self.weight, bias, residual, eps=self.eps, prenorm=prenorm, residual_in_fp32=residual_in_fp32,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
        )  # fmt: skip

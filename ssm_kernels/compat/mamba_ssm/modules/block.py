"""`mamba_ssm.modules.block`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ....modules import is_plain
from .._shared import pair
from ..layer_norm import RMSNorm, layer_norm_fn


class Block(nn.Module):
    """`mamba_ssm.modules.block.Block`: add to the residual stream, normalize, mix; and again with an MLP.

    With an MLP and without `fused_add_norm`, the original replaces the stream by the normalized sum; here both settings
    compute the same.

    Args:
        dim: width D of the residual stream.
        mixer_cls, mlp_cls, norm_cls: construct the parts from D. `nn.Identity` for the MLP is none (also for release 1,
            which has no such argument).
        fused_add_norm: add and normalize in one op.
        residual_in_fp32: keep the stream in float32.

    Raises:
        ValueError: `fused_add_norm` with a norm that has no fused op.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module] = nn.Identity,
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ):
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm, self.mixer, self.mlp = norm_cls(dim), mixer_cls(dim), None
        # Without an MLP the parameters have the names of release 1, which has no `norm2`.
        if mlp_cls is not nn.Identity:
            self.norm2, self.mlp = norm_cls(dim), mlp_cls(dim)
        if fused_add_norm and not isinstance(self.norm, (nn.LayerNorm, RMSNorm)):
            raise ValueError(f"fused_add_norm needs a LayerNorm or RMSNorm, got {type(self.norm).__name__}")

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: object = None,
        **mixer_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Run the block.

        Args:
            hidden_states: (B, L, D), not yet added to the stream.
            residual: (B, L, D) stream, or None before the first block.
            inference_params, mixer_kwargs: for the mixer.

        Returns:
            the output of the last part and the stream, to which it is not yet added.
        """
        hidden_states, residual = add_norm(
            self.norm, hidden_states, residual, self.residual_in_fp32, self.fused_add_norm
        )
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = add_norm(
                self.norm2, hidden_states, residual, self.residual_in_fp32, self.fused_add_norm
            )
            hidden_states = self.mlp(hidden_states)
        # The next block adds the output in one op with its norm.
        return hidden_states, residual

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the mixer's caches.

        Args:
            batch_size, max_seqlen, dtype, kwargs: for the mixer.
        """
        allocate: Callable[..., tuple[Tensor, Tensor | None]] = self.mixer.allocate_inference_cache  # pyright: ignore[reportAssignmentType]
        return allocate(batch_size, max_seqlen, dtype=dtype, **kwargs)


def add_norm(
    norm: nn.Module, hidden: Tensor, residual: Tensor | None, residual_in_fp32: bool, fused: bool
) -> tuple[Tensor, Tensor]:
    """Add (..., D) to the residual stream, and normalize.

    A norm that has been replaced, or has hooks, is called, whatever `fused` is.

    Args:
        norm: a LayerNorm, an RMSNorm, or what replaces it.
        hidden: (..., D).
        residual: (..., D) stream, or None before the first addition.
        residual_in_fp32: return the stream in float32.
        fused: add and normalize in one op.

    Returns:
        the normalized sum, and the sum.
    """
    if fused and isinstance(norm, (nn.LayerNorm, RMSNorm)) and is_plain(norm, _kind(norm)):
        # float32 at least: the stream of a float64 model is not rounded.
        in_fp32 = residual_in_fp32 and hidden.dtype != torch.float64
        bias = norm.bias
        assert bias is None or isinstance(bias, Tensor)
        out = layer_norm_fn(
            hidden, norm.weight, bias, residual, eps=norm.eps, prenorm=True, residual_in_fp32=in_fp32,
            is_rms_norm=isinstance(norm, RMSNorm),
        )  # fmt: skip
        return pair(out)
    total = hidden if residual is None else hidden + residual
    weight = norm.weight
    assert isinstance(weight, Tensor)
    # The stream may be wider than the norm's weight.
    y = norm(total.to(weight.dtype))
    return y, total.to(torch.promote_types(total.dtype, torch.float32)) if residual_in_fp32 else total


def _kind(norm: nn.LayerNorm | RMSNorm) -> type[nn.Module]:
    return RMSNorm if isinstance(norm, RMSNorm) else nn.LayerNorm

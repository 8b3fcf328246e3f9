"""`mamba_ssm.modules.mha`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....causal_conv1d import causal_conv1d
from ....modules import conv_weight
from ..causal_conv1d import causal_conv1d_update
from .inference import InferenceParams


class MHA(nn.Module):
    """`mamba_ssm.modules.mha.MHA`: self-attention with rotary embeddings, grouped keys and values, and a convolution.

    Args:
        embed_dim: width D of the input and the output.
        num_heads: heads of the queries.
        num_heads_kv: heads of keys and values, a divisor of `num_heads`; as many by default.
        head_dim: P; D / num_heads by default.
        mlp_dim: width of a gated MLP beside the attention, (up, gate) together, rounded up to 256s; 0 is none.
        qkv_proj_bias, out_proj_bias: the projection has a bias.
        softmax_scale: P**-0.5 by default.
        causal: no query attends to a later key.
        layer_idx: key of this layer's caches.
        d_conv: K of a causal convolution over queries, keys and values; 0 is none.
        rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved: rotary embedding (arXiv 2104.09864) of so many channels
            of a head; pairs are neighbours if interleaved, else halves apart. 0 is none.
        device, dtype: of the parameters.

    The original caches the outputs of the convolution; here its inputs are cached, so that decoding computes the same
    as a pass over the complete sequence.

    Raises:
        ValueError: sizes do not fit; the message names the argument.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        mlp_dim: int = 0,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        d_conv: int = 0,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_interleaved: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.embed_dim, self.layer_idx, self.d_conv = embed_dim, layer_idx, d_conv
        self.softmax_scale, self.causal = softmax_scale, causal
        self.num_heads = num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if num_heads % self.num_heads_kv:
            raise ValueError(f"num_heads_kv must divide num_heads = {num_heads}, got {num_heads_kv}")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim = {embed_dim} where head_dim is None, got {num_heads}")
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        if rotary_emb_dim % 2 or not 0 <= rotary_emb_dim <= self.head_dim:
            raise ValueError(
                f"rotary_emb_dim must be even and at most head_dim = {self.head_dim}, got {rotary_emb_dim}"
            )
        self.rotary_emb_dim, self.rotary_emb_base = rotary_emb_dim, rotary_emb_base
        self.rotary_emb_interleaved = rotary_emb_interleaved
        self.mlp_dim = math.ceil(mlp_dim / 256) * 256
        qkv_dim = self.head_dim * (num_heads + 2 * self.num_heads_kv)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(embed_dim, qkv_dim + self.mlp_dim, bias=qkv_proj_bias, **like)
        if d_conv > 0:
            self.conv1d = nn.Conv1d(qkv_dim, qkv_dim, d_conv, padding=d_conv - 1, groups=qkv_dim, **like)
        self.out_proj = nn.Linear(self.head_dim * num_heads + self.mlp_dim // 2, embed_dim, bias=out_proj_bias, **like)

    def forward(self, x: Tensor, inference_params: InferenceParams | None = None) -> Tensor:
        """Attend over a sequence, or over the cached tokens and the new ones.

        Args:
            x: (B, L, D).
            inference_params: run a prompt where its `seqlen_offset` is 0, else later tokens.

        Returns:
            (B, L, D).

        Raises:
            ValueError: without a `layer_idx`, beyond `max_seqlen`, or several tokens after a prompt with `d_conv`.
        """
        batch, length, _ = x.shape
        kv_cache, conv_cache, offset = None, None, 0
        if inference_params is not None:
            kv_cache, conv_cache, offset = self._get_caches(x, inference_params)
        projected = self.in_proj(x)  # (B, L, (heads + 2 kv heads) P + mlp_dim)
        qkv, mlp = projected.split([projected.shape[-1] - self.mlp_dim, self.mlp_dim], dim=-1)
        if self.d_conv > 0:
            qkv = self._convolve(qkv, conv_cache, inference_params)
        heads = [self.num_heads, self.num_heads_kv, self.num_heads_kv]
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split(heads, dim=2)  # (B, L, heads, P)
        positions = torch.arange(length, device=x.device) + (
            offset.unsqueeze(1) if isinstance(offset, Tensor) else offset
        )  # (L,) or (B, L)
        if self.rotary_emb_dim:
            q, k = (self._rotate(t, positions) for t in (q, k))
        mask = None
        if inference_params is not None and kv_cache is not None:
            k, v, mask = self._update_cache(kv_cache, k, v, positions, inference_params)
        repeats = self.num_heads // self.num_heads_kv
        context = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.repeat_interleave(repeats, 2).transpose(1, 2),
            v.repeat_interleave(repeats, 2).transpose(1, 2),
            attn_mask=mask,
            is_causal=self.causal and inference_params is None,
            scale=self.softmax_scale,
        )  # (B, H, L, P)
        context = context.transpose(1, 2).flatten(2)  # (B, L, H P)
        if self.mlp_dim:
            up, gate = mlp.chunk(2, dim=-1)
            context = torch.cat([context, up * F.silu(gate)], dim=-1)  # (B, L, H P + mlp_dim / 2)
        return self.out_proj(context)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return empty caches.

        Args:
            batch_size, max_seqlen: sequences, and tokens of each, that fit.
            dtype: of the caches; that of the parameters by default.

        Returns:
            zeros: keys and values (B, max_seqlen, 2, heads, P); inputs of the convolution (B, channels, K), or None.
        """
        like = next(self.out_proj.parameters())
        shape = (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
        conv = like.new_zeros(batch_size, self.conv1d.in_channels, self.d_conv, dtype=dtype) if self.d_conv else None
        return like.new_zeros(shape, dtype=dtype), conv

    def _get_caches(self, x: Tensor, inference_params: InferenceParams) -> tuple[Tensor, Tensor | None, Tensor | int]:
        """Return this layer's rows of the two caches, and the tokens before x: one number, or (B,)."""
        if self.layer_idx is None:
            raise ValueError("MHA needs a layer_idx for inference_params, got None")
        first, caches = inference_params.batch_size_offset, inference_params.key_value_memory_dict
        if self.layer_idx not in caches:
            size = max(inference_params.max_batch_size, first + x.shape[0])
            caches[self.layer_idx] = self.allocate_inference_cache(size, inference_params.max_seqlen, x.dtype)
        rows = slice(first, first + x.shape[0])
        kv, conv = caches[self.layer_idx]
        lengths = inference_params.lengths_per_sample
        if lengths is None or inference_params.seqlen_offset == 0:
            offset, end = inference_params.seqlen_offset, inference_params.seqlen_offset + x.shape[1]
            if end > kv.shape[1]:
                raise ValueError(f"max_seqlen of inference_params must be at least {end}, got a cache of {kv.shape[1]}")
        else:
            offset = lengths[rows]
        return kv[rows], None if conv is None else conv[rows], offset

    def _convolve(self, qkv: Tensor, conv_state: Tensor | None, inference_params: InferenceParams | None) -> Tensor:
        """Convolve (B, L, channels) over time, and update `conv_state` in place."""
        weight, bias = conv_weight("conv1d", self.conv1d)
        if conv_state is not None and inference_params is not None and inference_params.seqlen_offset > 0:
            if qkv.shape[1] != 1:
                raise ValueError(f"after the prompt MHA with d_conv takes one token at a time, got {qkv.shape[1]}")
            return causal_conv1d_update(qkv.squeeze(1), conv_state, weight, bias).unsqueeze(1)
        if conv_state is not None:
            conv_state.copy_(F.pad(qkv.detach().transpose(1, 2), (self.d_conv - qkv.shape[1], 0)))
        return causal_conv1d(qkv, weight, bias).y

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate pairs of channels of (B, L, heads, P) by angles in proportion to the position."""
        size, compute = self.rotary_emb_dim, torch.promote_types(x.dtype, torch.float32)
        exponents = torch.arange(0, size, 2, device=x.device, dtype=compute) / size  # (size / 2,)
        angles = positions.to(compute).unsqueeze(-1) / self.rotary_emb_base**exponents  # (..., L, size / 2)
        cos, sin = angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)  # (..., L, 1, size / 2) each
        rotated, rest = x[..., :size].to(compute), x[..., size:]
        a, b = rotated.unflatten(-1, (-1, 2)).unbind(-1) if self.rotary_emb_interleaved else rotated.chunk(2, dim=-1)
        # arXiv 2104.09864, equation 34
        pair = (a * cos - b * sin, a * sin + b * cos)
        rotated = torch.stack(pair, -1).flatten(-2) if self.rotary_emb_interleaved else torch.cat(pair, -1)
        return torch.cat([rotated.to(x.dtype), rest], -1)

    def _update_cache(
        self, kv_cache: Tensor, k: Tensor, v: Tensor, positions: Tensor, inference_params: InferenceParams
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write keys and values into the cache.

        Args:
            kv_cache: (B, max_seqlen, 2, heads, P), written in place.
            k, v: (B, L, heads, P).
            positions: (L,) or (B, L).
            inference_params: position of the batch.

        Returns:
            keys and values so far, (B, end, heads, P), and the mask of those that each query attends to.
        """
        kv = torch.stack([k, v], 2).to(kv_cache.dtype)  # (B, L, 2, heads, P)
        if positions.dim() == 1:
            start, end = inference_params.seqlen_offset, inference_params.seqlen_offset + k.shape[1]
            kv_cache[:, start:end] = kv
        else:  # each sequence at its own position; no size depends on it, for CUDA graphs
            kv_cache[torch.arange(len(kv), device=kv.device).unsqueeze(1), positions] = kv
            end = kv_cache.shape[1]
        keys, values = kv_cache[:, :end].to(k.dtype).unbind(2)  # (B, end, heads, P) each
        last = positions if self.causal else positions[..., -1:].expand_as(positions)
        mask = torch.arange(end, device=k.device) <= last.unsqueeze(-1)  # (L, end) or (B, L, end)
        return keys, values, mask if mask.dim() == 2 else mask.unsqueeze(1)  # (L, end) or (B, 1, L, end)

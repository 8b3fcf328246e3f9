"""The modules of `mamba_ssm`: constructor arguments, parameters' names and shapes, caches for decoding.

`A_log` and `D` are float32 at least, whatever `dtype` is (the original's Mamba-2 casts `A_log`); `.to(dtype)` casts
them, as it does there. What differs from the originals is said where it does; all else is as there.

Letters: B batch, L length, D model width, E inner width, N state, H heads, P head dimension, G groups, K convolution
width, S sequences in a pack.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import modules
from ..._core.validation import check_tensor
from ...causal_conv1d import causal_conv1d
from ...modules import MixerState, conv_weight, is_plain
from ...ssd import ssd_step
from ._shared import INDICES, UNLIMITED, check_activation
from .causal_conv1d import causal_conv1d_update, causal_conv1d_varlen_states
from .layer_norm import RMSNorm, layer_norm_fn
from .state_update import selective_state_update

_IN_FLOAT32 = ("A_log", "D")


@dataclass
class InferenceParams:
    """Where a batch stands in decoding, and the caches of its layers, by layer index."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    """Tokens that all sequences have behind them; 0 is a prompt, which the caches begin with."""
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None
    """(B,) the same as `seqlen_offset`, for each sequence and on the device."""

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begin anew in the same memory."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


class _Caches:
    """The two caches of a mixer: `conv_state`, its last K inputs (B, channels, K), and `ssm_state`."""

    layer_idx: int | None

    def _get_states_from_cache(
        self, inference_params: InferenceParams, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The caches of this layer, made on first use; `initialize_states` zeroes them.

        Raises:
            ValueError: the layer has no `layer_idx`, or the caches are of another batch size.
        """
        if self.layer_idx is None:
            raise ValueError(f"{type(self).__name__} needs a layer_idx for inference_params, got None")
        caches = inference_params.key_value_memory_dict
        if self.layer_idx not in caches:
            caches[self.layer_idx] = self.allocate_inference_cache(batch_size, inference_params.max_seqlen)
        elif initialize_states:
            for cache in caches[self.layer_idx]:
                cache.zero_()
        conv_state, ssm_state = caches[self.layer_idx]
        if len(conv_state) != batch_size:
            raise ValueError(
                f"inference_params holds caches of layer {self.layer_idx} for {len(conv_state)} sequences, got "
                f"{batch_size}"
            )
        return conv_state, ssm_state

    def _prefill(
        self, projected: Tensor, inputs: Tensor, caches: tuple[Tensor, Tensor], cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Run a prompt (or packed ones) from the beginning and fill the caches. `inputs`: of the convolution."""
        conv_state, ssm_state = caches
        state = self.new_state(len(conv_state))
        out = self.mix(projected, state, cu_seqlens)
        width, inputs = conv_state.shape[2], inputs.detach()
        if cu_seqlens is None:  # zeros before a shorter prompt, else the last ones
            last = F.pad(inputs.transpose(1, 2), (width - inputs.shape[1], 0))  # (B, channels, K)
        else:
            last = causal_conv1d_varlen_states(inputs.squeeze(0), cu_seqlens, width)  # (S, channels, K)
        conv_state.copy_(last)
        ssm_state.copy_(state.ssm)
        return out


class Mamba(_Caches, modules.Mamba):
    """`mamba_ssm.Mamba`.

    Args:
        d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init_floor, conv_bias, bias: as in
            `ssm_kernels.modules.Mamba`.
        dt_init, dt_scale: `dt_proj.weight` is `dt_scale * dt_rank**-0.5`, or uniform between minus that and that.
        use_fast_path: compute the convolution and the step sizes again in the backward rather than keep them.
        layer_idx: key of this layer's caches.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if dt_init not in ("random", "constant"):
            raise ValueError(f"dt_init must be 'random' or 'constant', got {dt_init!r}")
        with _on(device):
            super().__init__(
                d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init_floor, conv_bias, bias, use_fast_path
            )  # fmt: skip
            scale = self.dt_rank**-0.5 * dt_scale
            if dt_init == "constant":
                nn.init.constant_(self.dt_proj.weight, scale)
            else:
                nn.init.uniform_(self.dt_proj.weight, -scale, scale)
        self.layer_idx = layer_idx
        self.activation, self.act = "silu", nn.SiLU()
        _cast(self, dtype)

    @property
    def use_fast_path(self) -> bool:
        return self.use_mem_eff_path

    @use_fast_path.setter
    def use_fast_path(self, value: bool) -> None:
        self.use_mem_eff_path = value

    def forward(self, hidden_states: Tensor, inference_params: InferenceParams | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D). With `inference_params`, a prompt where its `seqlen_offset` is 0, else one step."""
        if inference_params is None:
            return super().forward(hidden_states)
        caches = self._get_states_from_cache(inference_params, hidden_states.shape[0])
        if inference_params.seqlen_offset > 0:
            return self.step(hidden_states, *caches)[0]
        projected = self.in_proj(hidden_states)
        return self._prefill(projected, projected[..., : self.d_inner], caches)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Advance by one token: (B, 1, D) -> (B, 1, D), and the caches, updated in place. No gradients."""
        _check_one_step(hidden_states)
        x, z = self.in_proj(hidden_states.squeeze(1)).chunk(2, dim=-1)  # (B, E) each
        x = causal_conv1d_update(x, conv_state, *conv_weight("conv1d", self.conv1d), self.activation)
        low_rank, B, C = self.ssm_inputs(x)
        dt, dt_bias = self.expand_dt(low_rank)
        A = -torch.exp(self.A_log.float())
        y = selective_state_update(ssm_state, x, dt, A, B, C, self.D, z, dt_bias, dt_softplus=True)
        return self.out_proj(y).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Zeros: conv_state (B, E, K) and ssm_state (B, E, N). Their size does not depend on `max_seqlen`."""
        zeros = self.conv1d.weight.new_zeros
        return (
            zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype),
            zeros(batch_size, self.d_inner, self.d_state, dtype=dtype),
        )


class Mamba2(_Caches, modules.Mamba2):
    """`mamba_ssm.Mamba2`. Arguments that are not listed here are as in `ssm_kernels.modules.Mamba2`.

    Args:
        conv_init: the convolution's weight is uniform between minus this and this.
        d_ssm: channels that are scanned; a gated MLP takes the rest of E.
        layer_idx: key of this layer's caches.
        process_group: must be None; `ssm_kernels.context_parallel` splits a sequence over ranks.
        sequence_parallel: not heeded, for want of a `process_group`.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = UNLIMITED,
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: object = None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if process_group is not None:
            raise NotImplementedError(f"process_group must be None here, got {process_group!r}")
        with _on(device):
            super().__init__(
                d_model, d_state, d_conv, expand, headdim, ngroups, tuple(A_init_range), dt_min, dt_max, dt_init_floor,
                tuple(dt_limit), conv_bias, bias, chunk_size=chunk_size, use_mem_eff_path=use_mem_eff_path,
                d_ssm=d_ssm, D_has_hdim=D_has_hdim, rmsnorm=rmsnorm, norm_before_gate=norm_before_gate,
            )  # fmt: skip
            if conv_init is not None:
                nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.conv_init, self.layer_idx = conv_init, layer_idx
        self.process_group, self.sequence_parallel, self.world_size, self.local_rank = None, sequence_parallel, 1, 0
        self.activation, self.act = "silu", nn.SiLU()
        _cast(self, dtype)

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: InferenceParams | None = None,
    ) -> Tensor:
        """Mix (B, L, D) over time.

        Args:
            u: (B, L, D); with `seqlen`, (B * L, D).
            seqlen: L.
            seq_idx: (B, L) number of the sequence that a step belongs to, for packed sequences; negative is padding,
                whose output is 0.
            cu_seqlens: (S + 1,) bounds of packed prompts, with `inference_params` and B = 1; the caches then hold S
                sequences. Without `inference_params` it does nothing beside `seq_idx`, which it needs.
            inference_params: run a prompt where its `seqlen_offset` is 0, else one step.

        Returns:
            the same shape as `u`.
        """
        hidden = u if seqlen is None else u.unflatten(0, (-1, seqlen))
        if seq_idx is not None:
            check_tensor("seq_idx", seq_idx, tuple(hidden.shape[:2]), like=u, dtypes=INDICES)
        if inference_params is not None:
            return self._infer(hidden, seq_idx, cu_seqlens, inference_params).view(u.shape)
        if cu_seqlens is not None and seq_idx is None:
            raise ValueError("cu_seqlens needs seq_idx: alone, it does not keep sequences apart in mamba_ssm")
        if seq_idx is None:
            return super().forward(hidden).view(u.shape)
        return self._packed(hidden, seq_idx).view(u.shape)

    def _packed(self, hidden: Tensor, seq_idx: Tensor, init_states: Tensor | None = None) -> Tensor:
        """All rows as one, with a bound at each row's begin and wherever the number changes.

        `init_states` (H, P, N) is the state before each row.
        """
        starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True).flatten().nonzero().flatten()
        bounds = F.pad(starts, (0, 1), value=seq_idx.numel())
        state = None
        if init_states is not None:
            state = self.new_state(len(starts))
            begins_row = (starts % seq_idx.shape[1] == 0).view(-1, 1, 1, 1)
            state = MixerState(state.conv, torch.where(begins_row, init_states.to(state.ssm), state.ssm))
        out = modules.Mamba2.forward(self, hidden.flatten(0, 1).unsqueeze(0), state, bounds)  # (1, B * L, D)
        return out.masked_fill((seq_idx < 0).view(1, -1, 1), 0)

    def _infer(
        self, hidden: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None, inference_params: InferenceParams
    ) -> Tensor:
        n_sequences = hidden.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        caches = self._get_states_from_cache(inference_params, n_sequences)
        if inference_params.seqlen_offset > 0:
            return self.step(hidden, *caches)[0]
        if seq_idx is not None and cu_seqlens is None:
            raise ValueError("seq_idx needs cu_seqlens with inference_params: the caches have a row for each sequence")
        if cu_seqlens is not None and hidden.shape[0] != 1:
            raise ValueError(f"cu_seqlens needs a batch of 1 with inference_params, got {hidden.shape[0]}")
        projected = self.in_proj(hidden)
        return self._prefill(projected, self.split_projected(projected)[2], caches, cu_seqlens)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Advance by one token: (B, 1, D) -> (B, 1, D), and the caches, updated in place. No gradients.

        `dt_limit` and `D_has_hdim` hold here too; the original's step disregards the first and fails on the second.
        """
        _check_one_step(hidden_states)
        mlp, z, xBC, dt = self.split_projected(self.in_proj(hidden_states.squeeze(1)))
        xBC = causal_conv1d_update(xBC, conv_state, *conv_weight("conv1d", self.conv1d), self.activation)
        x, B, C = self.ssm_inputs(xBC)
        state = ssm_state.to(torch.promote_types(ssm_state.dtype, torch.float32))
        y = ssd_step(
            state, x, dt, -torch.exp(self.A_log.float()), B, C, self.skip_weight,
            self.scan_gate(z), self.dt_bias, True, self.dt_limit,
        )  # fmt: skip
        if state is not ssm_state:
            ssm_state.copy_(state)
        return self.out_proj(self.gate(y, z, mlp)).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Zeros: conv_state (B, channels, K), ssm_state (B, H, P, N). Their size does not depend on `max_seqlen`."""
        zeros = self.conv1d.weight.new_zeros
        return (
            zeros(batch_size, self.d_conv, self.d_conv_channels, dtype=dtype).transpose(1, 2),
            zeros(batch_size, self.nheads, self.headdim, self.d_state, dtype=dtype),
        )


class Mamba2Simple(Mamba2):
    """`mamba_ssm.modules.mamba2_simple.Mamba2Simple`.

    Args:
        learnable_init_states: the state before each row, `init_states` (H, P, N), is a parameter.
        activation: of the convolution: `"silu"` or `"swish"`.
        use_mem_eff_path: the norm has G groups; without, it has one, as the original's two paths have.
        deterministic: not heeded: results are always the same from run to run.

    The rest as in `Mamba2`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 128,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = UNLIMITED,
        learnable_init_states: bool = False,
        activation: str = "swish",
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        deterministic: bool | None = None,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if check_activation(activation) is None:
            raise NotImplementedError("activation must be 'silu' or 'swish', got None")
        super().__init__(
            d_model, d_state, d_conv, conv_init, expand, headdim, None, ngroups, A_init_range, dt_min=dt_min,
            dt_max=dt_max, dt_init_floor=dt_init_floor, dt_limit=dt_limit, bias=bias, conv_bias=conv_bias,
            chunk_size=chunk_size, use_mem_eff_path=use_mem_eff_path, layer_idx=layer_idx, device=device, dtype=dtype,
        )  # fmt: skip
        self.learnable_init_states, self.activation, self.deterministic = (
            learnable_init_states,
            activation,
            deterministic,
        )
        if not use_mem_eff_path:
            self.norm.group_size = self.d_inner
        if learnable_init_states:
            shape = (self.nheads, self.headdim, d_state)
            self.init_states = modules.without_weight_decay(torch.zeros(shape, device=device, dtype=dtype))

    def forward(self, u: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D); `seq_idx` as in `Mamba2`."""
        if not self.learnable_init_states:
            return super().forward(u, seq_idx=seq_idx)
        if seq_idx is not None:
            return self._packed(u, seq_idx, self.init_states).view(u.shape)
        state = self.new_state(u.shape[0])
        ssm = self.init_states.to(state.ssm).expand_as(state.ssm).clone()
        return modules.Mamba2.forward(self, u, MixerState(state.conv, ssm))


class MHA(nn.Module):
    """`mamba_ssm.modules.mha.MHA`: self-attention with rotary embeddings, grouped keys and values, and a convolution.

    Args:
        embed_dim: D.
        num_heads, num_heads_kv: heads of the queries, and of keys and values, which divide them; the same by default.
        head_dim: P; D / num_heads by default.
        mlp_dim: width of a gated MLP beside the attention, (up, gate) together, rounded up to 256s; 0 is none.
        qkv_proj_bias, out_proj_bias: whether the projections have a bias.
        softmax_scale: P**-0.5 by default.
        causal: no query sees a later key.
        layer_idx: key of this layer's caches.
        d_conv: K of a causal convolution over queries, keys and values; 0 is none.
        rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved: rotary embedding (arXiv 2104.09864) of so many channels
            of a head; pairs are neighbours if interleaved, else halves apart. 0 is none.
        device, dtype: of the parameters.

    Where it caches the convolution, the original keeps its outputs; here it keeps its inputs, so that decoding gives
    what the whole sequence does.
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
        """(B, L, D) -> (B, L, D). With `inference_params`, a prompt where its `seqlen_offset` is 0, else what follows.

        Raises:
            ValueError: without a `layer_idx`, beyond `max_seqlen`, or several tokens after a prompt with `d_conv`.
        """
        batch, length, _ = x.shape
        caches, offset = (None, None), 0
        if inference_params is not None:
            caches, offset = self._get_caches(x, inference_params)
        projected = self.in_proj(x)
        qkv, mlp = projected.split([projected.shape[-1] - self.mlp_dim, self.mlp_dim], dim=-1)
        if self.d_conv > 0:
            qkv = self._convolve(qkv, caches[1], inference_params)
        heads = [self.num_heads, self.num_heads_kv, self.num_heads_kv]
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split(heads, dim=2)  # (B, L, heads, P)
        positions = torch.arange(length, device=x.device) + (
            offset.unsqueeze(1) if isinstance(offset, Tensor) else offset
        )  # (L,) or (B, L)
        if self.rotary_emb_dim:
            q, k = (self._rotated(t, positions) for t in (q, k))
        mask = None
        if inference_params is not None:
            k, v, mask = self._cached(caches[0], k, v, positions, inference_params)
        repeats = self.num_heads // self.num_heads_kv
        context = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.repeat_interleave(repeats, 2).transpose(1, 2),
            v.repeat_interleave(repeats, 2).transpose(1, 2),
            attn_mask=mask,
            is_causal=self.causal and inference_params is None,
            scale=self.softmax_scale,
        )  # (B, H, L, P)
        context = context.transpose(1, 2).flatten(2)
        if self.mlp_dim:
            up, gate = mlp.chunk(2, dim=-1)
            context = torch.cat([context, up * F.silu(gate)], dim=-1)
        return self.out_proj(context)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Zeros: keys and values (B, max_seqlen, 2, heads, P); last inputs of the convolution (B, channels, K)."""
        like = next(self.out_proj.parameters())
        shape = (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
        conv = like.new_zeros(batch_size, self.conv1d.in_channels, self.d_conv, dtype=dtype) if self.d_conv else None
        return like.new_zeros(shape, dtype=dtype), conv

    def _get_caches(
        self, x: Tensor, inference_params: InferenceParams
    ) -> tuple[tuple[Tensor, Tensor | None], Tensor | int]:
        """This layer's rows of the caches, and where the batch stands."""
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
        return (kv[rows], None if conv is None else conv[rows]), offset

    def _convolve(self, qkv: Tensor, conv_state: Tensor | None, inference_params: InferenceParams | None) -> Tensor:
        weight, bias = conv_weight("conv1d", self.conv1d)
        if conv_state is not None and inference_params.seqlen_offset > 0:
            if qkv.shape[1] != 1:
                raise ValueError(f"after the prompt MHA with d_conv takes one token at a time, got {qkv.shape[1]}")
            return causal_conv1d_update(qkv.squeeze(1), conv_state, weight, bias).unsqueeze(1)
        if conv_state is not None:
            conv_state.copy_(F.pad(qkv.detach().transpose(1, 2), (self.d_conv - qkv.shape[1], 0)))
        return causal_conv1d(qkv, weight, bias).y

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate pairs of channels of (B, L, heads, P) by angles in proportion to the position."""
        size, compute = self.rotary_emb_dim, torch.promote_types(x.dtype, torch.float32)
        exponents = torch.arange(0, size, 2, device=x.device, dtype=compute) / size
        angles = positions.to(compute).unsqueeze(-1) / self.rotary_emb_base**exponents  # (..., L, size / 2)
        cos, sin = angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)
        turned, rest = x[..., :size].to(compute), x[..., size:]
        a, b = turned.unflatten(-1, (-1, 2)).unbind(-1) if self.rotary_emb_interleaved else turned.chunk(2, dim=-1)
        pair = (a * cos - b * sin, a * sin + b * cos)
        turned = torch.stack(pair, -1).flatten(-2) if self.rotary_emb_interleaved else torch.cat(pair, -1)
        return torch.cat([turned.to(x.dtype), rest], -1)

    def _cached(
        self, kv_cache: Tensor, k: Tensor, v: Tensor, positions: Tensor, inference_params: InferenceParams
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write keys and values into the cache, and give all that there are, with who may see which."""
        kv = torch.stack([k, v], 2).to(kv_cache.dtype)
        if positions.dim() == 1:
            start, end = inference_params.seqlen_offset, inference_params.seqlen_offset + k.shape[1]
            kv_cache[:, start:end] = kv
        else:  # each sequence at its own place; no size depends on it, as a CUDA graph wants
            kv_cache[torch.arange(len(kv), device=kv.device).unsqueeze(1), positions] = kv
            end = kv_cache.shape[1]
        keys, values = kv_cache[:, :end].to(k.dtype).unbind(2)
        last = positions if self.causal else positions[..., -1:].expand_as(positions)
        mask = torch.arange(end, device=k.device) <= last.unsqueeze(-1)  # (L, end) or (B, L, end)
        return keys, values, mask if mask.dim() == 2 else mask.unsqueeze(1)


class GatedMLP(nn.Module):
    """`mamba_ssm.modules.mlp.GatedMLP`: `fc2(y * activation(gate))` with (y, gate) of `fc1`.

    Args:
        in_features, out_features: widths; the second is the first by default.
        hidden_features: 8 / 3 of the input's width by default; rounded up to a multiple of `multiple_of`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = math.ceil(hidden / multiple_of) * multiple_of
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, **like)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, in_features if out_features is None else out_features, bias=bias, **like)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(y * self.activation(gate))


class Block(nn.Module):
    """`mamba_ssm.modules.block.Block`: add to the residual stream, normalise, mix; and again with an MLP.

    Args:
        dim: D.
        mixer_cls, mlp_cls, norm_cls: make the parts from D. `nn.Identity` for the MLP is none (also what release 1,
            which has no such argument, does).
        fused_add_norm: add and normalise in one op.
        residual_in_fp32: keep the stream in float32.

    With an MLP and without `fused_add_norm`, the original puts the normalised sum in the place of the stream; here both
    settings give the same.
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
        """(B, L, D) and the stream before -> what the last part gives, and the stream that it is to be added to."""
        hidden_states, residual = add_norm(
            self.norm, hidden_states, residual, self.residual_in_fp32, self.fused_add_norm
        )
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = add_norm(
                self.norm2, hidden_states, residual, self.residual_in_fp32, self.fused_add_norm
            )
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The mixer's caches."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)


def add_norm(
    norm: nn.Module, hidden: Tensor, residual: Tensor | None, residual_in_fp32: bool, fused: bool
) -> tuple[Tensor, Tensor]:
    """Add (..., D) to the residual stream: the normalised sum, and the sum.

    A norm that has been replaced, or has hooks, is called, whatever `fused` is.
    """
    if fused and (is_plain(norm, nn.LayerNorm) or is_plain(norm, RMSNorm)):
        # "float32" is at least that: the stream of a model in float64 is not rounded.
        wide = residual_in_fp32 and hidden.dtype != torch.float64
        return layer_norm_fn(
            hidden, norm.weight, norm.bias, residual, eps=norm.eps, prenorm=True, residual_in_fp32=wide,
            is_rms_norm=isinstance(norm, RMSNorm),
        )  # fmt: skip
    total = hidden if residual is None else hidden + residual
    y = norm(total.to(norm.weight.dtype))
    return y, total.to(torch.promote_types(total.dtype, torch.float32)) if residual_in_fp32 else total


def _check_one_step(hidden_states: Tensor) -> None:
    if hidden_states.dim() != 3 or hidden_states.shape[1] != 1:
        raise ValueError(f"hidden_states must have shape (B, 1, D), got {tuple(hidden_states.shape)}")


def _on(device: torch.device | str | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if device is None else torch.device(device)


def _cast(module: nn.Module, dtype: torch.dtype | None) -> None:
    if dtype is not None:
        for name, parameter in module.named_parameters():
            wide = torch.promote_types(dtype, torch.float32)
            parameter.data = parameter.data.to(wide if name in _IN_FLOAT32 else dtype)

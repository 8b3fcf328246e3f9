"""`mamba_ssm.modules.mamba2`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .... import modules
from ...._core.validation import check_tensor
from ....modules import MixerState, conv_weight, decay_rate
from ....ssd import ssd_step
from .._shared import INDICES, UNLIMITED
from ..causal_conv1d import causal_conv1d_update
from .construction import cast_parameters, on_device
from .inference import CachedMixer, InferenceParams, check_one_token


class Mamba2(CachedMixer, modules.Mamba2):
    """`mamba_ssm.Mamba2`. Arguments that are not listed here are as in `ssm_kernels.modules.Mamba2`.

    Args:
        conv_init: the convolution's weight is uniform between minus this and this.
        d_ssm: channels that are scanned; a gated MLP takes the rest of E.
        layer_idx: key of this layer's caches.
        process_group: must be None; `ssm_kernels.context_parallel` shards a sequence over ranks.
        sequence_parallel: ignored, since there is no `process_group`.
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
        with on_device(device):
            super().__init__(
                d_model, d_state, d_conv, expand, headdim, ngroups, (A_init_range[0], A_init_range[1]), dt_min, dt_max,
                dt_init_floor, (dt_limit[0], dt_limit[1]), conv_bias, bias, chunk_size=chunk_size,
                use_mem_eff_path=use_mem_eff_path, d_ssm=d_ssm, D_has_hdim=D_has_hdim, rmsnorm=rmsnorm,
                norm_before_gate=norm_before_gate,
            )  # fmt: skip
            if conv_init is not None:
                nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.conv_init, self.layer_idx = conv_init, layer_idx
        self.process_group, self.sequence_parallel, self.world_size, self.local_rank = None, sequence_parallel, 1, 0
        self.activation, self.act = "silu", nn.SiLU()
        cast_parameters(self, dtype)

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
            seqlen: length L.
            seq_idx: (B, L) number of the sequence that a step belongs to, for packed sequences; negative is padding,
                whose output is 0.
            cu_seqlens: (S + 1,) bounds of packed prompts, with `inference_params` and B = 1; the caches then hold S
                sequences. Without `inference_params` it needs `seq_idx`, and has no effect.
            inference_params: run a prompt where its `seqlen_offset` is 0, else one step.

        Returns:
            a tensor of the shape of `u`.

        Raises:
            ValueError: `cu_seqlens` or `seq_idx` without the other argument that it needs.
        """
        hidden = u if seqlen is None else u.unflatten(0, (-1, seqlen))  # (B, L, D)
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
        """Run all rows as one, with a bound at the start of each row and wherever the number changes.

        Args:
            hidden: (B, L, D).
            seq_idx: (B, L).
            init_states: (H, P, N) state before each row; None is zeros.

        Returns:
            (1, B * L, D).
        """
        starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True).flatten().nonzero().flatten()  # (S,)
        bounds = F.pad(starts, (0, 1), value=seq_idx.numel())  # (S + 1,)
        state = None
        if init_states is not None:
            state = self.new_state(len(starts))
            is_row_start = (starts % seq_idx.shape[1] == 0).view(-1, 1, 1, 1)  # (S, 1, 1, 1)
            state = MixerState(state.conv, torch.where(is_row_start, init_states.to(state.ssm), state.ssm))
        packed = hidden.flatten(0, 1).unsqueeze(0)  # (1, B * L, D)
        out = modules.Mamba2.forward(self, packed, state, bounds, return_state=True).y
        # Padding has run as sequences of its own.
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
        projected = self.in_proj(hidden)  # (B, L, 2 M + 2 H P + 2 G N + H)
        return self._prefill(projected, self.split_projected(projected)[2], caches, cu_seqlens)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Advance by one token, and update the caches in place. No gradients.

        `dt_limit` and `D_has_hdim` apply here too; the original's step ignores the first and fails on the second.

        Args:
            hidden_states: (B, 1, D).
            conv_state: (B, channels, K) last inputs of the convolution.
            ssm_state: (B, H, P, N).

        Returns:
            (B, 1, D), and the two caches.

        Raises:
            ValueError: `hidden_states` holds more than one token.
        """
        check_one_token(hidden_states)
        mlp, z, xBC, dt = self.split_projected(self.in_proj(hidden_states.squeeze(1)))  # (B, ...) each
        xBC = causal_conv1d_update(xBC, conv_state, *conv_weight("conv1d", self.conv1d), self.activation)
        x, B, C = self.ssm_inputs(xBC)  # (B, H, P), (B, G, N), (B, G, N)
        state = ssm_state.to(torch.promote_types(ssm_state.dtype, torch.float32))  # (B, H, P, N)
        y = ssd_step(
            state, x, dt, decay_rate(self.A_log), B, C, self.skip_weight,
            self.scan_gate(z), self.dt_bias, True, self.dt_limit,
        )  # fmt: skip
        # The op updates a float32 cache in place; the copy of a narrower one is written back.
        if state is not ssm_state:
            ssm_state.copy_(state)
        return self.out_proj(self.gate(y, z, mlp)).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return zeros: conv_state (B, channels, K) and ssm_state (B, H, P, N).

        Args:
            batch_size: batch size B.
            max_seqlen: no effect: the size of a state does not depend on the length.
            dtype: of the caches; that of the convolution's weight by default.
            kwargs: ignored, as in the original.
        """
        # Channels are contiguous in conv_state, as in the original.
        zeros = self.conv1d.weight.new_zeros
        return (
            zeros(batch_size, self.d_conv, self.d_conv_channels, dtype=dtype).transpose(1, 2),
            zeros(batch_size, self.nheads, self.headdim, self.d_state, dtype=dtype),
        )

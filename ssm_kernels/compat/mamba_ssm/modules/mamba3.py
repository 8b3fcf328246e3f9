"""`mamba_ssm.modules.mamba3`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .... import modules
from ....mamba3 import Mamba3States
from .construction import cast_parameters, on_device
from .inference import InferenceParams, check_one_token, states_from_cache

_AT_LEAST_FLOAT32 = ("dt_bias", "B_bias", "C_bias", "D", "mimo_x", "mimo_z", "mimo_o")


class Mamba3(modules.Mamba3):
    """`mamba_ssm.Mamba3`. Arguments that are not listed here are as in `ssm_kernels.modules.Mamba3`.

    Args:
        dropout, n_layer: ignored, as in the original.
        layer_idx: key of this layer's caches.
        device, dtype: of the parameters; those of the scan are float32 whatever `dtype` is.

    An argument that the original would swallow is a TypeError.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_floor: float = 1e-4,
        is_outproj_norm: bool = False,
        is_mimo: bool = False,
        mimo_rank: int = 4,
        chunk_size: int = 64,
        dropout: float = 0.0,
        layer_idx: int | None = None,
        n_layer: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        with on_device(device):
            super().__init__(
                d_model, d_state, expand, headdim, ngroups, rope_fraction, dt_min, dt_max, dt_init_floor, A_floor,
                is_outproj_norm, is_mimo, mimo_rank, chunk_size,
            )  # fmt: skip
        self.layer_idx, self.num_bc_heads = layer_idx, ngroups
        cast_parameters(self, dtype, _AT_LEAST_FLOAT32)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  the original's arguments
        self,
        u: Tensor,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: InferenceParams | None = None,
    ) -> Tensor:
        """Mix (B, L, D) over time.

        Args:
            u: (B, L, D).
            seq_idx: (B, L), with `cu_seqlens` only, which bounds the sequences; without effect, as in the original.
            cu_seqlens: (S + 1,) bounds of packed sequences, for B = 1; caches then hold S sequences.
            inference_params: run a prompt where its `seqlen_offset` is 0, else one step.

        Returns:
            (B, L, D).

        Raises:
            ValueError: `seq_idx` without `cu_seqlens`, or caches that do not fit.
        """
        if seq_idx is not None and cu_seqlens is None:
            raise ValueError("seq_idx needs cu_seqlens: alone, it does not keep sequences apart in mamba_ssm")
        if inference_params is None:
            return super().forward(u, cu_seqlens=cu_seqlens)
        rows = u.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        caches = states_from_cache(self, self.layer_idx, inference_params, rows)
        if inference_params.seqlen_offset > 0:
            check_one_token(u)
            return self.step(u.squeeze(1), *caches)[0].unsqueeze(1)
        state = self.new_state(rows)
        out = super().forward(u, state, cu_seqlens)
        for cache, part in zip(caches, state, strict=True):
            cache.copy_(part)
        return out

    def step(
        self, u: Tensor, angle_state: Tensor, ssm_state: Tensor, k_state: Tensor, v_state: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Advance by one token, and update the caches in place. No gradients.

        Args:
            u: (B, D).
            angle_state, ssm_state, k_state, v_state: (B, H, K), (B, H, P, N), (B, R, H, N), (B, H, P).
            kwargs: ignored, as in the original.

        Returns:
            (B, D), and the four caches.
        """
        caches = (angle_state, ssm_state, k_state, v_state)
        state = Mamba3States(*(t.to(torch.promote_types(t.dtype, torch.float32)) for t in caches))
        out = super().forward(u.unsqueeze(1), state).squeeze(1)
        # The mixer updates float32 caches in place; the copies of narrower ones are written back.
        for cache, part in zip(caches, state, strict=True):
            if cache is not part:
                cache.copy_(part)
        return out, *caches

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        """Return zeros: the angles, the state, and B and x of the last step; shapes as in `step`.

        Args:
            batch_size: batch size B.
            max_seqlen: no effect: the size of a state does not depend on the length.
            dtype: of B and x; the angles and the state are float32 at least.
            kwargs: ignored, as in the original.
        """
        angles, ssm, B, x = self.new_state(batch_size)
        return angles, ssm, B.to(dtype or B.dtype), x.to(dtype or x.dtype)

"""The mixers of `mamba_ssm`: its constructor arguments, and its parameters' names, shapes and dtypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import modules
from ..._checks import check_tensor

_INDICES = (torch.int32, torch.int64)
_UNLIMITED = (0.0, float("inf"))


class Mamba(modules.Mamba):
    """`mamba_ssm.Mamba`: its constructor arguments and its parameters' names, shapes and dtypes."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
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
        super().__init__(
            d_model, d_state, d_conv, _whole("expand", expand), dt_rank, dt_min, dt_max, dt_init_floor, conv_bias, bias,
            use_fast_path,
        )  # fmt: skip
        self.layer_idx = layer_idx
        scale = self.dt_rank**-0.5 * dt_scale
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, scale)
        else:
            nn.init.uniform_(self.dt_proj.weight, -scale, scale)
        _place(self, device, dtype, in_float32=("A_log", "D"))

    def forward(self, hidden_states: Tensor, inference_params: object = None) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        _refuse_inference_params(inference_params)
        return super().forward(hidden_states)


class Mamba2(modules.Mamba2):
    """`mamba_ssm.Mamba2`: its constructor arguments and its parameters' names, shapes and dtypes."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
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
        dt_limit: tuple[float, float] = _UNLIMITED,
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
        expand = _whole("expand", expand)
        only = {"d_ssm": (d_ssm, (None, expand * d_model)), "D_has_hdim": (D_has_hdim, (False,))}
        only |= {"rmsnorm": (rmsnorm, (True,)), "norm_before_gate": (norm_before_gate, (False,))}
        only |= {"process_group": (process_group, (None,))}
        for name, (value, supported) in only.items():
            if value not in supported:
                raise NotImplementedError(f"{name} must be {' or '.join(map(repr, supported))} here, got {value!r}")
        super().__init__(
            d_model, d_state, d_conv, expand, headdim, ngroups, A_init_range, dt_min, dt_max, dt_init_floor, dt_limit,
            conv_bias, bias, chunk_size=chunk_size, use_mem_eff_path=use_mem_eff_path,
        )  # fmt: skip
        self.layer_idx = layer_idx
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        _place(self, device, dtype, in_float32=("D",))

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: object = None,
    ) -> Tensor:
        """(B, L, D) -> the same; with `seqlen`, (B * L, D). See `mamba_chunk_scan_combined` for the other arguments."""
        _refuse_inference_params(inference_params)
        if cu_seqlens is not None and seq_idx is None:
            raise ValueError("cu_seqlens needs seq_idx: alone, it does not keep sequences apart in mamba_ssm")
        hidden = u if seqlen is None else u.unflatten(0, (-1, seqlen))
        if seq_idx is None:
            return super().forward(hidden).view(u.shape)
        check_tensor("seq_idx", seq_idx, tuple(hidden.shape[:2]), like=u, dtypes=_INDICES)
        # All rows as one, with a bound at each row's begin and wherever the number changes.
        starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True).flatten().nonzero().flatten()
        bounds = F.pad(starts, (0, 1), value=seq_idx.numel())
        return super().forward(hidden.flatten(0, 1).unsqueeze(0), cu_seqlens=bounds).view(u.shape)


def _refuse_inference_params(value: object) -> None:
    if value is not None:
        raise NotImplementedError(
            "inference_params must be None here: decode with ssm_kernels.modules, whose mixers take a state"
        )


def _whole(name: str, value: float) -> int:
    if value != int(value):
        raise NotImplementedError(f"{name} must be a whole number here, got {value!r}")
    return int(value)


def _place(
    module: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None, in_float32: tuple[str, ...]
) -> None:
    module.to(device=device)
    for name, parameter in module.named_parameters():
        if name not in in_float32 and dtype is not None:
            parameter.data = parameter.data.to(dtype)
        if name in ("A_log", "D", "dt_bias"):
            parameter._no_weight_decay = True  # read by training code written for mamba_ssm

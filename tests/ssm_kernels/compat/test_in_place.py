"""Outputs can be changed in place, with gradients on: what a function gives is the caller's.

The residual sum of `prenorm` is kept for the backward, there as here; PyTorch says so where it is changed.
"""

from __future__ import annotations

import pytest
import torch

from ssm_kernels import use_backend
from ssm_kernels.compat import mamba_ssm as compat
from ssm_kernels.compat import vmamba

pytestmark = pytest.mark.triton

HEADS, HEADDIM, STATE, DIM, LENGTH = 2, 4, 3, 8, 6


def calls(dtype):
    def leaf(*shape):
        return torch.randn(shape).to(dtype).requires_grad_()

    def positive(*shape):
        return torch.rand(shape).requires_grad_()

    u, grid = leaf(1, DIM, LENGTH), leaf(1, DIM, 2, 3)
    scan = (u, positive(1, DIM, LENGTH), (-positive(DIM, STATE)), leaf(1, STATE, LENGTH), leaf(1, STATE, LENGTH))
    x, matrix = leaf(1, LENGTH, HEADS, HEADDIM), leaf(1, LENGTH, 1, STATE)
    ssd = (x, positive(1, LENGTH, HEADS), (-positive(HEADS)), matrix, matrix, 4)
    channels = DIM + 2 * STATE
    mixer = (leaf(1, LENGTH, DIM + channels + HEADS), leaf(channels, 4), None, positive(HEADS), -positive(HEADS))
    inner = (leaf(1, 2 * DIM, LENGTH), leaf(DIM, 1, 4), None, leaf(2 + 2 * STATE, DIM), leaf(DIM, 2))
    row, weight = leaf(2, DIM), torch.ones(DIM, requires_grad=True)
    return {
        "causal_conv1d_fn": lambda: compat.causal_conv1d_fn(u, leaf(DIM, 4), return_final_states=True),
        "selective_scan_fn": lambda: compat.selective_scan_fn(*scan, z=u, return_last_state=True),
        "mamba_inner_fn": lambda: compat.mamba_inner_fn(*inner, leaf(5, DIM), None, -positive(DIM, STATE)),
        "mamba_inner_fn_no_out_proj": lambda: compat.mamba_inner_fn_no_out_proj(*inner, -positive(DIM, STATE)),
        "mamba_chunk_scan_combined": lambda: compat.mamba_chunk_scan_combined(*ssd, z=x, return_final_states=True),
        "varlen states": lambda: compat.mamba_chunk_scan_combined(
            *ssd, seq_idx=torch.zeros(1, LENGTH, dtype=torch.int32), cu_seqlens=torch.tensor([0, LENGTH]),
            return_final_states=True, return_varlen_states=True,
        ),
        "mamba_split_conv1d_scan_combined": lambda: compat.mamba_split_conv1d_scan_combined(
            *mixer, torch.ones(HEADS), 4, headdim=HEADDIM, rmsnorm_weight=weight, return_final_states=True
        ),
        "rmsnorm_fn": lambda: compat.rmsnorm_fn(row, weight, None, row),
        "layernorm_fn": lambda: compat.layernorm_fn(row, weight, weight, row),
        "layer_norm_fn": lambda: compat.layer_norm_fn(row, weight, None, row),
        "rms_norm_fn": lambda: compat.rms_norm_fn(row, weight, None, row),
        "cross_scan_fn": lambda: vmamba.cross_scan_fn(grid),
        "cross_merge_fn": lambda: vmamba.cross_merge_fn(vmamba.cross_scan_fn(grid).unflatten(-1, (2, 3))),
    }  # fmt: skip


@pytest.mark.parametrize("name", calls(torch.float32))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_can_be_changed_in_place(backend, name, dtype):
    with use_backend(backend):
        outputs = calls(dtype)[name]()
        for y in outputs if isinstance(outputs, tuple) else (outputs,):
            y *= 2
            y[:, :1] = 0
        total = sum(y.sum() for y in (outputs if isinstance(outputs, tuple) else (outputs,)))
        total.backward()

"""Code that imports the originals, unchanged: each project's imports, and what comes of them, in float64."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ssm_kernels.compat
from ssm_kernels.compat.originals import ORIGINALS, Refused


@pytest.fixture
def installed():
    done = ssm_kernels.compat.install()
    if done.skipped:
        ssm_kernels.compat.uninstall()
        pytest.skip(str(done))
    yield done
    ssm_kernels.compat.uninstall()


def run(code: str) -> dict:
    """Run a module's text, as a project has it in a file of its own, in float64."""
    namespace = {"__name__": "project"}
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    try:
        exec(code, namespace)
    finally:
        torch.set_default_dtype(torch.float32)
    return namespace


def assert_same(namespace: dict):
    got, want = namespace["got"], namespace["want"]
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


MAMBAVISION = """
import torch
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref

x, dt, z = torch.randn(2, 8, 9), torch.randn(2, 8, 9), torch.randn(2, 8, 9)
A = -torch.exp(torch.randn(8, 4))
B, C = torch.randn(2, 4, 9), torch.randn(2, 4, 9)
args = (x, dt, A, B, C, torch.randn(8))
options = dict(z=None, delta_bias=torch.randn(8).float(), delta_softplus=True, return_last_state=None)
got, want = selective_scan_fn(*args, **options), selective_scan_ref(*args, **options)
"""

U_MAMBA = """
import torch
from torch import nn
from mamba_ssm import Mamba
from mamba_ssm.ops.selective_scan_interface import mamba_inner_ref

class MambaLayer(nn.Module):
    def __init__(self, dim, d_state=16, d_conv=4, expand=2):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mamba = Mamba(d_model=dim, d_state=d_state, d_conv=d_conv, expand=expand)

    def forward(self, x):
        tokens = x.flatten(2).transpose(-1, -2)
        return self.mamba(self.norm(tokens)).transpose(-1, -2).reshape(x.shape)

layer, x = MambaLayer(8).double(), torch.randn(2, 8, 3, 4)
got, m = layer(x), layer.mamba
xz = m.in_proj(layer.norm(x.flatten(2).transpose(-1, -2))).transpose(1, 2)
want = mamba_inner_ref(
    xz, m.conv1d.weight, m.conv1d.bias, m.x_proj.weight, m.dt_proj.weight, m.out_proj.weight, m.out_proj.bias,
    -torch.exp(m.A_log), None, None, m.D, delta_bias=m.dt_proj.bias,
).transpose(-1, -2).reshape(x.shape)
got, want = got.float(), want.float()  # A_log, D are float32 inside
"""

FLA_MAMBA = """
import torch
try:
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
except ImportError:
    selective_state_update, selective_scan_fn, mamba_inner_fn = None, None, None
try:
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
except ImportError:
    causal_conv1d_update, causal_conv1d_fn = None, None
is_fast_path_available = all(
    (selective_state_update, selective_scan_fn, causal_conv1d_fn, causal_conv1d_update, mamba_inner_fn)
)
assert is_fast_path_available

# A prompt, then a step from its states: as all at once.
x, dt, A = torch.randn(1, 6, 8), torch.rand(1, 6, 8), -torch.rand(6, 4)
B, C, weight = torch.randn(1, 4, 8), torch.randn(1, 4, 8), torch.randn(6, 4)
conv = causal_conv1d_fn(x, weight, None, activation="silu")
want = selective_scan_fn(conv, dt, A, B, C)[..., -1]
_, ssm_state = selective_scan_fn(*(t[..., :7] for t in (conv, dt)), A, *(t[..., :7] for t in (B, C)),
                                 return_last_state=True)
conv_state = torch.nn.functional.pad(x[..., :7], (4 - 7, 0))
step = causal_conv1d_update(x[..., -1], conv_state, weight, None, "silu")
got = selective_state_update(ssm_state, step, dt[..., -1], A, B[..., -1], C[..., -1])
"""

FLA_MAMBA2 = """
import torch
try:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
except ImportError:
    selective_state_update, mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined = None, None, None
from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_ref

H, P, G, N = 4, 3, 2, 5
channels = H * P + 2 * G * N
args = (torch.randn(2, 9, H * P + channels + H), torch.randn(channels, 4), torch.randn(channels), torch.randn(H),
        -torch.rand(H), torch.randn(H))
options = dict(activation="silu", rmsnorm_weight=torch.randn(H * P), rmsnorm_eps=1e-5, headdim=P, ngroups=G,
               outproj_weight=torch.randn(6, H * P), outproj_bias=None, norm_before_gate=False)
got = mamba_split_conv1d_scan_combined(*args, chunk_size=4, seq_idx=None, return_final_states=False, **options)
want = mamba_split_conv1d_scan_ref(*args, chunk_size=4, **options)
"""

MEGATRON = """
import torch
try:
    from mamba_ssm.ops.triton.layernorm_gated import RMSNorm as RMSNormGated
    from mamba_ssm.ops.triton.layernorm_gated import rms_norm_ref
    HAVE_MAMBA_SSM = True
except ImportError:
    HAVE_MAMBA_SSM = False
assert HAVE_MAMBA_SSM
norm = RMSNormGated(12, eps=1e-5, group_size=4, norm_before_gate=False, dtype=torch.float64)
torch.nn.init.normal_(norm.weight)
x, z = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
got, want = norm(x, z), rms_norm_ref(x, norm.weight, None, z, 1e-5, 4, False)
"""

VIM = """
import torch
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, mamba_inner_fn, bimamba_inner_fn
from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn_no_out_proj, mamba_inner_ref
try:
    from mamba_ssm.ops.triton.layernorm import RMSNorm, layer_norm_fn, rms_norm_fn
except ImportError:
    RMSNorm, layer_norm_fn, rms_norm_fn = None, None, None
assert rms_norm_fn(torch.ones(2, 4), torch.ones(4), None, residual=None, eps=1e-5, prenorm=True)[1].all()

D, N, R = 6, 4, 2
xz, out = torch.randn(2, 2 * D, 9), torch.randn(5, D)
def direction(seed):
    torch.manual_seed(seed)
    return (torch.randn(D, 1, 4), torch.randn(D), torch.randn(R + 2 * N, D), torch.randn(D, R))
forwards, backwards, (skip, bias) = direction(1), direction(2), torch.randn(2, D)
A, A_b = -torch.rand(D, N), -torch.rand(D, N)
half = lambda xz, weights, A: mamba_inner_fn_no_out_proj(xz, *weights, A, None, None, skip, delta_bias=bias,
                                                         delta_softplus=True)
y = half(xz, forwards, A) + half(xz.flip([-1]), backwards, A_b).flip([-1])
got = torch.nn.functional.linear(y.transpose(1, 2), out)
whole = lambda xz, weights, A: mamba_inner_ref(xz, *weights, out, None, A, None, None, skip, delta_bias=bias)
want = whole(xz, forwards, A) + whole(xz.flip([-1]), backwards, A_b).flip([1])
"""

VMAMBA = """
import torch
WITH_SELECTIVESCAN_OFLEX = WITH_SELECTIVESCAN_CORE = WITH_SELECTIVESCAN_MAMBA = True
try:
    import selective_scan_cuda_oflex
except ImportError:
    WITH_SELECTIVESCAN_OFLEX = False
try:
    import selective_scan_cuda_core
except ImportError:
    WITH_SELECTIVESCAN_CORE = False
try:
    import selective_scan_cuda
except ImportError:
    WITH_SELECTIVESCAN_MAMBA = False
assert WITH_SELECTIVESCAN_OFLEX and WITH_SELECTIVESCAN_CORE and WITH_SELECTIVESCAN_MAMBA
from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

class SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False, backend="oflex"):
        ctx.delta_softplus, ctx.backend = delta_softplus, backend
        if backend == "oflex":
            out, x, *rest = selective_scan_cuda_oflex.fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, 1, True)
        elif backend == "core":
            out, x, *rest = selective_scan_cuda_core.fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, 1)
        else:
            out, x, *rest = selective_scan_cuda.fwd(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
        ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, x)
        return out

    @staticmethod
    def backward(ctx, dout, *args):
        u, delta, A, B, C, D, delta_bias, x = ctx.saved_tensors
        given = (u, delta, A, B, C, D)
        if ctx.backend == "oflex":
            grads = selective_scan_cuda_oflex.bwd(*given, delta_bias, dout, x, ctx.delta_softplus, 1)
        elif ctx.backend == "core":
            grads = selective_scan_cuda_core.bwd(*given, delta_bias, dout, x, ctx.delta_softplus, 1)
        else:
            grads = selective_scan_cuda.bwd(*given, None, delta_bias, dout, x, None, None, ctx.delta_softplus, False)
        return (*grads[:7], None, None)

K, C, N, L = 4, 3, 2, 6
inputs = [torch.randn(2, K * C, L), torch.randn(2, K * C, L), -torch.rand(K * C, N), torch.randn(2, K, N, L),
          torch.randn(2, K, N, L), torch.randn(K * C), torch.randn(K * C)]
got, want = [], []
for t in inputs:
    t.requires_grad_()
for backend in ("oflex", "core", "mamba"):
    y = SelectiveScan.apply(*inputs, True, backend)
    got += [y, *torch.autograd.grad(y.square().sum(), inputs)]
    y = selective_scan_ref(*inputs[:6], None, inputs[6], True)
    want += [y, *torch.autograd.grad(y.square().sum(), inputs)]
"""

FORK_OF_THE_FUSED_MIXER = """
import torch
import torch.nn.functional as F
import causal_conv1d_cuda
import selective_scan_cuda
from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn

class Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx, xz, weight, bias, x_proj, dt_proj, out_proj, A, D, dt_bias):
        x, z = xz.chunk(2, dim=1)
        conv = causal_conv1d_cuda.causal_conv1d_fwd(x, weight, bias, None, None, None, True)
        parts = F.linear(conv.transpose(1, 2), x_proj)
        n, r = A.shape[1], dt_proj.shape[1]
        dt = F.linear(parts[..., :r], dt_proj).transpose(1, 2)
        B, C = (parts[..., s].transpose(1, 2).unsqueeze(1) for s in (slice(r, r + n), slice(r + n, None)))
        out, x_scan, out_z = selective_scan_cuda.fwd(conv, dt, A, B, C, D, z, dt_bias, True)
        last = x_scan[:, :, -1, 1::2]
        ctx.mark_non_differentiable(last)
        ctx.save_for_backward(xz, weight, bias, x_proj, dt_proj, out_proj, conv, parts, dt, A, B, C, D, dt_bias,
                              x_scan, out)
        return F.linear(out_z.transpose(1, 2), out_proj), last

    @staticmethod
    def backward(ctx, dout, _):
        xz, weight, bias, x_proj, dt_proj, out_proj, conv, parts, dt, A, B, C, D, dt_bias, x_scan, out = (
            ctx.saved_tensors)
        x, z = xz.chunk(2, dim=1)
        n, r = A.shape[1], dt_proj.shape[1]
        dxz = torch.empty_like(xz)
        dx, dz = dxz.chunk(2, dim=1)
        dy = (dout @ out_proj).transpose(1, 2)
        dconv, ddt, dA, dB, dC, dD, dbias, dz, out_z = selective_scan_cuda.bwd(
            conv, dt, A, B, C, D, z, dt_bias, dy, x_scan, out, dz, True, True)
        dout_proj = torch.einsum("ble,bdl->ed", dout, out_z)
        ddt = ddt.transpose(1, 2)
        dparts = torch.cat([ddt @ dt_proj, dB.squeeze(1).transpose(1, 2), dC.squeeze(1).transpose(1, 2)], -1)
        ddt_proj = torch.einsum("bld,blr->dr", ddt, parts[..., :r])
        dx_proj = torch.einsum("blr,bdl->rd", dparts, conv)
        dconv = dconv + (dparts @ x_proj).transpose(1, 2)
        dx, dweight, dbias_conv, _ = causal_conv1d_cuda.causal_conv1d_bwd(
            x, weight, bias, dconv, None, None, None, dx, False, True)
        return dxz, dweight, dbias_conv, dx_proj, ddt_proj, dout_proj, dA, dD, dbias

D, N, R = 6, 4, 2
inputs = [torch.randn(2, 2 * D, 9), torch.randn(D, 4), torch.randn(D), torch.randn(R + 2 * N, D), torch.randn(D, R),
          torch.randn(5, D), -torch.rand(D, N), torch.randn(D), torch.randn(D)]
for t in inputs:
    t.requires_grad_()
y, last = Inner.apply(*inputs)
got = [y, *torch.autograd.grad(y.square().sum(), inputs)]
xz, weight, bias, x_proj, dt_proj, out_proj, A, skip, dt_bias = inputs
y = mamba_inner_fn(xz, weight.unsqueeze(1), bias, x_proj, dt_proj, out_proj, None, A, None, None, skip, dt_bias)
want = [y, *torch.autograd.grad(y.square().sum(), inputs)]
"""

ORIGINAL_TESTS = """
import torch
from mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan, mamba_chunk_scan_combined
from mamba_ssm.ops.triton.ssd_combined import ssd_chunk_scan_combined_ref, ssd_selective_scan
from mamba_ssm.ops.triton.k_activations import swiglu
from mamba_ssm.ops.triton.layer_norm import layer_norm_fn, layer_norm_ref, rms_norm_ref
from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_ref
from causal_conv1d.causal_conv1d_interface import causal_conv1d_update, causal_conv1d_update_ref
from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states, causal_conv1d_varlen_states_ref

x, dt, A = torch.randn(1, 8, 4, 3), torch.rand(1, 8, 4), -torch.rand(4)
B, C = torch.randn(1, 8, 4, 2), torch.randn(1, 8, 4, 2)
want = [mamba_chunk_scan_combined(x, dt, A, B, C, 4, D=None)] * 4
got = [ssd_minimal_discrete(x * dt.unsqueeze(-1), A * dt, B, C, 4)[0], ssd_selective_scan(x, dt, A, B, C),
       ssd_chunk_scan_combined_ref(x, dt, A, B, C, 4), mamba_chunk_scan(x, dt, A, B, C, 4)]
two = torch.randn(3, 8)
got.append(swiglu(two))
want.append(torch.nn.functional.silu(two[:, :4]) * two[:, 4:])
"""

COPY_OF_MAMBA2 = """
import torch
from mamba_ssm.distributed.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from mamba_ssm.distributed.distributed_utils import all_reduce, reduce_scatter
from mamba_ssm.ops.triton.layernorm_gated import RMSNorm as RMSNormGated
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_conv1d_scan_ref
from mamba_ssm.utils.torch import custom_bwd, custom_fwd
from causal_conv1d import causal_conv1d_fn

class Double(torch.autograd.Function):
    @staticmethod
    @custom_fwd
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @custom_bwd
    def backward(ctx, dy):
        return 2 * dy

class Layer(torch.nn.Module):
    def __init__(self, process_group=None):
        super().__init__()
        linear = torch.nn.Linear if process_group is None else ColumnParallelLinear
        self.in_proj = linear(8, 6 + 2 * 4 + 2)
        self.norm = RMSNormGated(6, norm_before_gate=False)
        self.weight = torch.nn.Parameter(torch.randn(6 + 2 * 4, 4))

    def forward(self, hidden):
        xBC, dt = self.in_proj(Double.apply(hidden)).split([14, 2], dim=-1)
        xBC = causal_conv1d_fn(xBC.transpose(1, 2), self.weight, None, activation="silu").transpose(1, 2)
        x, B, C = xBC.split([6, 4, 4], dim=-1)
        y = mamba_chunk_scan_combined(x.unflatten(-1, (2, 3)), dt, -torch.ones(2), B.unsqueeze(2), C.unsqueeze(2), 4,
                                      D=torch.ones(2), dt_softplus=True)
        return self.norm(y.flatten(2))

layer, hidden = Layer().double(), torch.randn(2, 9, 8, requires_grad=True)
got = layer(hidden)
got.sum().backward()
xBC, dt = layer.in_proj(2 * hidden).split([14, 2], dim=-1)
want = layer.norm(mamba_conv1d_scan_ref(xBC, layer.weight, None, dt, -torch.ones(2), 4, torch.ones(2), dt_softplus=True,
                                        headdim=3))
for use in (Layer, RowParallelLinear, all_reduce, reduce_scatter):
    try:
        use(1)
    except NotImplementedError as error:
        assert "context_parallel" in str(error)
    else:
        raise AssertionError("not refused")
"""

COBRA = """
from functools import partial
import torch
from torch import nn
from mamba_ssm.models.mixer_seq_simple import _init_weights
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.utils.generation import InferenceParams
from mamba_ssm.utils.generation import sample, update_graph_cache, modify_logit_for_repetition_penalty
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, mamba_inner_fn
try:
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
except ImportError:
    causal_conv1d_fn, causal_conv1d_update = None, None
try:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update, _selective_scan_update_kernel
except ImportError:
    selective_state_update = None
from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn

class Block(nn.Module):
    def __init__(self, dim, mixer_cls, norm_cls):
        super().__init__()
        self.mixer, self.norm = mixer_cls(dim), norm_cls(dim)

    def forward(self, hidden_states, residual=None, inference_params=None):
        fused = rms_norm_fn if isinstance(self.norm, RMSNorm) else layer_norm_fn
        weights = (self.norm.weight, self.norm.bias)
        hidden_states, residual = fused(hidden_states, *weights, residual=residual, prenorm=True,
                                        residual_in_fp32=False, eps=self.norm.eps)
        return self.mixer(hidden_states, inference_params=inference_params), residual

class Model(nn.Module):
    def __init__(self, mixer, layers=2, width=16, vocabulary=11):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(
            Block(width, partial(mixer, layer_idx=i), partial(RMSNorm, eps=1e-5)) for i in range(layers))
        self.norm_f = RMSNorm(width)
        self.apply(partial(_init_weights, n_layer=layers))

    def forward(self, tokens, inference_params=None):
        hidden, residual = self.embedding(tokens), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, inference_params=inference_params)
        hidden = rms_norm_fn(hidden, self.norm_f.weight, self.norm_f.bias, eps=self.norm_f.eps, residual=residual,
                             prenorm=False, residual_in_fp32=False)
        return hidden @ self.embedding.weight.T

def decode(mixer):
    model, tokens = Model(mixer).double().eval(), torch.randint(11, (2, 5))
    params, got, sequence = InferenceParams(max_seqlen=9, max_batch_size=2), [], [tokens]
    with torch.no_grad():
        while params.seqlen_offset < 8:
            got.append(model(sequence[-1], params)[:, -1])
            params.seqlen_offset += sequence[-1].shape[1]
            sequence.append(sample(got[-1], top_k=1).unsqueeze(1))
        return torch.stack(got, 1), model(torch.cat(sequence[:-1], 1))[:, 4:]

got, want = decode(Mamba)
"""

ML_MAMBA = COBRA.replace(
    "got, want = decode(Mamba)",
    """
from mamba_ssm.modules.mamba2 import Mamba2
from mamba_ssm.modules.mlp import GatedMLP
from mamba_ssm.modules.mha import MHA
got, want = decode(partial(Mamba2, d_state=8, headdim=8, chunk_size=4))
""",
)

PATTERNS = {
    "Cobra": COBRA,
    "ML-Mamba": ML_MAMBA,
    "MambaVision": MAMBAVISION,
    "U-Mamba": U_MAMBA,
    "flash-linear-attention, Mamba": FLA_MAMBA,
    "flash-linear-attention, Mamba-2": FLA_MAMBA2,
    "Megatron": MEGATRON,
    "Vim": VIM,
    "VMamba": VMAMBA,
    "a copy of Mamba-2": COPY_OF_MAMBA2,
    "a fork of the fused mixer": FORK_OF_THE_FUSED_MIXER,
    "the originals' tests": ORIGINAL_TESTS,
}


@pytest.mark.parametrize("project", PATTERNS)
def test_a_project_runs_unchanged(installed, project):
    assert_same(run(PATTERNS[project]))


CONVOLUTIONS = """
import torch
import causal_conv1d_cuda as extension
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from causal_conv1d.cpp_functions import causal_conv1d_bwd_function, causal_conv1d_fwd_function
from causal_conv1d.cpp_functions import causal_conv1d_update_function

x, weight, bias, dout = torch.randn(2, 6, 9), torch.randn(6, 4), torch.randn(6), torch.randn(2, 6, 9)
initial, last = torch.randn(2, 6, 3), torch.empty(2, 6, 3)
leaves = [t.clone().requires_grad_() for t in (x, weight, bias, initial)]
y, final = causal_conv1d_fn(*leaves[:3], initial_states=leaves[3], return_final_states=True, activation="silu")
dfinal = torch.randn(2, 6, 3)
grads = torch.autograd.grad((y * dout).sum() + (final * dfinal).sum(), leaves)
plain = causal_conv1d_fn(*leaves[:3], activation="silu")
plain_grads = torch.autograd.grad((plain * dout).sum(), leaves[:3])
out, places = torch.empty_like(x), [torch.empty_like(t) for t in leaves]
got = [extension.causal_conv1d_fwd(x, weight, bias, None, True),
       extension.causal_conv1d_fwd(x, weight, bias, None, initial, last, True), last]
assert extension.causal_conv1d_fwd(x, weight, bias, None, initial, out, None, True) is None
got += [out, causal_conv1d_fwd_function(x, weight, bias, None, initial, None, True)]
want = [plain, y, final, y, y]
got += extension.causal_conv1d_bwd(x, weight, bias, dout, None, None, True)
want += plain_grads
got += extension.causal_conv1d_bwd(x, weight, bias, dout, None, initial, dfinal, None, True, True)
want += grads
assert extension.causal_conv1d_bwd(x, weight, bias, dout, None, initial, dfinal, *places, True) is None
got += places
want += grads
got += causal_conv1d_bwd_function(x, weight, bias, dout, None, initial, dfinal, None, False, True)[:3]
want += grads[:3]
state = torch.randn(2, 6, 4)
states = [state.clone() for _ in range(5)]
new = x[..., :2].contiguous()
want += [causal_conv1d_update(new, states[0], weight, bias, "silu")] * 4
got += [extension.causal_conv1d_update(new, states[1], weight, bias, True),
        extension.causal_conv1d_update(new, states[2], weight, bias, True, None, None),
        causal_conv1d_update_function(new, states[3], weight, bias, True, None, None)]
out = torch.empty_like(new)
extension.causal_conv1d_update(new, states[4], weight, bias, out, True, None, None)
got += [out, *states[1:]]
want += [states[0]] * 4
for function, given in ((extension.causal_conv1d_fwd, 6), (extension.causal_conv1d_bwd, 9),
                        (extension.causal_conv1d_update, 9)):
    try:
        function(*[None] * given)
    except TypeError as error:
        assert f"got {given}" in str(error)
    else:
        raise AssertionError("not refused")
"""


def test_every_form_of_the_convolutions_extension(installed):
    namespace = run(CONVOLUTIONS)
    namespace["got"], namespace["want"] = ([t.detach() for t in namespace[n]] for n in ("got", "want"))
    assert_same(namespace)


def test_oflex_does_not_round(installed):
    import selective_scan_cuda_oflex as oflex

    u, delta, A = torch.randn(1, 4, 5), torch.rand(1, 4, 5), -torch.rand(4, 2)
    B, C = torch.randn(1, 1, 2, 5), torch.randn(1, 1, 2, 5)
    u, delta, B, C = (t.bfloat16() for t in (u, delta, B, C))
    wide, _ = oflex.fwd(u, delta, A, B, C, None, None, False, 1, True)
    narrow, _ = oflex.fwd(u, delta, A, B, C, None, None, False, 1, False)
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16) and wide.bfloat16().equal(narrow)
    grads = oflex.bwd(u, delta, A, B, C, None, None, torch.ones_like(wide), None, False, 1)
    assert [g.dtype for g in grads[:5]] == [t.dtype for t in (u, delta, A, B, C)] and grads[5:] == [None, None]


NAMES = [
    (module, name, target)
    for original in ORIGINALS.values()
    for module, names in original.modules.items()
    for name, target in names.items()
]


@pytest.mark.parametrize(("module", "name", "target"), NAMES, ids=lambda v: v if isinstance(v, str) else "refused")
def test_every_name_of_the_table(installed, module, name, target):
    if isinstance(target, Refused):
        with pytest.raises(ImportError, match=f"{name} is not provided by ssm_kernels.compat: "):
            run(f"from {module} import {name}")
    else:
        assert run(f"from {module} import {name}")[name] is not None


def test_installing_provides_every_original(installed):
    assert installed.provided == tuple(ORIGINALS) and not installed.skipped
    assert "mamba_ssm 2.3.0 (mamba_ssm, selective_scan_cuda) is provided by ssm_kernels.compat" in str(installed)
    for name in ("mamba_ssm", "causal_conv1d", "selective_scan_cuda", "mamba_ssm.ops.triton.ssd_combined"):
        assert importlib.util.find_spec(name).origin == "ssm_kernels.compat"
    import causal_conv1d
    import mamba_ssm

    assert (mamba_ssm.__version__, causal_conv1d.__version__) == ("2.3.0", "1.6.1")
    for name in ("mamba_ssm", "mamba-ssm"):
        assert importlib.metadata.version(name) == "2.3.0"
    distribution = importlib.metadata.distribution("mamba-ssm")
    assert "provided by ssm_kernels.compat" in distribution.metadata["Summary"]
    assert distribution.files is None and not distribution.requires
    with pytest.raises(FileNotFoundError, match="mamba_ssm is provided by"):
        distribution.locate_file("x")
    assert importlib.metadata.packages_distributions()["selective_scan_cuda"] == ["mamba_ssm"]
    assert {"ops", "modules", "Mamba", "selective_scan_fn"} <= set(dir(mamba_ssm))
    assert mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined  # without an import of the module
    # What transformers asks for first, where it looks for a name in the root.
    assert getattr(mamba_ssm, "mamba_chunk_scan_combined", None) is None and not hasattr(mamba_ssm, "Mamba4")
    assert importlib.util.find_spec("torch") is not None and importlib.metadata.version("torch")


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("from mamba_ssm.ops.triton.ssd_combined import foo", ImportError, "foo is not provided .* has: .*mamba_chunk"),
        ("import mamba_ssm.distributed.pipeline", ModuleNotFoundError, "distributed.pipeline is not .*tensor_parallel"),
        ("from mamba_ssm.modules import moe", ModuleNotFoundError, "mixtures of experts are not offered"),
        ("from mamba_ssm.modules import mamba3_simple", ImportError, "of Mamba-3 the module is.* has: .*mamba_simple"),
        (
            "from mamba_ssm.ops.triton.mamba3 import mamba3_siso",
            ModuleNotFoundError,
            "of Mamba-3 the module is provided",
        ),
        ("from mamba_ssm.ops.triton.ssd_bmm import _bmm_chunk_fwd", ModuleNotFoundError, "use ssd_combined"),
        ("import mamba_ssm.nothing", ModuleNotFoundError, "mamba_ssm.nothing is not provided .* has: .*modules, ops"),
        ("import mamba_ssm\nmamba_ssm.nothing", AttributeError, "mamba_ssm.nothing is not provided"),
        ("import causal_conv1d_cuda\ncausal_conv1d_cuda.more", AttributeError, "causal_conv1d_cuda.more is not"),
    ],
)
def test_missing_files_are_named(installed, code, error, message):
    with pytest.raises(error, match=message):
        run(code)


def test_a_name_whose_package_is_missing_names_it(installed, monkeypatch):
    monkeypatch.setitem(sys.modules, "vlmamba.model.mamba_ssm", None)
    with pytest.raises(ImportError, match="MambaLMHeadModel is vlmamba.model.mamba_ssm.MambaLMHeadModel, which cannot"):
        run("from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel")


def test_after_uninstall_nothing_is_provided():
    before = list(sys.meta_path)
    ssm_kernels.compat.install()
    run("from mamba_ssm.ops.triton import ssd_combined")
    ssm_kernels.compat.install()  # twice is once
    run("import causal_conv1d")
    ssm_kernels.compat.uninstall()
    ssm_kernels.compat.uninstall()
    assert sys.meta_path == before
    assert not [m for m in sys.modules if m.split(".")[0] in ("mamba_ssm", "causal_conv1d")]
    with pytest.raises(ModuleNotFoundError, match="No module named 'mamba_ssm'"):
        run("import mamba_ssm")
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("mamba-ssm")


@pytest.fixture
def original(tmp_path, monkeypatch):
    """A package that stands for an installed mamba_ssm."""
    package = tmp_path / "mamba_ssm"
    (package / "ops").mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '9.9'\nWHO = 'the original'\n")
    (package / "ops" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield package
    ssm_kernels.compat.uninstall()
    for name in [m for m in sys.modules if m.split(".")[0] == "mamba_ssm"]:
        del sys.modules[name]


def test_an_original_that_is_installed_is_skipped(original, caplog):
    with caplog.at_level(logging.INFO, "ssm_kernels"):
        done = ssm_kernels.compat.install()
    assert "mamba_ssm" not in done.provided and done.skipped == {"mamba_ssm": str(original / "__init__.py")}
    assert caplog.records[0].levelname == "WARNING" and "mamba_ssm is skipped" in caplog.messages[0]
    namespace = run("import mamba_ssm, causal_conv1d")
    assert namespace["mamba_ssm"].WHO == "the original" and namespace["causal_conv1d"].__version__ == "1.6.1"
    # All of its names: its own module asks for an extension that it may do without.
    with pytest.raises(ModuleNotFoundError):
        run("import selective_scan_cuda")
    with pytest.raises(ModuleNotFoundError):
        run("import mamba_ssm.modules.mamba2")


def test_an_installed_original_is_shadowed_on_request(original, caplog):
    before = run("import mamba_ssm")["mamba_ssm"]
    with caplog.at_level(logging.INFO, "ssm_kernels"):
        done = ssm_kernels.compat.install(shadow=True)
    assert done.provided == tuple(ORIGINALS) and "originals are shadowed" in caplog.messages[0]
    namespace = run("import mamba_ssm\nfrom mamba_ssm.ops.selective_scan_interface import selective_scan_fn")
    assert namespace["mamba_ssm"].__version__ == "2.3.0" and before.WHO == "the original"
    ssm_kernels.compat.uninstall()
    assert run("import mamba_ssm")["mamba_ssm"].WHO == "the original"


def test_an_original_that_comes_later_comes_first(installed, tmp_path, monkeypatch):
    (tmp_path / "causal_conv1d.py").write_text("WHO = 'the original'\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert run("import causal_conv1d")["causal_conv1d"].WHO == "the original"
    del sys.modules["causal_conv1d"]


def command(*args: str, cwd: Path) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "ssm_kernels.compat", *args]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=cwd)


SCRIPT = """
import os, pickle, sys
from beside import VALUE
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

class Thing:
    pass

def main():
    assert pickle.loads(pickle.dumps(Thing)) is Thing and sys.modules["__main__"].Thing is Thing
    print(__name__, os.path.basename(__file__), os.path.basename(sys.argv[0]), *sys.argv[1:], VALUE)
    if "--fail" in sys.argv:
        raise ValueError("of the script")
    sys.exit(7)

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "script.py").write_text(SCRIPT)
    (tmp_path / "work" / "beside.py").write_text("VALUE = 42\n")
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(
        "import sys\nfrom causal_conv1d import causal_conv1d_fn\nprint(__package__, __spec__.name, sys.argv[1:])\n"
    )
    return tmp_path


def test_a_script_runs_as_it_would_alone(folder):
    done = command("work/script.py", "-m", "--shadow", "a b", cwd=folder)
    assert done.stdout == "__main__ script.py script.py -m --shadow a b 42\n", done.stderr
    assert done.returncode == 7
    assert done.stderr.count("\n") == 1 and "mamba_ssm 2.3.0" in done.stderr


def test_a_traceback_starts_in_the_script(folder):
    done = command("work/script.py", "--fail", cwd=folder)
    assert done.returncode == 1
    said, *trace = done.stderr.splitlines()
    assert trace[0] == "Traceback (most recent call last):" and trace[-1] == "ValueError: of the script"
    assert 'script.py", line' in trace[1] and "compat" not in "".join(trace) and "runpy" not in "".join(trace)


def test_a_module_runs_as_it_would_alone(folder):
    done = command("-m", "package", "--help", "x", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "package package.__main__ ['--help', 'x']\n"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="-P is newer")
def test_a_safe_path_stays_as_it_is(folder, tmp_path):
    (tmp_path / "show.py").write_text("import sys\nprint(sys.path[0] == sys.argv[1])\n")
    command = [sys.executable, "-P", "-c", "import sys; print(sys.path[0])"]
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    command = [sys.executable, "-P", "-m", "ssm_kernels.compat", "show.py", first]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no_such.py"], "cannot open no_such.py: No such file"),
        (["-m", "no_such"], "no module named no_such"),
        (["-m", "no.such"], "No module named 'no'"),
    ],
)
def test_a_program_that_is_not_there(tmp_path, args, message):
    done = command(*args, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_the_documentation_has_the_full_table():
    page = (Path(__file__).parents[3] / "docs" / "drop-in.md").read_text()
    provided, refused = page.split("## What is refused")
    for original in ORIGINALS.values():
        for module, names in original.modules.items():
            row = next((line for line in provided.splitlines() if line.startswith(f"| `{module}`")), "")
            assert row, module
            if "functions that it imports" not in row:
                assert {n for n, t in names.items() if not isinstance(t, Refused)} == {
                    n for n in row.replace("`", " ").replace(",", " ").split() if n in names
                }, module
        for module in original.refused:
            assert f"`{module}`" in refused

"""Names of mamba_ssm and causal_conv1d: each against the papers' equations, written out here step by step."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

from ssm_kernels import use_backend
from ssm_kernels.compat import mamba_ssm as compat
from tests.ssm_kernels.makers import leaf, negative_leaf

BATCH, LENGTH, DIM, STATE, WIDTH = 2, 7, 6, 3, 4
HEADS, HEADDIM, GROUPS = 4, 3, 2
SEQ_IDX = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 2, 2, 2]])


def assert_same(got, want, *inputs):
    """Outputs, and gradients of a weighted sum of them, are equal."""
    got, want = ([t for t in (o if isinstance(o, tuple) else (o,))] for o in (got, want))
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)
    inputs = [t for t in inputs if t is not None]
    if inputs:
        totals = [sum((o * torch.cos(torch.arange(o.numel()).view(o.shape))).sum() for o in out) for out in (got, want)]
        for g, w in zip(*(torch.autograd.grad(t, inputs, allow_unused=True) for t in totals), strict=True):
            assert (g is None) == (w is None)
            if w is not None:
                torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-8)


def convolution(x, weight, bias=None, act=True, before=None, seq_idx=None):
    """(B, D, L): y_t = act(bias + sum_k w_k x_(t - K + 1 + k)), of steps of the same sequence."""
    taps = weight.shape[1]
    before = x.new_zeros(*x.shape[:2], taps - 1) if before is None else before
    padded, columns = torch.cat([before, x], -1), []
    for t in range(x.shape[2]):
        total = torch.zeros_like(x[..., 0]) if bias is None else bias.expand_as(x[..., 0])
        for k in range(taps):
            source = t - taps + 1 + k
            term = padded[..., t + k] * weight[:, k]
            if seq_idx is not None:
                same = (seq_idx[:, source] == seq_idx[:, t]) if source >= 0 else torch.zeros(len(x), dtype=bool)
                term = term * same[:, None]
            total = total + term
        columns.append(total / (1 + torch.exp(-total)) if act else total)
    return torch.stack(columns, -1), padded[..., padded.shape[2] - taps + 1 :]


def scan(u, dt, A, B, C, D=None, z=None, bias=None, softplus=False, limit=None, state=None, new=None):
    """One channel each: u, dt, z (B, L, D); A (D, N); B, C (B, L, D, N). new: (B, L), where a sequence begins."""
    state = u.new_zeros(u.shape[0], *A.shape) if state is None else state
    ys = []
    for t in range(u.shape[1]):
        step = dt[:, t] if bias is None else dt[:, t] + bias
        step = torch.log1p(torch.exp(step)) if softplus else step
        step = step if limit is None else step.clamp(*limit)
        if new is not None:
            state = state * (~new[:, t])[:, None, None]
        state = torch.exp(step[..., None] * A) * state + (step * u[:, t])[..., None] * B[:, t]
        y = (state * C[:, t]).sum(-1)
        y = y if D is None else y + D * u[:, t]
        ys.append(y if z is None else y * F.silu(z[:, t]))
    return torch.stack(ys, 1), state


def scan_of_heads(x, dt, A, B, C, D=None, z=None, bias=None, **options):
    """Mamba-2 as a Mamba-1 whose channels of a head share A and dt."""
    heads, headdim, n = *x.shape[2:], B.shape[-1]

    def each(t):
        return None if t is None else t.repeat_interleave(headdim, -1)

    def of_channels(m):
        return m.repeat_interleave(heads * headdim // m.shape[2], 2)

    D = D.flatten() if D is not None and D.dim() == 2 else each(D)
    z = None if z is None else z.flatten(2)
    A = each(A)[:, None].expand(-1, n)
    y, state = scan(x.flatten(2), each(dt), A, of_channels(B), of_channels(C), D, z, each(bias), **options)
    return y.view(x.shape), state.view(len(x), heads, headdim, n)


def begins(seq_idx):
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("case", ["plain", "states", "given", "packed"])
def test_causal_conv1d_fn(activation, case):
    x, weight, bias = leaf(BATCH, DIM, LENGTH), leaf(DIM, WIDTH), leaf(DIM)
    before = leaf(BATCH, DIM, WIDTH - 1) if case in ("states", "given") else None
    options = {"seq_idx": SEQ_IDX} if case == "packed" else {}
    want, final = convolution(x, weight, bias, activation is not None, before, **options)
    if case in ("states", "given"):
        options = {"initial_states": before, "return_final_states": True}
        out = torch.empty(BATCH, DIM, WIDTH - 1, dtype=torch.float64)
        options |= {"final_states_out": out} if case == "given" else {}
        want = (want, final)
    got = compat.causal_conv1d_fn(x, weight, bias, activation=activation, **options)
    if case == "given":
        assert got[1] is out
    assert_same(got, want, x, weight, bias, before)


def test_causal_conv1d_fn_gives_zero_where_seq_idx_is_negative():
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, -1, -1]]).repeat(BATCH, 1)
    y = compat.causal_conv1d_fn(leaf(BATCH, DIM, LENGTH), leaf(DIM, WIDTH), leaf(DIM), seq_idx)
    assert not y[..., 5:].any() and y[..., :5].all()


@pytest.mark.parametrize("steps", [None, 1, 2, 6])
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
def test_causal_conv1d_update_continues_the_convolution(steps, size, ring, indexed):
    weight, bias = leaf(DIM, WIDTH).detach(), leaf(DIM).detach()
    x = leaf(BATCH, DIM, 12).detach()
    want = convolution(x, weight, bias)[0]
    rows = torch.tensor([3, 1]) if indexed else None
    state = torch.full((5 if indexed else BATCH, DIM, size), torch.nan, dtype=torch.float64)
    state[slice(None) if rows is None else rows] = 0
    for t in range(0, 12, steps or 1):
        part = x[..., t] if steps is None else x[..., t : t + steps]
        seen = torch.full((BATCH,), t, dtype=torch.int32) if ring else None
        got = compat.causal_conv1d_update(part, state, weight, bias, "silu", seen, rows)
        torch.testing.assert_close(got, want[..., t] if steps is None else want[..., t : t + steps])
    last = state if rows is None else state[rows]
    if ring:
        last = last.roll(-(12 % size), -1)
    torch.testing.assert_close(last, x[..., 12 - size :])
    if indexed:
        assert state[[0, 2, 4]].isnan().all()


@pytest.mark.parametrize("kind", ["constant", "shared", "groups"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("softplus", [False, True])
def test_selective_scan_fn(kind, full, softplus):
    u, delta, A = leaf(BATCH, DIM, LENGTH), leaf(BATCH, DIM, LENGTH, seed=1, scale=0.3), negative_leaf(DIM, STATE)
    shape = {"constant": (DIM, STATE), "shared": (BATCH, STATE, LENGTH), "groups": (BATCH, 2, STATE, LENGTH)}[kind]
    B, C = leaf(*shape, seed=2), leaf(*shape, seed=3)
    D, z, bias = (leaf(DIM), leaf(BATCH, DIM, LENGTH, seed=4), leaf(DIM, seed=5)) if full else (None, None, None)

    def each(m):
        if kind == "constant":
            return m.expand(BATCH, LENGTH, -1, -1)
        m = m.unsqueeze(1) if kind == "shared" else m
        return m.repeat_interleave(DIM // m.shape[1], 1).permute(0, 3, 1, 2)

    swapped = [None if t is None else t.transpose(1, 2) for t in (u, delta, z)]
    y, last = scan(*swapped[:2], A, each(B), each(C), D, swapped[2], bias, softplus)
    got = compat.selective_scan_fn(u, delta, A, B, C, D, z, bias, softplus, return_last_state=True)
    assert_same(got, (y.transpose(1, 2), last), u, delta, A, B, C, D, z, bias)
    assert compat.selective_scan_fn(u, delta, A, B, C, D, z, bias, softplus).equal(got[0])


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("case", ["computed", "constant", "biases", "norms"])
def test_mamba_inner_fn(level, case):
    rank, width = 2, 5
    xz, conv, conv_bias = leaf(BATCH, 2 * DIM, LENGTH), leaf(DIM, 1, WIDTH), leaf(DIM)
    x_proj, dt_proj = leaf(rank + 2 * STATE, DIM, scale=0.5), leaf(DIM, rank)
    out, out_bias = leaf(width, DIM), leaf(width)
    A, D, dt_bias = negative_leaf(DIM, STATE), leaf(DIM, seed=6), leaf(DIM, seed=7)
    B, C = (leaf(DIM, STATE, seed=8), leaf(DIM, STATE, seed=9)) if case == "constant" else (None, None)
    options = {}
    if case == "biases":
        options = {"B_proj_bias": leaf(STATE, seed=10), "C_proj_bias": leaf(STATE, seed=11)}
    if case == "norms":
        weights = {"b_rms_weight": STATE, "c_rms_weight": STATE, "dt_rms_weight": DIM}
        options = {name: leaf(n, seed=i) for i, (name, n) in enumerate(weights.items())}

    x = convolution(xz[:, :DIM], conv[:, 0], conv_bias)[0].transpose(1, 2)
    dt, *matrices = (x @ x_proj.T).split([rank, STATE, STATE], -1)
    for i, name in enumerate("BC"):
        matrices[i] = matrices[i] + options.get(f"{name}_proj_bias", 0)

    def normed(t, weight):
        return t if weight is None else t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    dt = normed(dt @ dt_proj.T, options.get("dt_rms_weight"))
    matrices = [normed(m, options.get(f"{n}_rms_weight"))[:, :, None] for m, n in zip(matrices, "bc", strict=True)]
    if case == "constant":
        matrices = [m.expand(BATCH, LENGTH, -1, -1) for m in (B, C)]
    y = scan(x, dt, A, *matrices, D, xz[:, DIM:].transpose(1, 2), dt_bias, True)[0]
    arguments = (xz, conv, conv_bias, x_proj, dt_proj, out, out_bias, A, B, C, D, dt_bias)
    got = compat.mamba_inner_fn(*arguments, checkpoint_lvl=level, **options)
    assert_same(got, y @ out.T + out_bias, *arguments, *options.values())
    torch.testing.assert_close(compat.mamba_inner_ref(*arguments, **options), got)


@pytest.mark.parametrize("heads", ["no", "tied", "free"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_selective_state_update(heads, full, indexed, dtype):
    groups = 1 if heads == "no" else GROUPS
    each = (DIM,) if heads == "no" else (HEADS, HEADDIM)
    with torch.no_grad():
        state, x = leaf(BATCH, *each, STATE), leaf(BATCH, *each, seed=1)
        if heads == "tied":
            A = negative_leaf(HEADS)[:, None, None].expand(*each, STATE)
            dt, bias = (leaf(*s, seed=2)[..., None].expand(*s, HEADDIM) for s in ((BATCH, HEADS), (HEADS,)))
        else:
            A, dt, bias = negative_leaf(*each, STATE), leaf(BATCH, *each, seed=2), leaf(*each, seed=3)
        shape = (BATCH, STATE) if heads == "no" else (BATCH, GROUPS, STATE)
        B, C = leaf(*shape, seed=4), leaf(*shape, seed=5)
        D, z, bias = (leaf(*each, seed=6), leaf(BATCH, *each, seed=7), bias) if full else (None, None, None)
        channels = math.prod(each)
        B1, C1 = (m.view(BATCH, 1, groups, STATE).repeat_interleave(channels // groups, 2) for m in (B, C))
        state = state.to(dtype)
        y, after = scan(
            x.reshape(BATCH, 1, -1), dt.reshape(BATCH, 1, -1), A.reshape(-1, STATE), B1, C1,
            None if D is None else D.flatten(), None if z is None else z.reshape(BATCH, 1, -1),
            None if bias is None else bias.flatten(), True, state=state.double().view(BATCH, -1, STATE),
        )  # fmt: skip
    rows = torch.tensor([2, 0]) if indexed else None
    whole = torch.full((4, *state.shape[1:]), torch.nan, dtype=dtype) if indexed else state.clone()
    if indexed:
        whole[rows] = state
    got = compat.selective_state_update(whole, x, dt, A, B, C, D, z, bias, True, rows)
    loose = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-9, "atol": 1e-9}
    tight = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.bfloat16 else loose
    torch.testing.assert_close(got, y.view(got.shape), **tight)
    torch.testing.assert_close((whole[rows] if indexed else whole).double(), after.view(state.shape), **loose)
    if indexed:
        assert whole[[1, 3]].isnan().all()


def test_selective_state_update_writes_into_a_state_of_any_strides():
    state = torch.zeros(STATE, HEADDIM, HEADS, BATCH, dtype=torch.float64).permute(3, 2, 1, 0)
    each = (BATCH, HEADS, HEADDIM)
    arguments = (leaf(*each), leaf(*each, seed=1), negative_leaf(*each[1:], STATE), *(leaf(BATCH, 2, STATE),) * 2)
    other = state.contiguous()
    assert compat.selective_state_update(state, *arguments).equal(compat.selective_state_update(other, *arguments))
    assert state.equal(other) and state.all()


def ssd_inputs(batch=BATCH):
    return {
        "x": leaf(batch, LENGTH, HEADS, HEADDIM),
        "dt": leaf(batch, LENGTH, HEADS, seed=1),
        "A": negative_leaf(HEADS),
        "B": leaf(batch, LENGTH, GROUPS, STATE, seed=2),
        "C": leaf(batch, LENGTH, GROUPS, STATE, seed=3),
    }


@pytest.mark.parametrize("wide_D", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_mamba_chunk_scan_combined(wide_D, packed):
    inputs = ssd_inputs()
    D, z = leaf(HEADS, HEADDIM) if wide_D else leaf(HEADS), leaf(BATCH, LENGTH, HEADS, HEADDIM, seed=4)
    bias, before = leaf(HEADS, seed=5), leaf(BATCH, HEADS, HEADDIM, STATE)
    limit = (0.4, 1.5)
    new = begins(SEQ_IDX) if packed else None
    want = scan_of_heads(**inputs, D=D, z=z, bias=bias, softplus=True, limit=limit, state=before.flatten(1, 2), new=new)
    got = compat.mamba_chunk_scan_combined(
        *inputs.values(), 4, D, z, bias, before, SEQ_IDX if packed else None, dt_softplus=True, dt_limit=limit,
        return_final_states=True,
    )  # fmt: skip
    assert_same(got, want, *inputs.values(), D, z, bias, before)


def test_mamba_chunk_scan_combined_without_options():
    inputs = ssd_inputs()
    inputs["dt"] = inputs["dt"].detach().abs()
    assert_same(compat.mamba_chunk_scan_combined(*inputs.values(), 4), scan_of_heads(**inputs)[0], inputs["x"])


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("initial", [False, True])
def test_varlen_states_are_those_of_each_sequence_alone(final, initial):
    inputs = {n: t if n == "A" else t.detach().abs() for n, t in ssd_inputs(1).items()}
    bounds = [0, 3, 4, 7]
    before = leaf(1, HEADS, HEADDIM, STATE) if initial else None
    seq_idx = torch.tensor([[0, 0, 0, 1, 2, 2, 2]])
    ys, states = [], []
    for first, last in zip(bounds, bounds[1:], strict=False):
        part = {n: t if n == "A" else t[:, first:last] for n, t in inputs.items()}
        start = before.flatten(1, 2) if initial and first == 0 else None
        y, state = scan_of_heads(**part, state=start)
        ys.append(y), states.append(state)
    y, *rest = compat.mamba_chunk_scan_combined(
        *inputs.values(), 4, initial_states=before, seq_idx=seq_idx, cu_seqlens=torch.tensor(bounds),
        return_final_states=final, return_varlen_states=True,
    )  # fmt: skip
    torch.testing.assert_close(y, torch.cat(ys, 1))
    torch.testing.assert_close(rest[-1], torch.cat(states))
    assert len(rest) == 1 + final
    if final:
        torch.testing.assert_close(rest[0], states[-1])


@pytest.mark.parametrize("norm", ["none", "before", "after"])
@pytest.mark.parametrize("mlp", [0, 2])
@pytest.mark.parametrize("case", ["projected", "wide D", "packed"])
def test_mamba_split_conv1d_scan_combined(norm, mlp, case):
    inner, shared, width = HEADS * HEADDIM, GROUPS * STATE, 5
    zxbcdt = leaf(BATCH, LENGTH, 2 * mlp + 2 * inner + 2 * shared + HEADS)
    conv, conv_bias = leaf(inner + 2 * shared, WIDTH, scale=0.5), leaf(inner + 2 * shared)
    dt_bias, A = leaf(HEADS, seed=1), negative_leaf(HEADS)
    D = leaf(HEADS, HEADDIM) if case == "wide D" else leaf(HEADS, seed=2)
    weight = None if norm == "none" else leaf(inner)
    out = out_bias = None
    if case == "projected":
        out, out_bias = leaf(width, mlp + inner), leaf(width)
    before = leaf(BATCH, HEADS, HEADDIM, STATE)
    seq_idx = SEQ_IDX if case == "packed" else None

    gated, z, xBC, dt = zxbcdt.split([2 * mlp, inner, inner + 2 * shared, HEADS], -1)
    xBC = convolution(xBC.transpose(1, 2), conv, conv_bias, seq_idx=seq_idx)[0].transpose(1, 2)
    x, B, C = xBC.split([inner, shared, shared], -1)
    new = None if seq_idx is None else begins(seq_idx)
    y, state = scan_of_heads(
        x.unflatten(-1, (HEADS, HEADDIM)), dt, A, B.unflatten(-1, (GROUPS, STATE)), C.unflatten(-1, (GROUPS, STATE)),
        D, bias=dt_bias, softplus=True, limit=(0.1, 2.0), state=before.flatten(1, 2), new=new,
    )  # fmt: skip
    y = y.flatten(2)
    y = y if norm == "before" else y * F.silu(z)
    if norm != "none":
        grouped = y.unflatten(-1, (GROUPS, -1))
        y = (grouped / (grouped.square().mean(-1, keepdim=True) + 1e-3).sqrt()).flatten(-2) * weight
    y = y * F.silu(z) if norm == "before" else y
    y = torch.cat([F.silu(gated[..., :mlp]) * gated[..., mlp:], y], -1)
    y = y if out is None else y @ out.T + out_bias
    got = compat.mamba_split_conv1d_scan_combined(
        zxbcdt, conv, conv_bias, dt_bias, A, D, 4, before, seq_idx, (0.1, 2.0), True, "silu", weight, 1e-3, out,
        out_bias, None if case == "wide D" else HEADDIM, GROUPS, norm == "before",
    )  # fmt: skip
    assert_same(got, (y, state), zxbcdt, conv, conv_bias, dt_bias, A, D, weight, out, out_bias, before)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("gate", ["no", "before", "after"])
@pytest.mark.parametrize("group_size", [None, 3])
def test_rmsnorm_fn(has_bias, gate, group_size):
    x, weight, bias = leaf(BATCH, LENGTH, DIM), leaf(DIM), leaf(DIM, seed=1) if has_bias else None
    z = None if gate == "no" else leaf(BATCH, LENGTH, DIM, seed=2)
    y = x * F.silu(z) if gate == "before" else x
    y = y.unflatten(-1, (-1, group_size or DIM))
    y = (y / (y.square().mean(-1, keepdim=True) + 0.01).sqrt()).flatten(-2) * weight + (bias if has_bias else 0)
    y = y * F.silu(z) if gate == "after" else y
    got = compat.rmsnorm_fn(x, weight, bias, z, 0.01, group_size, norm_before_gate=gate == "after")
    assert_same(got, y, x, weight, bias, z)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("case", ["plain", "residual", "second", "rowscale", "dropout", "everything"])
@pytest.mark.parametrize("prenorm", [False, True])
def test_layer_norm_fn(rms, case, prenorm):
    x, weight, bias = leaf(BATCH, LENGTH, DIM), leaf(DIM), None if case == "plain" else leaf(DIM, seed=1)
    residual = leaf(BATCH, LENGTH, DIM, seed=2) if case in ("residual", "everything") else None
    x1 = leaf(BATCH, LENGTH, DIM, seed=3) if case in ("second", "everything") else None
    weight1, bias1 = (leaf(DIM, seed=4), leaf(DIM, seed=5)) if case in ("second", "everything") else (None, None)
    rowscale = leaf(BATCH, LENGTH, seed=6) if case == "rowscale" else None
    p = 0.5 if case in ("dropout", "everything") else 0.0
    options = {"eps": 0.01, "dropout_p": p, "prenorm": prenorm, "is_rms_norm": rms, "return_dropout_mask": True}
    arguments = (x, weight, bias, residual, x1, weight1, bias1)
    *got, mask, mask1 = compat.layer_norm_fn(*arguments, rowscale=rowscale, **options)

    assert (mask is None) == (p == 0) and (mask1 is None) == (p == 0 or x1 is None)
    total = x if rowscale is None else x * rowscale[..., None]
    if p:
        assert 0.2 < mask.double().mean() < 0.8
        total = total * mask / 0.5
    if x1 is not None:
        total = total + (x1 * mask1 / 0.5 if p else x1)
    total = total if residual is None else total + residual
    centered = total if rms else total - total.mean(-1, keepdim=True)
    normed = centered / (centered.square().mean(-1, keepdim=True) + 0.01).sqrt()
    want = [normed * weight + (0 if bias is None else bias)]
    want += [normed * weight1 + bias1] if weight1 is not None else []
    want += [total] if prenorm else []
    assert_same(tuple(got), tuple(want), *arguments, rowscale)


def test_the_residual_stream_has_the_requested_dtype():
    x, weight = leaf(3, DIM).detach().bfloat16(), torch.ones(DIM)
    for is_rms in (False, True):
        y, total = compat.layer_norm_fn(x, weight, None, prenorm=True, residual_in_fp32=True, is_rms_norm=is_rms)
        assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32) and total.equal(x.float())
        y, total = compat.layer_norm_fn(x, weight, None, residual=x.double(), prenorm=True, is_rms_norm=is_rms)
        assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float64)
    assert compat.rms_norm_fn(x, weight, None).equal(compat.layer_norm_fn(x, weight, None, is_rms_norm=True))


X, WEIGHT, ROW = torch.ones(2, 3, 5), torch.ones(3, 4), torch.zeros(2, 5, dtype=torch.int32)
STATE_3 = torch.zeros(2, 3, 3)
SSD = (torch.ones(1, 4, 2, 3), torch.ones(1, 4, 2), -torch.ones(2), torch.ones(1, 4, 1, 2), torch.ones(1, 4, 1, 2))
INNER = (torch.ones(1, 4, 3), torch.ones(2, 1, 4), None, torch.ones(5, 2), torch.ones(2, 1), torch.ones(3, 2), None)
SPLIT = (torch.ones(1, 4, 18), torch.ones(10, 4), None, torch.ones(2), -torch.ones(2))


@pytest.mark.parametrize(
    ("error", "name", "call"),
    [
        (NotImplementedError, "activation", lambda: compat.causal_conv1d_fn(X, WEIGHT, activation="gelu")),
        (ValueError, "initial_states", lambda: compat.causal_conv1d_fn(X, WEIGHT, None, ROW, STATE_3)),
        (ValueError, "return_final_states", lambda: compat.causal_conv1d_fn(X, WEIGHT, None, ROW, None, True)),
        (ValueError, "final_states_out", lambda: compat.causal_conv1d_fn(X, WEIGHT, final_states_out=STATE_3)),
        (ValueError, "conv_state", lambda: compat.causal_conv1d_update(X, torch.zeros(2, 3, 2), WEIGHT)),
        (
            ValueError,
            "conv_state_indices",
            lambda: compat.causal_conv1d_update(X, STATE_3, WEIGHT, conv_state_indices=torch.tensor([0, 2])),
        ),
        (
            ValueError,
            "state_batch_indices",
            lambda: compat.selective_state_update(
                STATE_3, X[..., 0], X[..., 0], -torch.ones(3, 3), STATE_3[0, :2], STATE_3[0, :2],
                state_batch_indices=torch.tensor([0, 2]),
            ),
        ),
        (ValueError, "dt", lambda: compat.selective_state_update(STATE_3, X[..., 0], X[:1, :, 0], *(WEIGHT,) * 3)),
        (ValueError, "dt_rms_weight", lambda: compat.mamba_inner_fn(*INNER, -torch.ones(2, 2), dt_rms_weight=X[0, 0])),
        (TypeError, "state_dtype", lambda: compat.mamba_chunk_scan_combined(*SSD, 4, state_dtype=torch.int8)),
        (
            NotImplementedError,
            "state_dtype",
            lambda: compat.mamba_chunk_scan_combined(*SSD, 4, state_dtype=torch.float64),
        ),
        (
            NotImplementedError,
            "state_dtype",
            lambda: compat.mamba_split_conv1d_scan_combined(
                *SPLIT, torch.ones(2, 3), 4, state_dtype=torch.float64
            ),
        ),
        (ValueError, "group_size", lambda: compat.layernorm_fn(X, X[0, 0], None, group_size=2)),
        (ValueError, "state_len", lambda: compat.causal_conv1d_varlen_states(X[0], ROW[0], 0)),
        (TypeError, "cu_seqlens", lambda: compat.causal_conv1d_varlen_states(X[0], X[0, 0], 1)),
        (ValueError, "block_len", lambda: compat.ssd_minimal_discrete(*(SSD[i] for i in (0, 1, 3, 4)), 3)),
        (ValueError, "u must", lambda: compat.selective_scan_fn(X[0], X, WEIGHT, X, X)),
        (ValueError, "checkpoint_lvl", lambda: compat.mamba_inner_fn(*INNER, -torch.ones(2, 2), checkpoint_lvl=2)),
        (ValueError, "xz", lambda: compat.mamba_inner_fn(torch.ones(4), *INNER[1:], -torch.ones(2, 2))),
        (
            ValueError,
            "B_proj_bias",
            lambda: compat.mamba_inner_fn(*INNER, -torch.ones(2, 2), torch.ones(2, 2), B_proj_bias=torch.ones(2)),
        ),
        (
            ValueError,
            "c_rms_weight",
            lambda: compat.mamba_inner_fn(*INNER, -torch.ones(2, 2), C=torch.ones(2, 2), c_rms_weight=torch.ones(2)),
        ),
        (ValueError, "cu_seqlens needs", lambda: compat.mamba_chunk_scan_combined(*SSD, 4, cu_seqlens=ROW[0])),
        (ValueError, "return_varlen_s", lambda: compat.mamba_chunk_scan_combined(*SSD, 4, return_varlen_states=True)),
        (ValueError, "headdim", lambda: compat.mamba_split_conv1d_scan_combined(*SPLIT, torch.ones(2), 4)),
        (
            ValueError,
            "ngroups",
            lambda: compat.mamba_split_conv1d_scan_combined(*SPLIT, torch.ones(2), 4, headdim=3, ngroups=3),
        ),
        (
            ValueError,
            "outproj_bias",
            lambda: compat.mamba_split_conv1d_scan_combined(*SPLIT, torch.ones(2, 3), 4, outproj_bias=torch.ones(2)),
        ),
        (
            NotImplementedError,
            "activation",
            lambda: compat.mamba_split_conv1d_scan_combined(*SPLIT, torch.ones(2, 3), 4, activation="relu"),
        ),
        (ValueError, "rowscale", lambda: compat.layer_norm_fn(X, X[0, 0], None, x1=X, rowscale=X[..., 0])),
        (ValueError, "bias1", lambda: compat.layer_norm_fn(X, X[0, 0], None, bias1=X[0, 0])),
        (ValueError, "dropout_p", lambda: compat.layer_norm_fn(X, X[0, 0], None, dropout_p=1.0)),
    ],
)  # fmt: skip
def test_unsupported_arguments_are_refused_by_name(error, name, call):
    with pytest.raises(error, match=name):
        call()


SIGNATURES = {
    "causal_conv1d_fn": "x weight bias seq_idx initial_states return_final_states final_states_out activation",
    "causal_conv1d_update": "x conv_state weight bias activation cache_seqlens conv_state_indices",
    "selective_scan_fn": "u delta A B C D z delta_bias delta_softplus return_last_state",
    "mamba_inner_fn": "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight out_proj_weight out_proj_bias A B "
    "C D delta_bias B_proj_bias C_proj_bias delta_softplus checkpoint_lvl b_rms_weight c_rms_weight dt_rms_weight "
    "b_c_dt_rms_eps",
    "selective_state_update": "state x dt A B C D z dt_bias dt_softplus state_batch_indices",
    "mamba_chunk_scan_combined": "x dt A B C chunk_size D z dt_bias initial_states seq_idx cu_seqlens dt_softplus "
    "dt_limit return_final_states return_varlen_states state_dtype",
    "mamba_split_conv1d_scan_combined": "zxbcdt conv1d_weight conv1d_bias dt_bias A D chunk_size initial_states "
    "seq_idx dt_limit return_final_states activation rmsnorm_weight rmsnorm_eps outproj_weight outproj_bias headdim "
    "ngroups norm_before_gate state_dtype",
    "layernorm_fn": "x weight bias z eps group_size norm_before_gate is_rms_norm",
    "rmsnorm_fn": "x weight bias z eps group_size norm_before_gate",
    "layer_norm_fn": "x weight bias residual x1 weight1 bias1 eps dropout_p rowscale prenorm residual_in_fp32 "
    "is_rms_norm return_dropout_mask",
    "Mamba": "d_model d_state d_conv expand dt_rank dt_min dt_max dt_init dt_scale dt_init_floor conv_bias bias "
    "use_fast_path layer_idx device dtype",
    "Mamba2": "d_model d_state d_conv conv_init expand headdim d_ssm ngroups A_init_range D_has_hdim rmsnorm "
    "norm_before_gate dt_min dt_max dt_init_floor dt_limit bias conv_bias chunk_size use_mem_eff_path layer_idx "
    "process_group sequence_parallel device dtype",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_come_in_the_original_order(name):
    assert list(inspect.signature(getattr(compat, name)).parameters) == SIGNATURES[name].split()


def test_mixers_have_the_published_parameters():
    d, e, n, r = 32, 64, 8, 2
    shapes = {
        "A_log": (e, n), "D": (e,), "in_proj.weight": (2 * e, d), "conv1d.weight": (e, 1, 4), "conv1d.bias": (e,),
        "x_proj.weight": (r + 2 * n, e), "dt_proj.weight": (e, r), "dt_proj.bias": (e,), "out_proj.weight": (d, e),
    }  # fmt: skip
    mixer = compat.Mamba(d, n, dt_init="constant", dt_scale=2.0, layer_idx=3, dtype=torch.bfloat16)
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == shapes
    wide = {name for name, p in mixer.named_parameters() if p.dtype == torch.float32}
    assert wide == {"A_log", "D"} and mixer.layer_idx == 3 and mixer.A_log._no_weight_decay
    assert mixer.dt_proj.weight.unique().tolist() == [2 * torch.tensor(2.0**-0.5).bfloat16().item()]
    h, channels = 4, e + 2 * n
    shapes = {
        "dt_bias": (h,), "A_log": (h,), "D": (h,), "in_proj.weight": (e + channels + h, d),
        "conv1d.weight": (channels, 1, 4), "conv1d.bias": (channels,), "norm.weight": (e,), "out_proj.weight": (d, e),
    }  # fmt: skip
    mixer = compat.Mamba2(d, n, headdim=16, conv_init=1e-3)
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == shapes
    assert 0 < mixer.conv1d.weight.abs().max() <= 1e-3


def test_the_mixer_is_its_inner_function():
    """The module and the function that the original module calls have the same results for the same parameters."""
    mixer, x = compat.Mamba(16, 4).double(), leaf(2, 5, 16)
    inner = compat.mamba_inner_fn(
        mixer.in_proj(x).transpose(1, 2), mixer.conv1d.weight, mixer.conv1d.bias, mixer.x_proj.weight,
        mixer.dt_proj.weight, mixer.out_proj.weight, None, -mixer.A_log.exp(), D=mixer.D, delta_bias=mixer.dt_proj.bias,
    )  # fmt: skip
    torch.testing.assert_close(mixer(x), inner, rtol=1e-6, atol=1e-9)


@pytest.mark.triton
@pytest.mark.parametrize("fused", [False, True])
def test_autocast_is_left_before_the_backward(backend, fused):
    """Activations that the backward recomputes have the dtypes of the forward."""
    mixer, x = compat.Mamba(16, 4), torch.randn(1, 5, 16)
    with torch.autocast("cpu", torch.bfloat16), use_backend(backend):
        if fused:
            y = compat.mamba_inner_fn(
                mixer.in_proj(x).transpose(1, 2), mixer.conv1d.weight, mixer.conv1d.bias, mixer.x_proj.weight,
                mixer.dt_proj.weight, mixer.out_proj.weight, None, -mixer.A_log.exp(), D=mixer.D,
                delta_bias=mixer.dt_proj.bias,
            )  # fmt: skip
        else:
            y = mixer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


def test_mamba2_takes_rows_side_by_side_and_packs():
    mixer, x = compat.Mamba2(16, 4, headdim=8, chunk_size=4), torch.randn(2, 7, 16)
    torch.testing.assert_close(mixer(x.flatten(0, 1), seqlen=7), mixer(x).flatten(0, 1))
    packed = mixer(x, seq_idx=SEQ_IDX)
    segments = [torch.cat([mixer(x[:1, a:b]) for a, b in ((0, 3), (3, 7))], 1)]
    segments.append(torch.cat([mixer(x[1:, a:b]) for a, b in ((0, 1), (1, 4), (4, 7))], 1))
    torch.testing.assert_close(packed, torch.cat(segments))

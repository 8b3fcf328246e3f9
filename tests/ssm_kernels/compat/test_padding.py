"""Negative indices and numbers are padding: zeros come out, and nothing that is kept is touched."""

from __future__ import annotations

import pytest
import torch

from ssm_kernels import use_backend
from ssm_kernels.compat import mamba_ssm as compat
from ssm_kernels.compat.mamba_ssm import _shared, causal_conv1d, state_update

pytestmark = pytest.mark.triton

DIM, STATE, WIDTH, POOL = 6, 3, 4, 5
INDICES = [[1, -1, 3], [-1, -1, 0], [4, 2, -7], [-1, -1, -1], [2, 0, 1]]


@pytest.fixture(params=["values read", "values not read"])
def rows(request, monkeypatch):
    """On a GPU no index is read on the host; here the check of indices is taken away instead."""
    if request.param == "values not read":
        for module in (causal_conv1d, state_update):
            monkeypatch.setattr(module, "_rows", lambda name, indices, state, x: len(state))


def pool_of_states(*shape):
    return torch.randn(POOL, *shape, generator=torch.Generator().manual_seed(7))


def assert_padded(update, pool, indices, *inputs):
    """Valid rows are as without the padded ones; padded rows are zero; other states are as they were."""
    before, y = pool.clone(), update(pool, *inputs, torch.tensor(indices))
    valid = [i for i, row in enumerate(indices) if row >= 0]
    alone = before.clone()
    if valid:
        want = update(alone, *(t[valid] for t in inputs), torch.tensor([indices[i] for i in valid]))
        torch.testing.assert_close(y[valid], want)
    torch.testing.assert_close(pool, alone)
    touched = [row for row in indices if row >= 0]
    others = [row for row in range(POOL) if row not in touched]
    assert pool[others].equal(before[others])
    padded = [i for i, row in enumerate(indices) if row < 0]
    assert not y[padded].any()


@pytest.mark.parametrize("indices", INDICES)
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("steps", [None, 2])
def test_conv_state_indices(backend, rows, indices, ring, steps):
    weight, bias = torch.randn(DIM, WIDTH), torch.randn(DIM)
    x, seen = torch.randn(3, DIM, *([] if steps is None else [steps])), torch.tensor([3, 9, 4], dtype=torch.int32)
    x[[i for i, row in enumerate(indices) if row < 0]] = torch.nan

    def update(pool, x, seen, indices):
        cache = seen if ring else None
        return compat.causal_conv1d_update(x, pool, weight, bias, "silu", cache, indices)

    with use_backend(backend):
        assert_padded(update, pool_of_states(DIM, WIDTH), indices, x, seen)


@pytest.mark.parametrize("indices", INDICES)
@pytest.mark.parametrize("kind", ["channels", "heads", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_batch_indices(backend, rows, indices, kind, dtype):
    each = (DIM,) if kind == "channels" else (2, 3)
    x, z = torch.randn(3, *each), torch.randn(3, *each)
    A, dt, bias = -torch.rand(*each, STATE), torch.randn(3, *each), torch.randn(each)
    if kind == "tied":
        A = -torch.rand(2)[:, None, None].expand(*each, STATE)
        dt, bias = torch.randn(3, 2)[..., None].expand(3, 2, 3), torch.randn(2)[:, None].expand(2, 3)
    B, C = torch.randn(3, 1, STATE), torch.randn(3, 1, STATE)
    padded = [i for i, row in enumerate(indices) if row < 0]
    dt = torch.where(torch.tensor([i in padded for i in range(3)]).view(3, *[1] * len(each)), torch.nan, dt)
    if kind == "tied":
        dt = dt[..., :1].expand(3, 2, 3)

    def update(pool, x, dt, B, C, z, indices):
        return compat.selective_state_update(pool, x, dt, A, B, C, torch.ones(each), z, bias, True, indices)

    with use_backend(backend):
        assert_padded(update, pool_of_states(*each, STATE).to(dtype), indices, x, dt, B, C, z)


HEADS, HEADDIM, GROUPS = 4, 3, 2


def scan_inputs(length, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    x, z = randn(1, length, HEADS, HEADDIM), randn(1, length, HEADS, HEADDIM)
    dt, A = randn(1, length, HEADS), -randn(HEADS).exp()
    return {
        "x": x,
        "dt": dt,
        "A": A,
        "B": randn(1, length, GROUPS, STATE),
        "C": randn(1, length, GROUPS, STATE),
        "z": z,
    }


@pytest.mark.parametrize("tail", ["number", "bound", "both"])
@pytest.mark.parametrize("final", [False, True])
def test_a_pack_with_a_padded_tail(backend, tail, final):
    """y is zero in the tail, and the states are those of the sequences without it, whatever the tail holds."""
    length, padding = 9, 3
    inputs = scan_inputs(length + padding)
    bounds, whole = torch.tensor([0, 4, length]), {n: t if n == "A" else t[:, :length] for n, t in inputs.items()}
    seq_idx = torch.tensor([[0] * 4 + [1] * 5])
    for name in ("x", "B", "C", "z"):
        inputs[name] = torch.where(torch.arange(length + padding).view(1, -1, 1, 1) < length, inputs[name], torch.nan)
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    numbers = torch.cat([seq_idx, torch.full((1, padding), 1 if tail == "bound" else -1)], 1)
    packed = tail != "number"  # otherwise there is a state of the row's last sequence, and no bounds

    def scan(inputs, seq_idx):
        return compat.mamba_chunk_scan_combined(
            **inputs, chunk_size=4, D=torch.ones(HEADS), seq_idx=seq_idx, cu_seqlens=bounds if packed else None,
            dt_softplus=True, return_final_states=final or not packed, return_varlen_states=packed,
        )  # fmt: skip

    with use_backend(backend):
        y, *states = scan(leaves, numbers)
        want, *want_states = scan(whole, seq_idx)
        y.sum().backward()
    assert not y[:, length:].any()
    torch.testing.assert_close(y[:, :length], want)
    for got, state in zip(states, want_states, strict=True):
        torch.testing.assert_close(got, state)
    for name, leaf in leaves.items():
        assert leaf.grad.isfinite().all(), name
        assert name == "A" or not leaf.grad[:, length:].any(), name


def test_the_mixer_of_mamba2_with_a_padded_tail(backend):
    inner, channels = HEADS * HEADDIM, HEADS * HEADDIM + 2 * GROUPS * STATE
    zxbcdt = torch.randn(1, 8, inner + channels + HEADS)
    zxbcdt[:, 6:] = torch.nan
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 1, -1, -1]])
    weights = (torch.randn(channels, WIDTH), torch.randn(channels), torch.randn(HEADS), -torch.rand(HEADS))

    def mixer(zxbcdt, seq_idx):
        return compat.mamba_split_conv1d_scan_combined(
            zxbcdt, *weights, torch.ones(HEADS), 4, seq_idx=seq_idx, headdim=HEADDIM, ngroups=GROUPS,
            return_final_states=True,
        )  # fmt: skip

    with use_backend(backend):
        y, state = mixer(zxbcdt.nan_to_num(3.0), seq_idx)
        want, want_state = mixer(zxbcdt[:, :6], seq_idx[:, :6])
    assert not y[:, 6:].any()
    torch.testing.assert_close(y[:, :6], want)
    torch.testing.assert_close(state, want_state)


def test_no_value_is_read_on_the_host():
    """Tensors of the meta device have none."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    indices, x, B = empty(3, dtype=torch.int32), empty(3, DIM), empty(3, STATE)
    pool, weight = empty(POOL, DIM, WIDTH), empty(DIM, WIDTH)
    y = compat.causal_conv1d_update(x, pool, weight, cache_seqlens=indices, conv_state_indices=indices)
    assert y.shape == (3, DIM)
    pool, A = empty(POOL, DIM, STATE), empty(DIM, STATE)
    y = compat.selective_state_update(pool, x, x, A, B, B, state_batch_indices=indices)
    assert y.shape == (3, DIM)
    assert compat.causal_conv1d_varlen_states(empty(9, DIM), indices, WIDTH).shape == (2, DIM, WIDTH)


def test_rows_of_an_empty_batch():
    pool = pool_of_states(DIM, WIDTH)
    chosen = _shared.StateRows.of(torch.empty(0, dtype=torch.int32))
    chosen.write(pool, pool[chosen.rows], pool[chosen.rows])
    assert pool.equal(pool_of_states(DIM, WIDTH))

"""Derivatives beyond the first backward: double backward, forward mode, vmap and their compositions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

from ssm_kernels import (
    add_rms_norm,
    causal_conv1d,
    causal_conv1d_step,
    cross_causal_conv1d,
    cross_merge,
    cross_scan,
    cross_selective_scan,
    cross_ssd,
    rms_norm,
    selective_scan,
    ssd,
    use_backend,
)
from ssm_kernels.modules import Mamba, Mamba2, Mamba3
from ssm_kernels.testing import is_interpreted
from tests.ssm_kernels.makers import leaf, negative_leaf, random_tensor


class Call(NamedTuple):
    """An op as a function of its differentiable tensors alone."""

    op: Callable[..., Tensor | tuple[Tensor, ...]]
    tensors: tuple[Tensor, ...]


CU_SEQLENS = torch.tensor([0, 4, 6])
"""Two sequences of 7 steps, the last of which is padding."""
SEQ_IDX = torch.tensor([[0, -1, 1], [-1, -1, -1]])
"""Padding between two sequences, and a row of padding alone."""


def scan_call(**packing: Tensor) -> Call:
    """Two groups of B, one of C, a length that is no multiple of anything, every optional argument."""
    batch, length = (1, 7) if "cu_seqlens" in packing else (2, 3)
    names = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
    tensors = (
        leaf(batch, length, 4), leaf(batch, length, 4, seed=1), negative_leaf(4, 2), leaf(batch, length, 2, 2),
        leaf(batch, length, 1, 2), leaf(4), leaf(batch, length, 4, seed=2), leaf(4, seed=1), leaf(2, 4, 2),
    )  # fmt: skip
    options = {"dt_softplus": True} | packing
    return Call(
        lambda backend, *t, **more: selective_scan(
            **dict(zip(names, t, strict=True)), **options | more, backend=backend
        ),
        tensors,
    )


def ssd_call(**packing: Tensor) -> Call:
    batch, length = (1, 7) if "cu_seqlens" in packing else (2, 3)
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states", "input_weights")
    tensors = (
        leaf(batch, length, 4, 2), leaf(batch, length, 4), negative_leaf(4), leaf(batch, length, 2, 3),
        leaf(batch, length, 2, 3, seed=1), leaf(4, 2), leaf(batch, length, 4, 2, seed=1), leaf(4, seed=1),
        leaf(2, 4, 2, 3), leaf(batch, length, 4, seed=2),
    )  # fmt: skip
    if not packing:  # the step weighs the inputs where they have no weights of their own
        names, tensors = names[:-1], tensors[:-1]
    options = {"dt_softplus": True, "dt_limit": (0.0, 1.5)} | packing
    return Call(
        lambda backend, *t, **more: ssd(**dict(zip(names, t, strict=True)), **options | more, backend=backend), tensors
    )


def conv_call(**packing: Tensor) -> Call:
    batch, length = (1, 7) if "cu_seqlens" in packing else (2, 3)
    names = ("x", "weight", "bias", "initial_states")
    tensors = (leaf(batch, length, 4), leaf(4, 3), leaf(4), leaf(2, 2, 4))
    options = {"activation": "silu"} | packing
    return Call(
        lambda backend, *t, **more: causal_conv1d(
            **dict(zip(names, t, strict=True)), **options | more, backend=backend
        ),
        tensors,
    )


def norm_call(**options) -> Call:
    tensors = (leaf(3, 6), leaf(6), leaf(3, 6, seed=1))
    return Call(lambda backend, x, weight, z: rms_norm(x, weight, z=z, **options, backend=backend), tensors)


def add_norm_call() -> Call:
    return Call(lambda backend, *t: add_rms_norm(*t, backend=backend), (leaf(3, 6), leaf(6), leaf(3, 6, seed=1)))


def cross_scan_call() -> Call:
    return Call(lambda backend, x: cross_scan(x * x, backend=backend), (leaf(1, 2, 3, 2),))


def cross_merge_call() -> Call:
    return Call(lambda backend, y: cross_merge(y * y, 2, 3, backend=backend), (leaf(1, 4, 6, 2),))


DIRECTIONS = ("rows_reversed", "columns")


def cross_conv_call() -> Call:
    tensors = (leaf(1, 2, 3, 2), leaf(2, 2, 3), leaf(2, 2))
    return Call(lambda backend, *t: cross_causal_conv1d(*t, "silu", DIRECTIONS, backend=backend), tensors)


def cross_selective_scan_call() -> Call:
    grid = (1, 2, 3)
    tensors = (
        leaf(*grid, 2), leaf(*grid, 2, 2), negative_leaf(2, 2, 2), leaf(*grid, 2, 2, seed=1),
        leaf(*grid, 2, 2, seed=2), leaf(2, 2), leaf(2, 2, seed=1),
    )  # fmt: skip
    return Call(lambda backend, *t: cross_selective_scan(*t, True, DIRECTIONS, backend=backend), tensors)


def cross_ssd_call() -> Call:
    grid = (1, 2, 3)
    tensors = (
        leaf(*grid, 2, 2, 2), leaf(*grid, 2, 2), negative_leaf(2, 2), leaf(*grid, 2, 1, 2),
        leaf(*grid, 2, 1, 2, seed=1), leaf(2, 2), leaf(2, 2, seed=1),
    )  # fmt: skip
    return Call(lambda backend, *t: cross_ssd(*t, True, directions=DIRECTIONS, backend=backend), tensors)


CALLS = {
    "selective_scan": scan_call,
    "selective_scan, cu_seqlens": lambda: scan_call(cu_seqlens=CU_SEQLENS),
    "selective_scan, seq_idx": lambda: scan_call(seq_idx=SEQ_IDX),
    "ssd": ssd_call,
    "ssd, cu_seqlens": lambda: ssd_call(cu_seqlens=CU_SEQLENS),
    "ssd, seq_idx": lambda: ssd_call(seq_idx=SEQ_IDX),
    "causal_conv1d": conv_call,
    "causal_conv1d, cu_seqlens": lambda: conv_call(cu_seqlens=CU_SEQLENS),
    "causal_conv1d, seq_idx": lambda: conv_call(seq_idx=SEQ_IDX),
    "rms_norm": norm_call,
    "rms_norm, groups": lambda: norm_call(group_size=2, norm_before_gate=True),
    "add_rms_norm": add_norm_call,
    "cross_scan": cross_scan_call,
    "cross_merge": cross_merge_call,
    "cross_causal_conv1d": cross_conv_call,
    "cross_selective_scan": cross_selective_scan_call,
    "cross_ssd": cross_ssd_call,
}
BACKENDS = ("torch", "numba")
ON_BACKENDS = [
    (b, name) for b in BACKENDS for name in CALLS if b == "torch" or name not in ("cross_scan", "cross_merge")
]


@pytest.fixture(params=ON_BACKENDS, ids=": ".join)
def run(request) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A call on a backend, as a function from tensors to a tuple of results, and its tensors."""
    backend, name = request.param
    if backend == "numba":
        pytest.importorskip("numba")
    call = CALLS[name]()
    return on(backend, call), call.tensors


def on(backend: str, call: Call) -> Callable[..., tuple[Tensor, ...]]:
    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        out = call.op(backend, *tensors)
        return tuple(out) if isinstance(out, tuple) else (out,)

    return run


def loss_of(run: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    """A sum over all results, to which each element contributes a function of its own."""

    def loss(*tensors: Tensor) -> Tensor:
        return torch.stack([torch.sin(t + torch.arange(t.numel()).view_as(t)).sum() for t in run(*tensors)]).sum()

    return loss


def gradients(loss: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients by autograd, under no transform."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(loss(*leaves), leaves)


def test_forward_mode_and_second_derivatives_equal_differences(run):
    function, tensors = run
    assert gradcheck(function, tensors, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, tensors, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("shared", [True, False], ids=["parameters shared", "parameters of each sample"])
def test_gradients_of_samples_equal_a_loop(run, shared):
    """All gradients, of what the samples share too."""
    function, tensors = run
    loss, n = loss_of(function), len(tensors)
    dims = (0, *[None if shared else 0] * (n - 1))
    samples = [
        torch.stack([t, 0.8 * t, 1.1 * t]).detach() if d == 0 else t.detach()
        for t, d in zip(tensors, dims, strict=True)
    ]
    got = vmap(grad(loss, tuple(range(n))), dims)(*samples)
    for i in range(3):
        want = gradients(loss, tuple(t[i] if d == 0 else t for t, d in zip(samples, dims, strict=True)))
        for got_of_all, want_i in zip(got, want, strict=True):
            torch.testing.assert_close(got_of_all[i], want_i)


def hessian_vector_product(loss: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Forward over reverse."""
    n = tuple(range(len(tensors)))
    return jvp(grad(loss, n), tensors, tuple(torch.cos(t) for t in tensors))[1]


def third_derivative(loss: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Tensor:
    """Reverse over reverse over reverse, for the first two tensors."""

    def norm_of_gradient(*t: Tensor) -> Tensor:
        return torch.stack([g.square().sum() for g in grad(loss, (0, 1))(*t)]).sum()

    return grad(lambda *t: grad(norm_of_gradient, 1)(*t).square().sum())(*tensors)


COMPOSITIONS = {
    "hessian-vector product": hessian_vector_product,
    "reverse over forward": lambda f, t: grad(lambda *x: jvp(f, x, tuple(torch.cos(y) for y in t))[1])(*t),
    "third derivative": third_derivative,
    "hessian": lambda f, t: hessian(f, 1)(*t),
    "jacrev of jacrev": lambda f, t: jacrev(jacrev(f, 1), 1)(*t),
    "vmap of hessian": lambda f, t: vmap(hessian(f, 1), (0, *[None] * (len(t) - 1)))(
        t[0].expand(2, *t[0].shape), *t[1:]
    ),
    "vmap of vmap": lambda f, t: vmap(vmap(grad(f, 1), (0, *[None] * (len(t) - 1))), (None, 0, *[None] * (len(t) - 2)))(
        t[0].expand(2, *t[0].shape), t[1].expand(3, *t[1].shape), *t[2:]
    ),
    "grad of vmap": lambda f, t: grad(
        lambda *x: vmap(f, (0, *[None] * (len(t) - 1)))(torch.stack([x[0], 2 * x[0]]), *x[1:]).sum(), 1
    )(*t),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["selective_scan", "ssd", "causal_conv1d", "rms_norm"])
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_compositions_equal_those_of_the_reference(composition, name, backend):
    if backend == "numba":
        pytest.importorskip("numba")
    call = CALLS[name]()
    tensors = tuple(t.detach() for t in call.tensors)
    got, want = (COMPOSITIONS[composition](loss_of(on(b, call)), tensors) for b in (backend, "reference"))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["selective_scan", "ssd", "causal_conv1d"])
def test_each_sample_may_be_packed_in_its_own_way(name, backend):
    if backend == "numba":
        pytest.importorskip("numba")
    tensors = tuple(t.detach() for t in CALLS[name]().tensors)
    samples = torch.stack([tensors[0], 2 * tensors[0]])
    seq_idx = torch.tensor([[[0, 0, 1], [0, 1, 1]], [[0, -1, 1], [-1, 0, 0]]])  # (samples, B, L)

    op = CALLS[name]().op

    def loss(x: Tensor, seq_idx: Tensor) -> Tensor:
        return loss_of(lambda x: op(backend, x, *tensors[1:], seq_idx=seq_idx))(x)

    got = vmap(grad(loss))(samples, seq_idx)
    for got_i, x, idx in zip(got, samples, seq_idx, strict=True):
        torch.testing.assert_close(got_i, grad(loss)(x, idx))
    with pytest.raises(RuntimeError, match="seq_idx is vmapped in forward-mode AD"):
        vmap(lambda x, idx: jvp(lambda x: loss(x, idx), (x,), (x,)))(samples, seq_idx)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "mixer",
    [
        lambda: Mamba(8, d_state=2),
        lambda: Mamba2(8, d_state=4, headdim=4, chunk_size=16),
        lambda: Mamba3(16, d_state=8, headdim=8),
    ],
)
def test_mixers_have_gradients_of_samples_and_gradients_of_gradients(mixer, backend):
    """Those of activations that the backward computes again too."""
    if backend == "numba":
        pytest.importorskip("numba")
    torch.manual_seed(0)
    mixer = mixer().double()
    parameters = {name: p.detach() for name, p in mixer.named_parameters()}
    samples = random_tensor(2, 1, 3, mixer.d_model)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(mixer, parameters, (x,)).square().sum()

    with use_backend(backend):
        got = vmap(grad(loss), (None, 0))(parameters, samples)
        tangents = jvp(lambda x: loss(parameters, x), (samples[0],), (samples[1],))[1]
    penalties = {}
    for chosen in (backend, "reference"):
        with use_backend(chosen):
            x = samples[0].clone().requires_grad_()
            (dx,) = torch.autograd.grad(mixer(x).square().sum(), x, create_graph=True)
            penalties[chosen] = torch.autograd.grad(dx.square().sum(), list(mixer.parameters()), allow_unused=True)
    torch.testing.assert_close(penalties[backend], penalties["reference"])
    torch.testing.assert_close(tangents, (dx * samples[1]).sum())
    for i, x in enumerate(samples):
        want = torch.autograd.grad(mixer(x).square().sum(), list(mixer.parameters()))
        torch.testing.assert_close([g[i] for g in got.values()], list(want))


def test_second_derivatives_of_the_norm_hold_for_any_scale():
    """At zero, and where the third power of 1 / |x| or the square of |x| would leave float32."""
    for scale in (0.0, 1e-3, 1e12, 1e25):
        x, weight = (scale * torch.tensor([[1.0, -2.0, 3.0, 0.5]])), torch.ones(4)

        def loss(x: Tensor) -> Tensor:
            return rms_norm(x, weight, backend="torch")[0, 0]  # noqa: B023

        def loss64(x: Tensor) -> Tensor:
            return rms_norm(x, weight.double(), backend="reference")[0, 0]  # noqa: B023

        got, want = hessian(loss)(x), hessian(loss64)(x.double())
        largest = max(want.abs().max().item(), torch.finfo(torch.float32).tiny)
        assert (got.double() - want).abs().max() <= 1e-5 * largest


def test_a_step_refuses_tangents_that_it_would_drop():
    pytest.importorskip("numba")
    x, weight = random_tensor(1, 4), random_tensor(4, 3)
    with pytest.raises(NotImplementedError, match="causal_conv1d_step has no forward-mode derivative"):
        jvp(lambda x: causal_conv1d_step(random_tensor(1, 2, 4), x, weight, backend="numba"), (x,), (x,))


def test_a_registered_op_itself_has_the_derivatives():
    """Exported and compiled graphs hold it. PyTorch's own registration gives it tangents of zero."""
    x, weight = random_tensor(1, 3, 4), random_tensor(4, 3)

    def run_op(x: Tensor) -> Tensor:
        return torch.ops.ssm_kernels.causal_conv1d_torch(x, weight, None, True, None, None, None)[0].square().sum()

    def loss(x: Tensor) -> Tensor:
        return causal_conv1d(x, weight, activation="silu", backend="torch").y.square().sum()

    compiled = torch.compile(lambda x: jvp(loss, (x,), (x,))[1], backend="aot_eager")
    want = (grad(loss)(x) * x).sum()
    torch.testing.assert_close(jvp(run_op, (x,), (x,))[1], want)
    torch.testing.assert_close(compiled(x), want)
    torch.testing.assert_close(grad(run_op)(x), grad(loss)(x))


@pytest.mark.triton
@pytest.mark.parametrize("name", ["selective_scan", "ssd", "causal_conv1d", "rms_norm", "cross_scan", "cross_merge"])
def test_second_derivatives_and_gradients_of_samples_on_triton(name):
    """One call each: the interpreter takes seconds for it."""
    call = CALLS[name]()
    tensors = tuple(t.detach() for t in call.tensors)
    loss, want_loss = (loss_of(on(b, call)) for b in ("triton" if is_interpreted() else "torch", "reference"))

    def penalty(loss: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        grads = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
        return torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), leaves)

    torch.testing.assert_close(penalty(loss), penalty(want_loss))
    samples = tuple(torch.stack([t, 0.9 * t]) for t in tensors)
    got = vmap(grad(loss, tuple(range(len(tensors)))))(*samples)
    for i in range(2):
        want = gradients(want_loss, tuple(t[i] for t in samples))
        torch.testing.assert_close(tuple(g[i] for g in got), want)

"""Ops and mixers without values: on the meta device, under FakeTensorMode, in compiled and exported graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode

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
    selective_scan_step,
    ssd,
    ssd_step,
    use_backend,
)
from ssm_kernels.modules import Mamba, Mamba2
from ssm_kernels.testing import is_interpreted

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("default_backend")]
# Batches and lengths below and above a chunk; in the interpreter, which takes a second for some steps, below it.
SIZES = ((2, 5), (1, 2)) if is_interpreted() else ((2, 40), (1, 7), (3, 150), (1, 2))


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def calls(batch: int = 2, length: int = 5) -> dict[str, tuple[Callable, dict[str, Tensor]]]:
    """Each op with its tensors by name; the packed forms too."""
    scan = {
        "u": rand(batch, length, 4), "dt": rand(batch, length, 4), "A": -rand(4, 3), "B": rand(batch, length, 2, 3),
        "C": rand(batch, length, 1, 3), "D": rand(4), "z": rand(batch, length, 4), "dt_bias": rand(4),
        "initial_states": rand(batch, 4, 3),
    }  # fmt: skip
    heads = {
        "x": rand(batch, length, 2, 4), "dt": rand(batch, length, 2), "A": -rand(2), "B": rand(batch, length, 1, 3),
        "C": rand(batch, length, 1, 3), "D": rand(2), "z": rand(batch, length, 2, 4), "dt_bias": rand(2),
        "initial_states": rand(batch, 2, 4, 3),
    }  # fmt: skip
    conv = {"x": rand(batch, length, 4), "weight": rand(4, 3), "bias": rand(4), "initial_states": rand(batch, 2, 4)}
    bounds = torch.tensor([0, 2, length])
    seq_idx = (torch.arange(length) // 2).expand(batch, -1)
    now = {k: v[:, 0] if k in ("u", "x", "dt", "B", "C", "z") else v for k, v in scan.items()}
    now_heads = {k: v[:, 0] if k in ("x", "dt", "B", "C", "z") else v for k, v in heads.items()}
    for step in (now, now_heads):
        step["state"] = step.pop("initial_states")
    grid = rand(batch, 3, 2, 4)
    directions = rand(batch, 4, 6, 4)

    def packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = {k: v[:1] if v.shape[:2] == (batch, length) else v for k, v in tensors.items()}
        return rows | {"initial_states": tensors["initial_states"][:2], "cu_seqlens": bounds}

    return {
        "selective_scan": (lambda **t: selective_scan(**t, dt_softplus=True), scan),
        "selective_scan, cu_seqlens": (lambda **t: selective_scan(**t, dt_softplus=True), packed(scan)),
        "selective_scan, seq_idx": (lambda **t: selective_scan(**t, dt_softplus=True), scan | {"seq_idx": seq_idx}),
        "selective_scan_step": (lambda **t: selective_scan_step(**t, dt_softplus=True), now),
        "ssd": (lambda **t: ssd(**t, dt_softplus=True), heads),
        "ssd, cu_seqlens": (lambda **t: ssd(**t, dt_softplus=True), packed(heads)),
        "ssd, seq_idx": (lambda **t: ssd(**t, dt_softplus=True), heads | {"seq_idx": seq_idx}),
        "ssd_step": (lambda **t: ssd_step(**t, dt_softplus=True), now_heads),
        "causal_conv1d": (lambda **t: causal_conv1d(**t, activation="silu"), conv),
        "causal_conv1d, cu_seqlens": (lambda **t: causal_conv1d(**t, activation="silu"), packed(conv)),
        "causal_conv1d, seq_idx": (lambda **t: causal_conv1d(**t, activation="silu"), conv | {"seq_idx": seq_idx}),
        "causal_conv1d_step": (
            causal_conv1d_step,
            {"state": rand(batch, 2, 4), "x": rand(batch, 4), "weight": rand(4, 3), "bias": rand(4)},
        ),
        "rms_norm": (rms_norm, {"x": rand(batch, 8), "weight": rand(8), "z": rand(batch, 8)}),
        "add_rms_norm": (add_rms_norm, {"x": rand(batch, 8), "weight": rand(8), "residual": rand(batch, 8)}),
        "cross_scan": (cross_scan, {"x": grid}),
        "cross_merge": (lambda y: cross_merge(y, 3, 2), {"y": directions}),
        "cross_causal_conv1d": (cross_causal_conv1d, {"x": grid, "weight": rand(4, 4, 3), "bias": rand(4, 4)}),
        "cross_selective_scan": (
            lambda **t: cross_selective_scan(**t, dt_softplus=True),
            {
                "u": grid, "dt": rand(batch, 3, 2, 4, 4), "A": -rand(4, 4, 3), "B": rand(batch, 3, 2, 4, 3),
                "C": rand(batch, 3, 2, 4, 3), "D": rand(4, 4), "dt_bias": rand(4, 4),
            },
        ),
        "cross_ssd": (
            lambda **t: cross_ssd(**t, dt_softplus=True),
            {
                "x": rand(batch, 3, 2, 4, 2, 4), "dt": rand(batch, 3, 2, 4, 2), "A": -rand(4, 2),
                "B": rand(batch, 3, 2, 4, 1, 3), "C": rand(batch, 3, 2, 4, 1, 3), "D": rand(4, 2),
                "dt_bias": rand(4, 2),
            },
        ),
    }  # fmt: skip


NAMES = list(calls())


def outputs(out) -> list[Tensor]:
    return list(out) if isinstance(out, tuple) else [out]


def described(out) -> list[tuple]:
    return [(tuple(t.shape), t.dtype) for t in outputs(out)]


@functools.cache
def eager_description(name: str) -> list[tuple]:
    """Shapes and dtypes of an op's outputs, of a run with values."""
    op, tensors = calls()[name]
    return described(op(**with_gradients(tensors, False)))


def with_gradients(tensors: dict[str, Tensor], wanted: bool) -> dict[str, Tensor]:
    """Fresh tensors, so that an updated state is not met twice."""
    floats = {k for k, t in tensors.items() if t.is_floating_point() and k != "state"}
    return {k: t.clone().requires_grad_(wanted and k in floats) for k, t in tensors.items()}


def gradients(out, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    total = sum((t.double() * torch.cos(torch.arange(t.numel())).view_as(t)).sum() for t in outputs(out))
    wanted = {k: t for k, t in tensors.items() if t.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(total, list(wanted.values())), strict=True))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_on_the_meta_device(name, grad):
    op, tensors = calls()[name]
    with use_backend("auto"):
        got = op(**with_gradients({k: t.to("meta") for k, t in tensors.items()}, grad))
    assert described(got) == eager_description(name)
    assert all(t.device.type == "meta" for t in outputs(got))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_under_fake_tensor_mode(name, grad):
    op, tensors = calls()[name]
    want = eager_description(name)
    with FakeTensorMode() as mode:
        got = op(**with_gradients({k: mode.from_tensor(t) for k, t in tensors.items()}, grad))
        assert described(got) == want
        if grad and outputs(got)[0].requires_grad:
            sum(t.sum() for t in outputs(got)).backward()


@pytest.mark.parametrize("name", NAMES)
def test_compiled_with_dynamic_sizes(name):
    """The second batch and length compile again, as dynamic sizes; the third must not."""
    op, _ = calls()[name]
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    *earlier, last = ((2, 3), (3, 4), (4, 5)) if is_interpreted() else ((2, 5), (3, 7), (5, 70))
    for sizes in earlier:
        compiled(**with_gradients(calls(*sizes)[name][1], True))
    tensors = calls(*last)[name][1]
    eager, traced = (with_gradients(tensors, True) for _ in range(2))
    with torch._dynamo.config.patch(error_on_recompile=True):
        want, got = op(**eager), compiled(**traced)
    for a, b in zip(outputs(got), outputs(want), strict=True):
        torch.testing.assert_close(a, b)
    if outputs(want)[0].requires_grad:
        want, got = gradients(want, eager), gradients(got, traced)
        torch.testing.assert_close(got, want)


class Call(nn.Module):
    """An op as a module, as `torch.export` wants one."""

    def __init__(self, op: Callable):
        super().__init__()
        self.op = op

    def forward(self, tensors: dict[str, Tensor]):
        return tuple(outputs(self.op(**tensors)))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", [n for n in NAMES if "step" not in n])
def test_exported_and_run_with_grad_mode_on_and_off(name, grad):
    """An exported graph has the gradients of the ops in it."""
    op, tensors = calls()[name]
    exported = torch.export.export(Call(op), (with_gradients(tensors, grad),), strict=False).module()
    eager, traced = (with_gradients(tensors, grad) for _ in range(2))
    with torch.set_grad_enabled(grad):
        want, got = outputs(op(**eager)), exported(traced)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    if grad:
        torch.testing.assert_close(gradients(tuple(got), traced), gradients(tuple(want), eager))


MIXERS = {
    "Mamba": lambda: Mamba(16, d_state=4),
    "Mamba, without recomputation": lambda: Mamba(16, d_state=4, use_mem_eff_path=False),
    "Mamba2": lambda: Mamba2(16, d_state=4, headdim=8, chunk_size=16),
    "Mamba2, without recomputation": lambda: Mamba2(16, d_state=4, headdim=8, chunk_size=16, use_mem_eff_path=False),
}


@pytest.fixture(params=list(MIXERS))
def mixer(request) -> nn.Module:
    torch.manual_seed(0)
    return MIXERS[request.param]()


def test_mixers_on_meta_and_under_fake_tensor_mode(mixer):
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert mixer(torch.empty(2, 5, 16)).shape == (2, 5, 16)
    with use_backend("auto"):
        assert mixer.to("meta")(torch.empty(2, 5, 16, device="meta")).shape == (2, 5, 16)


@pytest.mark.parametrize("grad_at_export", [False, True])
def test_mixers_export_with_dynamic_batch_and_length(mixer, grad_at_export):
    """Lengths below and above a chunk; run with and without grad mode, whichever it was traced in."""
    dims = {0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=4096)}
    with torch.set_grad_enabled(grad_at_export):
        exported = torch.export.export(mixer, (rand(*SIZES[0], 16),), dynamic_shapes=(dims,)).module()
    for batch, length in SIZES:
        x = rand(batch, length, 16)
        with torch.no_grad():
            torch.testing.assert_close(exported(x), mixer(x))
        if not grad_at_export:
            continue
        torch.testing.assert_close(exported(x), mixer(x))
        inputs = [rand(batch, length, 16).requires_grad_() for _ in range(2)]
        got, want = (
            torch.autograd.grad(m(x).square().sum(), x) for m, x in zip((exported, mixer), inputs, strict=True)
        )
        torch.testing.assert_close(got, want)


def test_mixers_compile_with_dynamic_sizes(mixer):
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, length in SIZES[::2]:
        inputs = [rand(batch, length, 16).requires_grad_() for _ in range(2)]
        got, want = compiled(inputs[0]), mixer(inputs[1])
        torch.testing.assert_close(got, want)
        parameters = list(mixer.parameters())
        grads = (
            torch.autograd.grad(y.square().sum(), [x, *parameters]) for y, x in zip((got, want), inputs, strict=True)
        )
        torch.testing.assert_close(*grads)


def test_modes_and_profiles_see_an_op_that_otherwise_skips_the_dispatcher():
    seen = []

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x, weight = torch.randn(1, 8, 4), torch.ones(4, 3)
    with Listen():
        y = causal_conv1d(x, weight, backend="torch").y
    with torch.profiler.profile() as profile:
        again = causal_conv1d(x, weight, backend="torch").y
    assert "ssm_kernels.causal_conv1d_torch.default" in seen
    assert any(event.key == "ssm_kernels::causal_conv1d_torch" for event in profile.key_averages())
    torch.testing.assert_close(causal_conv1d(x, weight, backend="torch").y, y)
    torch.testing.assert_close(again, y)

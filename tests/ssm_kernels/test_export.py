"""The ops in terms of PyTorch's own: their values against the reference, and graphs without an op of this package."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode

from ssm_kernels import add_rms_norm, causal_conv1d, export, rms_norm, selective_scan, ssd, use_backend
from ssm_kernels.export import decompositions
from ssm_kernels.modules import Mamba, Mamba2
from tests.ssm_kernels.makers import random_tensor

TABLE = decompositions()
EXACT = {"rtol": 1e-11, "atol": 1e-11}


class Decomposed(TorchDispatchMode):
    """Run the functions of the table in place of the ops."""

    used = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in TABLE:
            return func(*args, **kwargs or {})
        self.used += 1
        return TABLE[func](*args)


def assert_decomposes(op, backend: str, **arguments) -> None:
    with torch.no_grad():
        want = op(**arguments, backend="reference")
        with Decomposed() as mode:
            got = op(**arguments, backend=backend)
    assert mode.used == 1
    torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("length", [1, 4, 11, 40, 150])
def test_selective_scan(backend, length, monkeypatch):
    """Lengths of one step, of a chunk, of one and two levels of chunks, and of a product over pairs."""
    monkeypatch.setattr(export, "CHUNK", 4)
    if backend == "numba":
        pytest.importorskip("numba")
    arguments = {"u": random_tensor(2, length, 4), "dt": random_tensor(2, length, 4, seed=1), "dt_softplus": True}
    arguments |= {
        "B": random_tensor(2, length, 2, 3),
        "C": random_tensor(2, length, 3),
        "A": -random_tensor(4, 3).exp(),
    }
    assert_decomposes(selective_scan, backend, **arguments)
    extras = {"D": random_tensor(4), "z": random_tensor(2, length, 4, seed=2), "dt_bias": random_tensor(4, seed=3)}
    extras |= {"C": random_tensor(4, 3), "initial_states": random_tensor(2, 4, 3)}
    assert_decomposes(selective_scan, backend, **(arguments | extras))


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("length", [1, 64, 200])
def test_ssd(backend, length):
    if backend == "numba":
        pytest.importorskip("numba")
    arguments = {"x": random_tensor(2, length, 4, 3), "dt": random_tensor(2, length, 4), "A": -random_tensor(4).exp()}
    arguments |= {"B": random_tensor(2, length, 2, 5), "C": random_tensor(2, length, 2, 5, seed=1), "dt_softplus": True}
    assert_decomposes(ssd, backend, **arguments)
    extras = {"D": random_tensor(4), "z": random_tensor(2, length, 4, 3, seed=2), "dt_bias": random_tensor(4, seed=3)}
    extras |= {"initial_states": random_tensor(2, 4, 3, 5), "dt_limit": (0.3, 2.0)}
    assert_decomposes(ssd, backend, **(arguments | extras))


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_causal_conv1d(backend):
    if backend == "numba":
        pytest.importorskip("numba")
    for length in (1, 9):
        arguments = {"x": random_tensor(2, length, 4), "weight": random_tensor(4, 3), "activation": "silu"}
        assert_decomposes(causal_conv1d, backend, **arguments)
        extras = {"bias": random_tensor(4), "initial_states": random_tensor(2, 2, 4)}
        assert_decomposes(causal_conv1d, backend, **(arguments | extras))


def test_norms():
    pytest.importorskip("numba")
    x, z = random_tensor(2, 5, 8), random_tensor(2, 5, 8, seed=1)
    assert_decomposes(rms_norm, "numba", x=x, weight=random_tensor(8), z=z, group_size=4)
    assert_decomposes(add_rms_norm, "numba", x=x, weight=random_tensor(8), residual=z)


def test_packed_sequences_are_refused():
    x, bounds = random_tensor(1, 9, 4), torch.tensor([0, 4, 9])
    with Decomposed(), pytest.raises(NotImplementedError, match="cu_seqlens must be None in a graph"):
        causal_conv1d(x, random_tensor(4, 3), cu_seqlens=bounds, backend="torch")


@pytest.mark.parametrize("mixer", [Mamba(16, d_state=4), Mamba2(16, d_state=4, headdim=8)], ids=["mamba", "mamba2"])
def test_a_graph_with_dynamic_sizes_has_aten_ops_only(mixer):
    dims = {0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=4096)}
    exported = torch.export.export(mixer, (torch.randn(2, 30, 16),), dynamic_shapes=(dims,))
    exported = exported.run_decompositions(TABLE)
    calls = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert {call.namespace for call in calls if hasattr(call, "namespace")} == {"aten"}
    run = exported.module()
    with torch.no_grad(), use_backend("torch"):
        for batch, length in ((2, 30), (1, 2), (3, 70), (1, 600)):
            x = torch.randn(batch, length, 16)
            torch.testing.assert_close(run(x), mixer(x), rtol=1e-4, atol=1e-5)

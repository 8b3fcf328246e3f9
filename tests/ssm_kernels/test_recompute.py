"""Memory that a mixer saves for its backward, and gradients that recomputation does not change."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ssm_kernels import use_backend
from ssm_kernels._core.recompute import recompute_in_backward
from ssm_kernels.modules import Mamba, Mamba2

MIXERS = [(Mamba, {}), (Mamba2, {"headdim": 16, "d_state": 16})]


class Allocations(TorchDispatchMode):
    """Records every storage that is allocated inside."""

    def __init__(self):
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in given:
                storage = t.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self) -> int:
        gc.collect()
        return sum(size for ref, size in self.made.values() if not ref.expired())


def saved_by(mixer, x) -> int:
    """Bytes of a forward that are alive until the backward: saved tensors and the result."""
    with Allocations() as allocations:
        y = mixer(x)
    kept = allocations.alive()
    y.sum().backward()
    return kept


@pytest.mark.parametrize(("kind", "options"), MIXERS)
def test_a_mixer_compiles_as_one_graph(kind, options):
    torch.manual_seed(0)
    mixer = kind(24, **options)
    x = torch.randn(2, 30, 24, requires_grad=True)
    wanted = [x, *mixer.parameters()]
    want = mixer(x)
    got = torch.compile(mixer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(y.square().sum(), wanted) for y in (got, want)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("kind", "options"), MIXERS)
def test_gradients_are_the_same(kind, options):
    torch.manual_seed(0)
    mixer = kind(24, **options)
    x = torch.randn(2, 30, 24, requires_grad=True)
    results = []
    for lean in (False, True):
        mixer.use_mem_eff_path = lean
        y = mixer(x)
        wanted = [x, *mixer.parameters()]
        once = torch.autograd.grad(y.square().sum(), wanted, retain_graph=True)
        again = torch.autograd.grad(y.square().sum(), wanted)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
        results.append((y, *once))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_mamba2_block_saves_its_projection_and_its_scan():
    """No more than `mamba_split_conv1d_scan_combined`: zxbcdt and the scan's output, and what is small beside them."""
    mixer = Mamba2(64, headdim=16, d_state=16)
    x = torch.randn(2, 512, 64, requires_grad=True)
    steps, inner = 2 * 512, mixer.d_inner
    projected, scanned, result = (4 * steps * width for width in (mixer.in_proj.out_features, inner, 64))
    small = 4 * (3 * steps * mixer.nheads + 4 * mixer.nheads * 16 * 16) + 4096  # step sizes; states; weights
    kept = saved_by(mixer, x)
    assert kept <= projected + scanned + result + small
    mixer.use_mem_eff_path = False
    assert saved_by(mixer, x) > 1.5 * kept


@pytest.mark.parametrize(("kind", "options"), MIXERS)
def test_recomputing_mixers_save_less(kind, options):
    mixer = kind(64, **options)
    x = torch.randn(1, 256, 64, requires_grad=True)
    lean = saved_by(mixer, x)
    mixer.use_mem_eff_path = False
    assert lean <= saved_by(mixer, x) - 4 * 256 * mixer.d_inner  # at least the convolution's result


@pytest.mark.parametrize(("kind", "options"), MIXERS)
def test_a_state_that_is_updated_in_place_leaves_gradients_right(kind, options):
    torch.manual_seed(0)
    mixer = kind(24, **options).double()
    x = torch.randn(2, 9, 24, dtype=torch.float64, requires_grad=True)
    state = mixer.new_state(2)
    for part in state:
        part.normal_()
    begin = [part.clone() for part in state]

    def loss(x):
        for part, value in zip(state, begin, strict=True):
            part.copy_(value)
        return mixer(x, state).square().sum()

    assert torch.autograd.gradcheck(loss, x)


@pytest.mark.parametrize(("kind", "options"), MIXERS)
def test_checkpointing_a_mixer_still_works(kind, options):
    torch.manual_seed(0)
    mixer = kind(24, **options)
    x = torch.randn(2, 30, 24, requires_grad=True)
    (plain,) = torch.autograd.grad(mixer(x).square().sum(), x)
    y = checkpoint(mixer, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], plain)


@pytest.mark.parametrize(("kind", "options"), MIXERS)
def test_recomputation_runs_on_the_backend_of_the_forward(kind, options):
    torch.manual_seed(0)
    mixer = kind(24, **options).double()
    x = torch.randn(1, 9, 24, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(mixer(x).square().sum(), x)
    with use_backend("reference"):
        y = mixer(x)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], want)


def test_a_tensor_changed_in_place_is_noticed():
    x, other = torch.randn(3, requires_grad=True), torch.randn(3)
    out = x.exp()
    with recompute_in_backward((out, lambda: x.exp())):
        y = (out * other).sum()
    other.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.backward()


def test_a_discarded_activation_is_freed_and_recomputed_once():
    x = torch.randn(3, requires_grad=True)
    calls = []
    y = x * 2
    kept = StorageWeakRef(y.untyped_storage())
    with recompute_in_backward((y, lambda: calls.append(1) or x * 2)):
        z = y.sin() + y[:2].cos().sum()
    del y
    gc.collect()
    assert kept.expired()
    z.sum().backward()
    torch.testing.assert_close(x.grad, 2 * (2 * x).cos() - torch.tensor([1, 1, 0]) * 3 * 2 * (2 * x).sin())
    assert len(calls) == 1

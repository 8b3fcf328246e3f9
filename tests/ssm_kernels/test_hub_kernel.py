"""The package in the layout of the Hub's kernels: `kernels` loads it beside this one, and it computes the same."""

from __future__ import annotations

import json

import kernels
import pytest
import torch

import ssm_kernels
from ssm_kernels.integrations import hub_kernel

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    out = tmp_path_factory.mktemp("kernel") / "ssm-kernels"
    hub_kernel.build(out)
    return out


@pytest.fixture(scope="module")
def loaded(repository):
    return kernels.get_local_kernel(repository, backend="cpu")


def calls():
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(shape, generator=g) - 0.5

    B, L, D, N, H, P = 2, 5, 4, 3, 2, 4
    BC = [rand(B, L, 1, N), rand(B, L, 1, N)]
    return {
        "selective_scan": ([rand(B, L, D), rand(B, L, D), -rand(D, N).abs(), *BC], {"dt_softplus": True}),
        "ssd": ([rand(B, L, H, P), rand(B, L, H), -rand(H).abs(), *BC], {"dt_softplus": True}),
        "causal_conv1d": ([rand(B, L, D), rand(D, 4), rand(D)], {"activation": "silu"}),
        "rms_norm": ([rand(B, L, D), rand(D)], {"z": rand(B, L, D)}),
        "add_rms_norm": ([rand(B, L, D), rand(D), rand(B, L, D)], {}),
    }


@pytest.mark.parametrize("op", calls())
def test_each_op_gives_what_it_gives_here_with_gradients(loaded, backend, op):
    results = []
    for package in (loaded, ssm_kernels):
        tensors, options = calls()[op]
        tensors = [t.requires_grad_() for t in tensors]
        out = getattr(package, op)(*tensors, **options, backend=backend)
        y = out if isinstance(out, torch.Tensor) else out.y
        results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_it_is_another_copy_with_ops_of_its_own(loaded):
    assert loaded.ssd is not ssm_kernels.ssd
    assert loaded.__name__ != "ssm_kernels"
    assert "ssd_chunked" in dir(getattr(torch.ops, loaded.__name__))


def test_every_backend_has_the_whole_package_under_another_name(repository):
    folders = [repository / "build" / f"torch-{backend}" for backend in hub_kernel.BACKENDS]
    names = {json.loads((folder / "metadata.json").read_text())["id"] for folder in folders}
    assert len(names) == len(folders)
    for folder in folders:
        assert (folder / "ssd" / "triton" / "kernels.py").exists()
        assert not (folder / "integrations").exists()
    assert "`ssd_step`" in (repository / "README.md").read_text()


def test_a_folder_with_something_in_it_is_not_written_to(repository):
    with pytest.raises(FileExistsError, match="is not empty"):
        hub_kernel.build(repository)

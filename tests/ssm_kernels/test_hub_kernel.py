"""The package in the layout of the Hub's kernels: `kernels` loads it beside this one, and it computes the same."""

from __future__ import annotations

import json
import subprocess
import sys

import kernels
import pytest
import torch

import ssm_kernels
from ssm_kernels import layers
from ssm_kernels.integrations import hub_kernel
from ssm_kernels.testing import is_interpreted

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
    assert "ssd_torch" in dir(getattr(torch.ops, loaded.__name__))


def test_every_backend_holds_the_package_under_another_name(repository):
    folders = [repository / "build" / f"torch-{backend}" for backend in hub_kernel.BACKENDS]
    names = {json.loads((folder / "metadata.json").read_text())["id"] for folder in folders}
    assert len(names) == len(folders)
    for folder in folders:
        assert (folder / "ssd" / "triton" / "forward.py").exists()
        assert not (folder / "integrations").exists()
    assert "`ssd_step`" in (repository / "README.md").read_text()


def test_a_folder_with_something_in_it_is_not_written_to(repository):
    with pytest.raises(FileExistsError, match="is not empty"):
        hub_kernel.build(repository)


USED = """
import sys, importlib, torch, transformers
from transformers import utils
from transformers.utils import import_utils, kernel_config
# transformers 5.23 and 5.24 ask for kernels 0.18.2, and name no CPU; the rest of the way is theirs.
import_utils.is_kernels_available = utils.is_kernels_available = lambda *args, **kwargs: True
kernel_config.KERNELS_SUPPORTED_DEVICE_TYPES.append("cpu")
from tests.ssm_kernels.test_integrations import PADDED, TOKENS, tiny
repository, *model_types = sys.argv[1:]
for model_type in model_types:
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    functions = {n: f for n, f in vars(module).items() if isinstance(f, torch.nn.Module)}
    named = {f.kernel_layer_name for n, f in functions.items() if "mamba" in n or "conv1d" in n}
    model = tiny(model_type)

    @torch.no_grad()
    def compute():
        tokens = model.generate(TOKENS, attention_mask=PADDED, max_new_tokens=6, do_sample=False, eos_token_id=None)
        return model(TOKENS, attention_mask=PADDED).logits, tokens

    theirs, their_tokens = compute()
    mapping = {name: f"{repository}:{name}" for name in named}
    model.set_use_kernels(True, transformers.KernelConfig(mapping, use_local_kernel=True))
    for name, f in functions.items():  # else a kernel that cannot be loaded is left out without a word
        if f.kernel_layer_name in named:
            assert f.forward.__func__.__module__.endswith(".layers"), name
    ours, our_tokens = compute()
    assert (theirs - ours).abs().max() <= 1e-5 * theirs.abs().max() and their_tokens.equal(our_tokens)
    print(*sorted(named))
"""


@pytest.mark.skipif(is_interpreted(), reason="runs the PyTorch backend, in a process of its own")
@pytest.mark.slow
def test_models_of_transformers_run_on_the_layers_that_a_kernel_config_names(repository):
    pytest.importorskip("transformers", minversion="5.23")
    command = [sys.executable, "-W", "ignore", "-c", USED, str(repository), "mamba", "zamba", "mamba2", "falcon_h1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    used = {name for line in done.stdout.splitlines() for name in line.split()}
    assert used == set(layers.__all__)


@pytest.mark.parametrize("name", layers.__all__)
def test_each_layer_loads_by_its_name(repository, name):
    layer = kernels.LocalLayerRepository(repository, layer_name=name).load()
    assert issubclass(layer, torch.nn.Module) and layer is not getattr(layers, name)


def test_a_layer_refuses_what_it_would_leave_out():
    x, weight = torch.ones(1, 4, 5), torch.ones(4, 3)
    with pytest.raises(ValueError, match="cu_seqlens"):
        layers.causal_conv1d_fn()(x, weight, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(RuntimeError, match="no_grad"):
        layers.causal_conv1d_update()(x[..., :1], torch.zeros(1, 4, 2), weight.requires_grad_())
    scan = [x, x, -torch.ones(4, 2), torch.ones(1, 2, 5), torch.ones(1, 2, 5)]
    with pytest.raises(ValueError, match="seq_idx"):
        layers.selective_scan_fn()(*scan, seq_idx=torch.zeros(1, 5, dtype=torch.int32))

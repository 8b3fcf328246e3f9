"""`transformers`' own look-up of `mamba_ssm` and `causal_conv1d` finds this package, and computes the same by it."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("transformers", minversion="5.23")

SCRIPT = """
import functools, importlib, sys
import torch
import ssm_kernels.compat
from ssm_kernels.compat.mamba_ssm import causal_conv1d, selective_scan, ssd, state_update
from transformers.utils import import_utils

NAME = sys.argv[1]
calls = set()

def counted(module, name):
    function = getattr(module, name)

    @functools.wraps(function)
    def call(*args, **kwargs):
        calls.add(name)
        return function(*args, **kwargs)

    setattr(module, name, call)

for module, name in ((causal_conv1d, "causal_conv1d_fn"), (causal_conv1d, "causal_conv1d_update"),
                     (selective_scan, "mamba_inner_fn"), (selective_scan, "selective_scan_fn"),
                     (ssd, "mamba_chunk_scan_combined"), (ssd, "mamba_split_conv1d_scan_combined"),
                     (state_update, "selective_state_update")):
    counted(module, name)

def results():
    file = f"transformers.models.{NAME}.modeling_{NAME}"
    sys.modules.pop(file, None)
    module = importlib.import_module(file)
    options = dict(num_heads=4, head_dim=16, n_groups=2, chunk_size=4) if NAME == "mamba2" else {}
    config = importlib.import_module(f"transformers.models.{NAME}.configuration_{NAME}")
    settings = getattr(config, NAME.capitalize() + "Config")(
        vocab_size=19, hidden_size=32, num_hidden_layers=2, state_size=4, expand=2, **options)
    torch.manual_seed(0)
    model = getattr(module, NAME.capitalize() + "ForCausalLM")(settings)
    tokens = torch.arange(12).view(2, 6) % 19
    out = model(tokens, labels=tokens)
    out.loss.backward()
    gradients = [p.grad for p in model.parameters()]
    model.eval()
    written = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    return out.logits.detach(), gradients, written

want = results()
assert not calls
print(ssm_kernels.compat.install())
for name in ("is_mamba_ssm_available", "is_mamba_2_ssm_available", "is_causal_conv1d_available"):
    assert getattr(import_utils, name)() == torch.cuda.is_available()  # these speak of a GPU
assert import_utils._is_package_available("mamba_ssm", return_version=True) == (True, "2.3.0")
got = results()
torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
for g, w in zip(got[1], want[1], strict=True):
    torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-5)
assert got[2].equal(want[2])
print("called", *sorted(calls))
"""


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("mamba", {"mamba_inner_fn", "causal_conv1d_fn", "causal_conv1d_update", "selective_scan_fn"}),
        ("mamba2", {"mamba_split_conv1d_scan_combined", "causal_conv1d_fn", "causal_conv1d_update"}),
    ],
)
@pytest.mark.slow
def test_models_of_transformers(name, called):
    done = subprocess.run([sys.executable, "-c", SCRIPT, name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert called <= set(done.stdout.splitlines()[-1].split()[1:]), done.stdout

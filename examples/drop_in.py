"""Code written for mamba_ssm and transformers, unchanged, on these ops and without a GPU.

    python examples/drop_in.py

It needs pip install '.[transformers]'.
"""

from __future__ import annotations

import importlib.util
import sys

import torch

import ssm_kernels.compat
from vlmamba.model.extras import install_command


def mamba_ssm_code() -> torch.Tensor:
    """Run lines as mamba_ssm's README has them."""
    from mamba_ssm import Mamba

    model = Mamba(d_model=16, d_state=16, d_conv=4, expand=2)
    return model(torch.randn(2, 64, 16))


def transformers_code() -> float:
    """Compare a transformers model on these ops with its own; return the largest difference of the logits."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    from ssm_kernels.integrations import transformers as on_these_ops

    config = Mamba2Config(
        vocab_size=100, hidden_size=32, state_size=16, num_hidden_layers=2, num_heads=4, head_dim=16, n_groups=1
    )
    model, tokens = Mamba2ForCausalLM(config).eval(), torch.randint(100, (1, 50))
    with torch.no_grad():
        own = model(tokens).logits  # (1, 50, 100)
        with on_these_ops.enabled():
            ours = model(tokens).logits
    return (ours - own).abs().max().item()


if __name__ == "__main__":
    if importlib.util.find_spec("transformers") is None:
        sys.exit(f"transformers is not installed: {install_command('transformers')}")
    torch.manual_seed(0)
    print(f"transformers' logits differ by {transformers_code():.1e}")
    print("provided:", *ssm_kernels.compat.install().provided)
    print("mamba_ssm.Mamba:", tuple(mamba_ssm_code().shape))
    ssm_kernels.compat.uninstall()

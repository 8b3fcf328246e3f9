"""`mamba_ssm.utils.torch`: decorators that run the backward of an autograd function under its forward's autocast."""

from __future__ import annotations

import functools

import torch

# PyTorch's decorators take the device when they are applied, before any tensor is seen.
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

custom_fwd = functools.partial(torch.amp.custom_fwd, device_type=_DEVICE)
custom_bwd = functools.partial(torch.amp.custom_bwd, device_type=_DEVICE)

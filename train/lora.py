"""LoRA (arXiv 2106.09685) for the language model: low-rank changes of its projections learn, and are merged in the end.

`peft` refuses `out_proj` and `conv1d` of Mamba models, since fused kernels read their weights past the module. The
mixers here call all their projections as modules.
"""

from __future__ import annotations

import math
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_kernels.modules import Mamba, Mamba2

from .config import LoraConfig, Target

WITHIN = "language_model."
"""Beginning of the names of the modules that are changed."""


class LoraLinear(nn.Module):
    """A linear layer, frozen, and a change of low rank: `base(x) + alpha / rank * B A x`. B begins as zero."""

    def __init__(self, base: nn.Linear, config: LoraConfig):
        super().__init__()
        self.base, self.dropout, self.scale = base, config.dropout, config.alpha / config.rank
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(config.rank, base.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)
        return self.base(x) + self.scale * F.linear(low, self.lora_B)

    def merged_weight(self) -> Tensor:
        """The weight with its change, (out, in)."""
        return self.base.weight + self.scale * (self.lora_B @ self.lora_A)


def add_lora(model: nn.Module, config: LoraConfig) -> None:
    """Put a change that is still nothing on each target within `model.language_model`.

    Raises:
        ValueError: there is no such projection, or there is LoRA already.
    """
    if any(isinstance(m, LoraLinear) for m in model.modules()):
        raise ValueError("the model has LoRA already: merge it first")
    mixers = [(n, m) for n, m in model.named_modules() if n.startswith(WITHIN) and isinstance(m, Mamba | Mamba2)]
    for target in config.targets:
        if not any(hasattr(m, target) for _, m in mixers):
            known = sorted({t for t in get_args(Target) for _, m in mixers if hasattr(m, t)})
            raise ValueError(f"LoRA's target {target!r} is in no layer of the language model, which has {known}")
    for _, mixer in mixers:
        for target in config.targets:
            setattr(mixer, target, LoraLinear(getattr(mixer, target), config))


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add the changes to the weights, so that the model is again what it was before `add_lora`, but has learned."""
    for mixer in model.modules():
        for name, layer in list(mixer.named_children()):
            if isinstance(layer, LoraLinear):
                layer.base.weight.copy_(layer.merged_weight())
                setattr(mixer, name, layer.base)


def lora_learns(name: str) -> bool:
    """Whether a parameter may learn in a stage with LoRA: within the language model only LoRA's own."""
    return not name.startswith(WITHIN) or name.endswith((".lora_A", ".lora_B"))

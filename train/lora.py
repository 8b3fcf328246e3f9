"""LoRA (arXiv 2106.09685) for the language model: low-rank adapters on its projections, merged after training.

`peft` refuses `out_proj` and `conv1d` of Mamba models, since fused kernels read their weights without calling the
module. The mixers here call all their projections as modules.
"""

from __future__ import annotations

import math
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_kernels.modules import Mamba, Mamba2, Mamba3, QuantizedLinear

from ..model.quantize import floating_layer
from .config import LoraConfig, Target

PREFIX = "language_model."
"""Prefix of the names of the modules that may get an adapter."""


class LoraLinear(nn.Module):
    """A frozen linear layer with a low-rank adapter (eq. 3): `base(x) + alpha / rank * B A x`. B starts at zero.

    The layer may be quantized (QLoRA, arXiv 2305.14314).
    """

    def __init__(self, base: nn.Linear | QuantizedLinear, config: LoraConfig):
        super().__init__()
        self.base, self.dropout, self.scale = base, config.dropout, config.alpha / config.rank
        if isinstance(base, nn.Linear):
            like = {"device": base.weight.device, "dtype": base.weight.dtype}
        else:
            like = {"device": base.qdata.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(config.rank, base.in_features, **like))  # (rank, in)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, **like))  # (out, rank)
        # The initialization of nn.Linear, as in the paper's code.
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)  # (..., rank)
        return self.base(x) + self.scale * F.linear(low, self.lora_B)  # (..., out)

    def merged_weight(self) -> Tensor:
        """The weight with its adapter, (out, in), in floating point."""
        base = self.base
        weight = base.weight if isinstance(base, nn.Linear) else base.dequantize(self.lora_A.dtype)
        return weight + self.scale * (self.lora_B @ self.lora_A)


def add_lora(model: nn.Module, config: LoraConfig) -> None:
    """Add an adapter to each target projection of `model.language_model`, in place. Outputs do not change yet.

    Raises:
        ValueError: no layer has a target projection, or the model has LoRA already.
    """
    if any(isinstance(m, LoraLinear) for m in model.modules()):
        raise ValueError("the model has LoRA already: merge it first")
    mixers = [
        (n, m) for n, m in model.named_modules() if n.startswith(PREFIX) and isinstance(m, Mamba | Mamba2 | Mamba3)
    ]
    for target in config.targets:
        if not any(hasattr(m, target) for _, m in mixers):
            known = sorted({t for t in get_args(Target) for _, m in mixers if hasattr(m, t)})
            raise ValueError(f"LoRA's target {target!r} is in no layer of the language model, which has {known}")
    # All targets are known to exist in some layer before any layer changes.
    for _, mixer in mixers:
        for target in config.targets:
            setattr(mixer, target, LoraLinear(getattr(mixer, target), config))


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add the adapters to the weights and remove them, so that the model has the structure it had before `add_lora`.

    A quantized layer with an adapter becomes one of floating point, since its integers cannot hold the sum.
    """
    for mixer in model.modules():
        for name, layer in list(mixer.named_children()):
            if not isinstance(layer, LoraLinear):
                continue
            base = layer.base
            if isinstance(base, nn.Linear):
                base.weight.copy_(layer.merged_weight())
            else:
                base = floating_layer(base, nn.Parameter(layer.merged_weight()))
            setattr(mixer, name, base)


def is_trainable_with_lora(name: str) -> bool:
    """Whether a parameter may be trainable in a stage with LoRA: in the language model only the adapters."""
    return not name.startswith(PREFIX) or name.endswith((".lora_A", ".lora_B"))

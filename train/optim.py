"""The optimizer and its schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from .config import StageConfig
from .lora import LoraLinear, lora_learns


def freeze_all_but(model: nn.Module, trainable: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """Let only parameters whose names begin so learn, and give those. With LoRA, of the language model only LoRA's.

    Raises:
        ValueError: a beginning that no parameter has.
    """
    names = [n for n, _ in model.named_parameters()]
    for start in trainable:
        if not any(n.startswith(start) for n in names):
            raise ValueError(f"trainable names {start!r}, but no parameter of {type(model).__name__} begins so")
    has_lora = any(isinstance(m, LoraLinear) for m in model.modules())
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(trainable) and (not has_lora or lora_learns(name)))
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def make_optimizer(parameters: dict[str, nn.Parameter], stage: StageConfig) -> torch.optim.AdamW:
    """AdamW. Vectors (biases, norms, rates and step sizes of the scans) and A_log do not decay."""
    decays = {n: p.dim() >= 2 and "A_log" not in n and "dt_projs_bias" not in n for n, p in parameters.items()}
    groups = [
        {"params": [p for n, p in parameters.items() if decays[n]], "weight_decay": stage.weight_decay},
        {"params": [p for n, p in parameters.items() if not decays[n]], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=stage.lr, betas=stage.betas)


def learning_rate(stage: StageConfig, step: int, n_steps: int) -> float:
    """The rate of one step, counted from 0: a linear rise, then a cosine to zero."""
    warmup = math.ceil(stage.warmup_ratio * n_steps)
    if step < warmup:
        return stage.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, n_steps - warmup)
    return stage.lr * 0.5 * (1 + math.cos(math.pi * done))

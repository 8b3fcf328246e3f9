"""The optimizer and its schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .config import StageConfig
from .distributed import local, sum_over_ranks
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
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in parameters.items():
        decays = p.dim() >= 2 and "A_log" not in name and "dt_projs_bias" not in name
        groups.setdefault((decays, isinstance(p, DTensor)), []).append(p)  # apart: one update is for one kind
    optimizer = torch.optim.AdamW(
        [{"params": g, "weight_decay": stage.weight_decay * decays} for (decays, _), g in groups.items()],
        lr=stage.lr,
        betas=stage.betas,
    )
    for p in parameters.values():  # as the first step would: a checkpoint then has a place to be read to
        optimizer.state[p] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], largest: float) -> float:
    """Scale gradients down to a norm of at most `largest`, over all ranks; gives the norm that they had."""
    with_gradient = [p for p in parameters if p.grad is not None]
    sharded = [local(p.grad) for p in with_gradient if isinstance(p, DTensor)]
    whole = [p.grad for p in with_gradient if not isinstance(p, DTensor)]
    squares = [torch.nn.utils.get_total_norm(g).item() ** 2 if g else 0.0 for g in (sharded, whole)]
    norm = math.sqrt(sum_over_ranks(squares[0])[0] + squares[1])
    if norm > largest:
        for g in (*sharded, *whole):
            g *= largest / norm
    return norm


def learning_rate(stage: StageConfig, step: int, n_steps: int) -> float:
    """The rate of one step, counted from 0: a linear rise, then a cosine to zero."""
    warmup = math.ceil(stage.warmup_ratio * n_steps)
    if step < warmup:
        return stage.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, n_steps - warmup)
    return stage.lr * 0.5 * (1 + math.cos(math.pi * done))

"""The optimizer and its schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ssm_kernels.modules import QuantizedMatrix

from .config import StageConfig
from .distributed import local, sum_over_ranks
from .lora import LoraLinear, is_trainable_with_lora


def freeze_all_but(model: nn.Module, trainable: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """Freeze all parameters but those whose names have one of the prefixes.

    Args:
        model: a model; with LoRA, of its language model only LoRA's parameters stay trainable.
        trainable: prefixes of trainable parameter names.

    Returns:
        The trainable parameters by name.

    Raises:
        ValueError: no parameter has the prefix, or one that has is quantized.
    """
    names = [n for n, _ in model.named_parameters()]
    for prefix in trainable:
        if not any(n.startswith(prefix) for n in names):
            raise ValueError(f"trainable names {prefix!r}, but no parameter of {type(model).__name__} has that prefix")
    has_lora = any(isinstance(m, LoraLinear) for m in model.modules())
    for name, m in model.named_modules():
        is_trained = f"{name}.".startswith(trainable) and (not has_lora or is_trainable_with_lora(f"{name}."))
        if isinstance(m, QuantizedMatrix) and is_trained:
            raise ValueError(
                f"trainable names {name}, which is quantized, and integers have no gradients: train adapters on it "
                "(--lora.rank 16), or load the model without quantization"
            )
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(trainable) and (not has_lora or is_trainable_with_lora(name)))
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def make_optimizer(parameters: dict[str, nn.Parameter], stage: StageConfig) -> torch.optim.AdamW:
    """Make an AdamW optimizer. Vectors (biases, norms, D and the bias of dt) and A_log have no weight decay."""
    # Sharded and replicated parameters are apart: a fused update takes one kind of tensor.
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in parameters.items():
        decays = p.dim() >= 2 and "A_log" not in name and "dt_projs_bias" not in name
        groups.setdefault((decays, isinstance(p, DTensor)), []).append(p)
    optimizer = torch.optim.AdamW(
        [{"params": g, "weight_decay": stage.weight_decay * decays} for (decays, _), g in groups.items()],
        lr=stage.lr,
        betas=stage.betas,
    )
    # The state that the first step would make, so that a checkpoint can be read into it.
    for p in parameters.values():
        optimizer.state[p] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Scale gradients to a norm of at most `max_norm` over all ranks, in place.

    Returns:
        The norm before clipping.
    """
    sharded = [local(p.grad) for p in parameters if p.grad is not None and isinstance(p, DTensor)]
    replicated = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    squares = [torch.nn.utils.get_total_norm(g).item() ** 2 if g else 0.0 for g in (sharded, replicated)]
    # Shards add up over the ranks; replicated gradients are equal on all of them and count once.
    norm = math.sqrt(sum_over_ranks(squares[0])[0] + squares[1])
    if norm > max_norm:
        for g in (*sharded, *replicated):
            g *= max_norm / norm
    return norm


def learning_rate(stage: StageConfig, step: int, n_steps: int) -> float:
    """Learning rate of a step, from 0: linear warm-up, then cosine decay to zero."""
    warmup = math.ceil(stage.warmup_ratio * n_steps)
    if step < warmup:
        return stage.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, n_steps - warmup)
    return stage.lr * 0.5 * (1 + math.cos(math.pi * progress))

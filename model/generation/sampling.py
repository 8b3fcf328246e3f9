"""Sampling: logits to next tokens. Letters: S sequences, V vocabulary."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .config import GenerationConfig


class SequenceSampling:
    """Settings of one sequence, its own random numbers, and the tokens that occurred in it.

    Args:
        config: temperature, top-k, top-p, repetition penalty and seed.
        prompt_ids: tokens of the prompt, for the repetition penalty. Negative ones stand for image features; those
            from `vocab_size` on count for nothing.
        vocab_size: tokens from here on are never chosen.
        device: device of the logits.
    """

    def __init__(self, config: GenerationConfig, prompt_ids: Sequence[int], vocab_size: int, device: torch.device):
        self.config = config
        self.random = random.Random(config.seed)
        self.occurred: Tensor | None = None
        if config.repetition_penalty != 1:
            self.occurred = torch.zeros(vocab_size, dtype=torch.bool, device=device)  # (V,)
            # A prompt may have tokens that are never chosen, beside those of images.
            self.occurred[[t for t in prompt_ids if 0 <= t < vocab_size]] = True


def choose_tokens(logits: Tensor, sequences: Sequence[SequenceSampling], vocab_size: int) -> Tensor:
    """Choose the next token of each sequence by its own settings. No call synchronizes the host with the device.

    A sampled token takes one random number of its sequence, so the choice for a row does not depend on the others.

    Args:
        logits: (S, V) or with more columns.
        sequences: S; their random numbers and occurred tokens are advanced.
        vocab_size: logits beyond it belong to padding rows of the embedding and are never chosen.

    Returns:
        Tokens (S,).
    """
    logits = logits[:, :vocab_size]
    penalized = [i for i, s in enumerate(sequences) if s.occurred is not None]
    occurred = None
    if penalized:
        occurred = torch.stack([s.occurred for s in sequences if s.occurred is not None])  # (penalized, V)
        penalties = _column([sequences[i].config.repetition_penalty for i in penalized], logits)
        logits = _on_rows(logits, penalized, lambda rows: _penalize(rows, occurred, penalties))
    tokens = logits.argmax(-1)  # (S,)
    sampled = [i for i, s in enumerate(sequences) if s.config.temperature > 0]
    if sampled:
        uniform = torch.tensor([sequences[i].random.random() for i in sampled], dtype=torch.float64)
        rows = _index(sampled, logits.device)
        p = token_probabilities(logits[rows], [sequences[i].config for i in sampled])  # (sampled, V)
        tokens = tokens.index_copy(0, rows, draw(p, uniform.to(logits.device, non_blocking=True)))
    if occurred is not None:
        occurred.scatter_(1, tokens[_index(penalized, logits.device), None], True)
        for i, row in zip(penalized, occurred, strict=True):
            sequences[i].occurred = row
    return tokens


def token_probabilities(logits: Tensor, configs: Sequence[GenerationConfig]) -> Tensor:
    """Compute probabilities at a temperature above 0, with 0 outside of the top k and of the nucleus.

    Args:
        logits: (S, V).
        configs: settings of each row.

    Returns:
        (S, V); where `top_p` cut a row, its sum is that of the nucleus.
    """
    # The largest logit is 0 at any temperature, also where the others overflow.
    temperatures = _column([c.temperature for c in configs], logits).clamp(min=torch.finfo(logits.dtype).tiny)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperatures
    top_k = [i for i, c in enumerate(configs) if 0 < c.top_k < logits.shape[-1]]
    if top_k:
        logits = _on_rows(logits, top_k, lambda rows: _keep_top(rows, [configs[i].top_k for i in top_k]))
    p = logits.softmax(-1)
    top_p = [i for i, c in enumerate(configs) if c.top_p < 1]
    if top_p:
        p = _on_rows(p, top_p, lambda rows: _keep_nucleus(rows, [configs[i].top_p for i in top_p]))
    return p


def draw(p: Tensor, uniform: Tensor) -> Tensor:
    """Draw a token for each row by inversion of the cumulative distribution: one random number a row.

    `torch.multinomial` would synchronize host and device.

    Args:
        p: (S, V) probabilities, which need not sum to 1.
        uniform: (S,), or (1,) for all rows, in [0, 1).

    Returns:
        Tokens (S,). None has probability 0.
    """
    cumulative = p.cumsum(-1, dtype=torch.float64)  # (S, V)
    target = cumulative[:, -1:] * uniform[:, None]  # (S, 1)
    tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return tokens.clamp(max=p.shape[-1] - 1)  # beyond, where a broken model gives NaN


def _penalize(logits: Tensor, occurred: Tensor, penalties: Tensor) -> Tensor:
    return torch.where(occurred, torch.where(logits > 0, logits / penalties, logits * penalties), logits)


def _keep_top(logits: Tensor, top_k: Sequence[int]) -> Tensor:
    """Set logits (S, V) below the k-th largest of their row to -inf."""
    largest = logits.topk(max(top_k)).values  # (S, k of most)
    lowest = largest.gather(1, _index([k - 1 for k in top_k], logits.device)[:, None])  # (S, 1)
    return logits.masked_fill(logits < lowest, -torch.inf)


def _keep_nucleus(p: Tensor, top_p: Sequence[float]) -> Tensor:
    """Set to 0 what is outside of the most probable tokens of (S, V) whose sum reaches `top_p`."""
    # Stable, so that which of equal tokens is cut does not depend on the other rows.
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    # Probability of all more probable tokens. Once it reaches top_p, the rest is cut; the first token stays.
    before = ordered.cumsum(-1, dtype=torch.float64) - ordered  # (S, V)
    cut = before >= _column(top_p, before)
    return p.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), 0)


def _on_rows(tensor: Tensor, rows: list[int], change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change some rows of (S, V)."""
    if len(rows) == len(tensor):
        return change(tensor)
    index = _index(rows, tensor.device)
    return tensor.index_copy(0, index, change(tensor[index]))


def _index(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values).to(device, non_blocking=True)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """Return values (S, 1) on the device and in the dtype of a tensor."""
    return torch.tensor(values, dtype=like.dtype)[:, None].to(like.device, non_blocking=True)

"""Sampling: logits to next tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import GenerationConfig


class Sampler:
    """Choose the next token of each sequence; call with logits (S, V), returns tokens (S,).

    No call synchronizes the host with the device.

    Args:
        config: temperature, top-k, top-p, repetition penalty and seed.
        prompt_ids: tokens of each of S prompts, for the repetition penalty. Negative ones stand for image features;
            those from `vocab_size` on count for nothing.
        vocab_size: logits beyond it belong to padding rows of the embedding and are never chosen.
        device: device of the logits.
    """

    def __init__(
        self, config: GenerationConfig, prompt_ids: Sequence[Sequence[int]], vocab_size: int, device: torch.device
    ):
        self.config, self.vocab_size = config, vocab_size
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.occurred: Tensor | None = None
        if config.repetition_penalty != 1:
            self.occurred = torch.zeros(len(prompt_ids), vocab_size, dtype=torch.bool, device=device)  # (S, V)
            for row, tokens in zip(self.occurred, prompt_ids, strict=True):
                # A prompt may have tokens that are never chosen, beside those of images.
                row[[t for t in tokens if 0 <= t < vocab_size]] = True

    def select(self, rows: Tensor) -> None:
        """Continue with these sequences only."""
        if self.occurred is not None:
            self.occurred = self.occurred[rows]

    def __call__(self, logits: Tensor) -> Tensor:
        """Choose a token for each row of logits (S, V)."""
        logits = logits[:, : self.vocab_size]
        config = self.config
        if self.occurred is not None:
            p = config.repetition_penalty
            logits = torch.where(self.occurred, torch.where(logits > 0, logits / p, logits * p), logits)
        if config.temperature > 0:
            # argmax of log p - log noise, the exponential form of the Gumbel-max trick.
            logits = filter_logits(logits / config.temperature, config.top_k, config.top_p) - self._noise(logits).log()
        tokens = logits.argmax(-1)  # (S,)
        if self.occurred is not None:
            self.occurred.scatter_(1, tokens[:, None], True)
        return tokens

    def _noise(self, logits: Tensor) -> Tensor:
        """Draw exponential noise (V,): the token with the largest p / noise is a sample of p.

        `torch.multinomial` would synchronize host and device. One draw serves all sequences, so that each sequence
        samples what it would sample alone.
        """
        noise = torch.empty_like(logits[0]).exponential_(generator=self.generator)  # (V,)
        return noise.clamp_(min=torch.finfo(noise.dtype).tiny)


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set logits (S, V) outside the top k and the nucleus of probability `top_p` to -inf."""
    if 0 < top_k < logits.shape[-1]:
        lowest = logits.topk(top_k, dim=-1).values[:, -1:]  # (S, 1)
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        # Probability of all more probable tokens. Once it reaches top_p, the rest is cut; the first token stays.
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # (S, V)
        logits = logits.masked_fill((before >= top_p).scatter(-1, order, before >= top_p), -torch.inf)
    return logits

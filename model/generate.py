"""Writing on from a prompt, token by token, with a state whose size does not grow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .lm import MambaLM
from .tokenizer import TextStream, Tokenizer


@dataclass(frozen=True)
class GenerationConfig:
    """How the next token is chosen, and when to end."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 takes the likeliest token; otherwise one is drawn."""
    top_k: int = 0
    """Draw among so many likeliest tokens; 0 among all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together are so probable."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that have occurred, prompt included."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it."""
    seed: int = 0
    """Of the drawing, for each sequence alike, so that an answer does not depend on its neighbours."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must not be negative, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be positive, got {self.repetition_penalty}")
        if any(not s for s in self.stop):
            raise ValueError("stop must not hold an empty text")


@torch.no_grad()
def generate_tokens(
    lm: MambaLM,
    embeds: Tensor,
    cu_seqlens: Tensor,
    seen: Sequence[Sequence[int]],
    config: GenerationConfig,
    vocab_size: int,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield, step by step, the next token of each of S sequences, as a list and as a tensor (S,).

    It goes on until the caller stops or `max_new_tokens` is reached: what ends a sequence is the caller's to say.

    Args:
        embeds: (1, total, D) prompts one after the other.
        cu_seqlens: (S + 1,) their bounds. Prompts are run packed, so none is padded.
        seen: tokens of each prompt, for the repetition penalty.
        vocab_size: tokens beyond it, which only fill up the embedding, are never chosen.
    """
    state = lm.new_state(len(cu_seqlens) - 1)
    chooser = _Chooser(config, seen, vocab_size, embeds.device)
    if config.max_new_tokens == 0 or not chooser.n:
        return
    at = (cu_seqlens[1:] - 1).to(embeds.device)
    logits = lm(inputs_embeds=embeds, state=state, cu_seqlens=cu_seqlens, at=at).logits[0]  # (S, V)
    for step in range(config.max_new_tokens):
        tokens = chooser(logits)
        yield tokens.tolist(), tokens
        if step + 1 < config.max_new_tokens:
            logits = lm(tokens[:, None], state=state).logits[:, 0]


class _Chooser:
    def __init__(self, config: GenerationConfig, seen: Sequence[Sequence[int]], vocab_size: int, device: torch.device):
        self.config, self.vocab_size, self.n = config, vocab_size, len(seen)
        # Not one generator for all: a sequence's draws must be those it would make alone.
        self.generators = [torch.Generator(device).manual_seed(config.seed) for _ in seen]
        self.occurred = None
        if config.repetition_penalty != 1:
            self.occurred = torch.zeros(len(seen), vocab_size, dtype=torch.bool, device=device)
            for row, tokens in zip(self.occurred, seen, strict=True):
                row[[t for t in tokens if t >= 0]] = True

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits[:, : self.vocab_size]
        config = self.config
        if self.occurred is not None:
            p = config.repetition_penalty
            logits = torch.where(self.occurred, torch.where(logits > 0, logits / p, logits * p), logits)
        if config.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            probabilities = truncated(logits / config.temperature, config.top_k, config.top_p).softmax(-1)
            drawn = [
                torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, self.generators, strict=True)
            ]
            tokens = torch.cat(drawn)
        if self.occurred is not None:
            self.occurred[torch.arange(self.n, device=tokens.device), tokens] = True
        return tokens


def truncated(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (S, V) with all but the likeliest tokens at -inf."""
    if 0 < top_k < logits.shape[-1]:
        lowest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        # The tokens before this one are enough already; the first one always stays.
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.masked_fill((before >= top_p).scatter(-1, order, before >= top_p), -torch.inf)
    return logits


class Answer:
    """One sequence's answer as it grows: text, and whether it has ended."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]):
        self.eos_id, self.stop = tokenizer.eos_id, stop
        self.stream = TextStream(tokenizer)
        self.text = ""
        self.done = False

    def push(self, token: int) -> None:
        """Take the next token. Text that may be the beginning of a stop text is held back until that is decided."""
        if token == self.eos_id:
            self.finish()
            return
        self.stream.push(token)
        cut = min((i for s in self.stop if (i := self.stream.given.find(s)) >= 0), default=-1)
        if cut >= 0:
            self.text, self.done = self.stream.given[:cut], True
        else:
            self.text = self.stream.given[: len(self.stream.given) - self._held_back()]

    def finish(self) -> None:
        """No more tokens come."""
        if not self.done:
            self.stream.finish()
            self.text, self.done = self.stream.given, True

    def _held_back(self) -> int:
        text = self.stream.given
        return max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)

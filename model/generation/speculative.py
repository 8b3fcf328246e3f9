"""Speculative decoding (arXiv 2211.17192, algorithm 1): a small model proposes tokens, and one step verifies them.

Letters: S sequences, K proposed tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_kernels import StateSlots, states

from ..tokenizer import Tokenizer
from .config import GenerationConfig
from .decoding import narrow_dtype
from .interface import LanguageModel, LMState
from .prefill import EmbedFn, prefill
from .sampling import filter_logits


@dataclass
class DraftStats:
    """Count of the tokens that a draft model proposed, over all sequences."""

    steps: int = 0
    """Steps of the model that verified proposals, one for each sequence in it."""
    proposed: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the proposed tokens that were accepted."""
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a step of the model gives: the accepted ones, and one of its own. It is 1 without a draft."""
        return 1 + self.accepted / self.steps if self.steps else 0.0

    def __str__(self) -> str:
        return (
            f"{self.accepted} of {self.proposed} proposed tokens accepted ({self.acceptance:.0%}):"
            f" {self.tokens_per_step:.2f} tokens a step of the model instead of 1"
        )


class Draft(NamedTuple):
    """A draft model with the same prompts as the model."""

    lm: LanguageModel
    embeds: Tensor | EmbedFn
    cu_seqlens: Tensor
    """(S + 1,) bounds of the prompts."""
    stats: DraftStats


def check_draft(
    lm: LanguageModel, draft: LanguageModel, tokenizers: tuple[Tokenizer, Tokenizer], config: GenerationConfig
) -> None:
    """Check that a model can propose tokens to another one.

    Args:
        lm: the model that verifies.
        draft: the model that proposes.
        tokenizers: those of the two.
        config: generation settings.

    Raises:
        ValueError: other tokenizers or devices than those that speculative decoding takes, or a penalty.
    """
    tokenizer, other = tokenizers
    if tokenizer.eos_id != other.eos_id or tokenizer.inner.get_vocab() != other.inner.get_vocab():
        raise ValueError(
            f"draft_model must have the tokenizer of the model, whose vocabulary has {tokenizer.vocab_size} tokens; "
            f"got another vocabulary, of {other.vocab_size} tokens"
        )
    if draft.device != lm.device:
        raise ValueError(f"draft_model must be on {lm.device} like the model, got {draft.device}")
    if config.repetition_penalty != 1:
        raise ValueError(f"repetition_penalty must be 1 with a draft_model, got {config.repetition_penalty}")


@torch.no_grad()
def generate_speculatively(
    lm: LanguageModel,
    embeds: Tensor | EmbedFn,
    cu_seqlens: Tensor,
    draft: Draft,
    config: GenerationConfig,
    vocab_size: int,
    finished: Sequence[bool],
) -> Generator[list[list[int]], None, None]:
    """Generate tokens for S packed prompts, several a step.

    Tokens have the distribution of those that the model samples alone; greedy ones are the same, up to rounding: a
    step of several tokens may round differently from single ones.

    Args:
        lm: the model.
        embeds, cu_seqlens: prompts, as in `generate_tokens`.
        draft: proposes `config.draft_tokens` tokens a step.
        config: sampling settings.
        vocab_size: tokens from here on are never chosen.
        finished: flags that the caller updates between steps; finished sequences are left out.

    Returns:
        An iterator over steps, each with the new tokens of every sequence.
    """
    n, device, n_draft = len(cu_seqlens) - 1, lm.device, config.draft_tokens
    if config.max_new_tokens == 0 or not n:
        return
    noise = _Noise(config.seed, device, vocab_size)
    pool, logits = _prefilled(lm, embeds, cu_seqlens, config)  # (S, V)
    draft_pool, _ = _prefilled(draft.lm, draft.embeds, draft.cu_seqlens, config)
    # Each sequence has K + 1 slots in both pools: those of the states after its last K + 1 tokens.
    table = torch.arange(n * (n_draft + 1), device=device).view(n, n_draft + 1)
    n_valid = torch.ones(n, dtype=torch.int64, device=device)  # (S,) of these states, those that count
    last = sample(_probabilities(logits, config, vocab_size), noise.exponential())  # (S,) token that is not run yet
    tokens = [[t] for t in last.tolist()]
    counts = [1] * n
    yield tokens
    while rows := [i for i in range(n) if not finished[i] and counts[i] < config.max_new_tokens]:
        index = torch.tensor(rows, device=device)
        slots, start = table[index], n_valid[index]  # (rows, K + 1), (rows,)
        ids, q = [last[index]], []
        for k in range(n_draft + 1):
            source = slots.gather(1, start[:, None] - 1)[:, 0] if k == 0 else slots[:, k - 1]  # (rows,)
            step = StateSlots(source, slots[:, k])
            logits = draft.lm(ids[k][:, None], state=draft_pool, slots=step).logits[:, 0]
            if k < n_draft:  # the last proposal is run for its state alone
                q.append(_probabilities(logits, config, vocab_size))
                ids.append(sample(q[k], noise.exponential()))
        proposed = torch.stack(ids, 1)  # (rows, K + 1): the last token, and K proposals
        step = StateSlots(slots, num_accepted_tokens=start)
        logits = lm(proposed, state=pool, slots=step).logits  # (rows, K + 1, V)
        p = _probabilities(logits.flatten(0, 1), config, vocab_size).unflatten(0, proposed.shape)
        n_accepted, following = accept(
            p, torch.stack(q, 1), proposed[:, 1:], noise.uniform(n_draft), noise.exponential()
        )  # fmt: skip
        n_valid[index], last[index] = n_accepted + 1, following
        draft.stats.steps += len(rows)
        draft.stats.proposed += n_draft * len(rows)
        tokens = [[] for _ in range(n)]
        # The only read by the host of a step.
        outcome = torch.cat([n_accepted[:, None], proposed[:, 1:], following[:, None]], 1).tolist()
        for i, (count, *proposals, own) in zip(rows, outcome, strict=True):
            draft.stats.accepted += count
            tokens[i] = [*proposals[:count], own][: config.max_new_tokens - counts[i]]
            counts[i] += len(tokens[i])
        yield tokens


def accept(p: Tensor, q: Tensor, proposals: Tensor, uniform: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Accept proposals and draw the token after them, so that all have the distribution of the model (algorithm 1).

    Args:
        p: (S, K + 1, V) probabilities of the model at each proposal, and after the last.
        q: (S, K, V) probabilities that the proposals were drawn from.
        proposals: (S, K).
        uniform: (S, K), or one row for all, in [0, 1).
        noise: (S, V), or one row for all: exponential.

    Returns:
        the number of accepted proposals (S,), and the token after them (S,).
    """
    chosen = proposals.unsqueeze(-1)
    ratio = (p[:, :-1].gather(2, chosen) / q.gather(2, chosen)).squeeze(-1)  # (S, K)
    n_accepted = (uniform < ratio).long().cumprod(1).sum(1)  # (S,)
    at = n_accepted[:, None, None].expand(-1, 1, p.shape[2])
    # After a rejection: max(p - q, 0), normalized. After the last proposal nothing is subtracted: p itself.
    p_next = p.gather(1, at).squeeze(1)  # (S, V)
    q_next = F.pad(q, (0, 0, 0, 1)).gather(1, at).squeeze(1)
    residual = (p_next - q_next).clamp(min=0)
    # By rounding alone a proposal may be rejected where p and q are equal.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p_next)
    return n_accepted, sample(residual, noise)


def sample(p: Tensor, noise: Tensor) -> Tensor:
    """Draw from probabilities (S, V), which need not sum to 1: the token with the largest p / noise."""
    return (p / noise).argmax(-1)


class _Noise:
    """Noise that all sequences share, so that each samples what it would sample alone."""

    def __init__(self, seed: int, device: torch.device, vocab_size: int):
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device, self.vocab_size = device, vocab_size

    def exponential(self) -> Tensor:
        """(V,)"""
        noise = torch.empty(self.vocab_size, device=self.device).exponential_(generator=self.generator)
        return noise.clamp_(min=torch.finfo(noise.dtype).tiny)

    def uniform(self, n: int) -> Tensor:
        """(n,)"""
        return torch.rand(n, device=self.device, generator=self.generator)


def _prefilled(
    lm: LanguageModel, embeds: Tensor | EmbedFn, cu_seqlens: Tensor, config: GenerationConfig
) -> tuple[LMState, Tensor]:
    """Run the prompts; return a pool with the state of each in its K + 1 slots, and the logits (S, V)."""
    state = lm.new_state(len(cu_seqlens) - 1, narrow_dtype(config.state_dtype))
    logits = prefill(lm, embeds, cu_seqlens, state, config.prefill_chunk)
    return states.repeat(state, config.draft_tokens + 1), logits


def _probabilities(logits: Tensor, config: GenerationConfig, vocab_size: int) -> Tensor:
    """Return the probabilities (S, V) that tokens are drawn from; greedy decoding has all of it on one token."""
    logits = logits[:, :vocab_size]
    if config.temperature == 0:
        return F.one_hot(logits.argmax(-1), vocab_size).to(logits.dtype)
    return filter_logits(logits / config.temperature, config.top_k, config.top_p).softmax(-1)

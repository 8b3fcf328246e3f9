"""Speculative decoding (arXiv 2211.17192, algorithm 1): a small model proposes tokens, and one step verifies them.

Letters: S sequences, K proposed tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_kernels import StateSlots, states

from ..tokenizer import Tokenizer
from .config import GenerationConfig
from .decoding import Decoder, acquire_decoder, narrow_dtype, pays_to_fuse, release_decoder
from .interface import LanguageModel, LMState
from .prefill import EmbedFn, prefill
from .sampling import draw, token_probabilities


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
    noise = _Noise(config.seed, device)
    state = lm.new_state(n, narrow_dtype(config.state_dtype))
    logits = prefill(lm, embeds, cu_seqlens, state, config.prefill_chunk)  # (S, V)
    verifier = _Verifier(lm, state, n_draft + 1)
    start = torch.zeros(n, dtype=torch.int64, device=device)  # (S,) slot of each sequence with its state
    last = draw(_probabilities(logits, config, vocab_size), noise.uniform(1))  # (S,) token that is not run yet
    tokens = [[t] for t in last.tolist()]
    counts, rows = [1] * n, list(range(n))
    decoder = acquire_decoder(draft.lm, n, config.state_dtype)
    decoder.forget_fused_steps()
    try:
        prefill(draft.lm, draft.embeds, draft.cu_seqlens, decoder.state, config.prefill_chunk)
        drafts = _DraftStates(decoder, n_draft + 1)
        yield tokens
        while True:
            kept = [j for j, i in enumerate(rows) if not finished[i] and counts[i] < config.max_new_tokens]
            if not kept:
                return
            if len(kept) < len(rows):
                index = torch.tensor(kept, device=device)
                rows, start, last = [rows[j] for j in kept], start[index], last[index]
                verifier.select(index)
                drafts.select(index)
            # The draft goes on from the last token that the model has accepted.
            drafts.restore(start)
            ids, q = [last], []
            for k in range(n_draft):
                logits = drafts.step(ids[k], k)  # (rows, V)
                q.append(_probabilities(logits, config, vocab_size))
                ids.append(draw(q[k], noise.uniform(1)))
            proposed = torch.stack(ids, 1)  # (rows, K + 1): the last token, and K proposals
            logits = verifier(proposed, start)  # (rows, K + 1, V)
            p = _probabilities(logits.flatten(0, 1), config, vocab_size).unflatten(0, proposed.shape)
            start, last = accept(p, torch.stack(q, 1), proposed[:, 1:], noise.uniform(n_draft), noise.uniform(1))
            draft.stats.steps += len(rows)
            draft.stats.proposed += n_draft * len(rows)
            tokens = [[] for _ in range(n)]
            # The only read by the host of a step.
            outcome = torch.cat([start[:, None], proposed[:, 1:], last[:, None]], 1).tolist()
            for i, (count, *proposals, own) in zip(rows, outcome, strict=True):
                draft.stats.accepted += count
                tokens[i] = [*proposals[:count], own][: config.max_new_tokens - counts[i]]
                counts[i] += len(tokens[i])
            # The next step starts after the last proposal of a sequence that accepted all.
            if any(count == n_draft for count, *_ in outcome):
                drafts.step(ids[n_draft], n_draft)
            yield tokens
    finally:
        release_decoder(draft.lm, decoder)


def _slots(rows: int, n_slots: int, device: torch.device) -> Tensor:
    """Return the slots (rows, K + 1) of each sequence in a pool: those of its states after successive tokens."""
    return torch.arange(rows * n_slots, device=device).view(rows, n_slots)


class _Verifier:
    """Steps of K + 1 tokens a sequence, which keep the state after each; by one kernel where that pays.

    Args:
        lm: the model.
        state: of all S sequences after their prompts.
        n_slots: K + 1.
    """

    def __init__(self, lm: LanguageModel, state: LMState, n_slots: int):
        self.lm, self.n_slots = lm, n_slots
        self.n_weights = sum(t.numel() for t in (*lm.parameters(), *lm.buffers()))
        self._use(states.repeat(state, n_slots))

    def _use(self, pool: LMState) -> None:
        self.pool = pool
        self.slots = _slots(len(pool[0].ssm) // self.n_slots, self.n_slots, self.lm.device)
        self.fused: Callable[[Tensor], Tensor | None] | None = None
        is_plain = pool[0].ssm.dtype == torch.float32 and self.lm.device.type == "cpu"
        if is_plain and pays_to_fuse(self.slots.numel(), self.n_weights, self.lm.device):
            if self.lm.obstacle_to_fusing() is None:
                self.fused = self.lm.fuse_step(pool, self.n_slots)

    def select(self, rows: Tensor) -> None:
        """Continue with these sequences."""
        self._use(states.select(self.pool, self.slots[rows].flatten()))

    def __call__(self, tokens: Tensor, start: Tensor) -> Tensor:
        """Run tokens (rows, K + 1) from the state in the slot `start` (rows,) of each sequence: (rows, K + 1, V)."""
        if self.fused is not None:
            # The kernel starts from the first slot of a sequence.
            source = self.slots.gather(1, start[:, None])[:, 0]  # (rows,)
            for layer in self.pool:
                for t in layer:
                    t[self.slots[:, 0]] = t[source]
            logits = self.fused(self.lm.embed(tokens).flatten(0, 1))
            if logits is not None:
                return logits.unflatten(0, tokens.shape)
            self.fused, start = None, torch.zeros_like(start)  # weights have moved
        step = StateSlots(self.slots, num_accepted_tokens=start + 1)
        return self.lm(tokens, state=self.pool, slots=step).logits


class _DraftStates:
    """The draft's steps by a `Decoder`, and its state after each of a sequence's last tokens.

    Args:
        decoder: with the states of all S sequences after their prompts.
        n_slots: slots of a sequence, K + 1; the first has that state.
    """

    def __init__(self, decoder: Decoder, n_slots: int):
        self.decoder, self.n, self.n_slots = decoder, decoder.batch, n_slots
        self.pool = states.repeat(decoder.state, n_slots)
        self.slots = _slots(self.n, n_slots, decoder.device)

    def select(self, rows: Tensor) -> None:
        """Continue with these sequences."""
        self.pool = states.select(self.pool, self.slots[rows].flatten())
        self.slots = _slots(len(rows), self.n_slots, self.decoder.device)
        # S, S / 2, S / 4, ... sequences, so that a GPU captures few graphs; those that fill up are not read.
        batch = self.n
        while len(rows) <= batch // 2:
            batch //= 2
        if batch != self.decoder.batch:
            self.decoder.set_batch(batch)

    def restore(self, start: Tensor) -> None:
        """Continue from the state in the slot `start` (rows,) of each sequence."""
        slots = self.slots.gather(1, start[:, None])[:, 0]  # (rows,)
        slots = F.pad(slots, (0, self.decoder.batch - len(slots)))
        for layer, kept in zip(self.decoder.state, self.pool, strict=True):
            for t, values in zip(layer, kept, strict=True):
                t.copy_(values[slots.to(t.device)])

    def step(self, tokens: Tensor, slot: int) -> Tensor:
        """Advance each sequence by its token (rows,), keep the states in that slot, and return logits (rows, V)."""
        n, slots = len(tokens), self.slots[:, slot]
        logits = self.decoder(F.pad(tokens, (0, self.decoder.batch - n)))  # (batch, V)
        for layer, kept in zip(self.decoder.state, self.pool, strict=True):
            for t, values in zip(layer, kept, strict=True):
                values[slots.to(t.device)] = t[:n]
        return logits[:n]


def accept(p: Tensor, q: Tensor, proposals: Tensor, uniform: Tensor, own_uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Accept proposals and draw the token after them, so that all have the distribution of the model (algorithm 1).

    Args:
        p: (S, K + 1, V) probabilities of the model at each proposal, and after the last.
        q: (S, K, V) probabilities that the proposals were drawn from.
        proposals: (S, K).
        uniform: (S, K), or one row for all, in [0, 1).
        own_uniform: (S,), or (1,) for all, in [0, 1): for the token after them.

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
    return n_accepted, draw(residual, own_uniform)


class _Noise:
    """Noise that all sequences share, so that each samples what it would sample alone."""

    def __init__(self, seed: int, device: torch.device):
        self.generator, self.device = torch.Generator(device).manual_seed(seed), device

    def uniform(self, n: int) -> Tensor:
        """(n,) in [0, 1)."""
        return torch.rand(n, dtype=torch.float64, device=self.device, generator=self.generator)


def _probabilities(logits: Tensor, config: GenerationConfig, vocab_size: int) -> Tensor:
    """Return the probabilities (S, V) that tokens are drawn from; greedy decoding has all of it on one token."""
    logits = logits[:, :vocab_size]
    if config.temperature == 0:
        return F.one_hot(logits.argmax(-1), vocab_size).to(logits.dtype)
    p = token_probabilities(logits, [config] * len(logits))
    return p / p.sum(-1, keepdim=True)

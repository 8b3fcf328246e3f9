"""Prefill: prompts to recurrent state, in chunks of bounded size.

Prompts are packed one after the other without padding. Letters: S sequences, T tokens of a chunk, D width, V rows of
the embedding.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ssm_kernels import states

from .interface import LanguageModel, LMState

EmbedFn = Callable[[int, int], Tensor]
"""Embeds a range of packed tokens: (start, end) -> (1, end - start, D)."""


class PrefillChunk(NamedTuple):
    """A range of packed sequences that is run in one forward pass."""

    start: int
    end: int
    rows: slice
    """Sequences with tokens in the chunk."""
    cu_seqlens: Tensor
    """Their bounds within the chunk, int32, on the CPU."""
    last_positions: list[int]
    """Positions within the chunk of the last tokens of sequences."""


def prefill_chunks(cu_seqlens: Tensor, chunk_size: int) -> Iterator[PrefillChunk]:
    """Split packed sequences into chunks of at most `chunk_size` tokens, regardless of sequence bounds.

    Args:
        cu_seqlens: (S + 1,) bounds of the sequences.
        chunk_size: most tokens of a chunk.

    Returns:
        Chunks that together cover all tokens, in order.

    Raises:
        ValueError: a sequence is empty.
    """
    bounds = cu_seqlens.tolist()
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        if a >= b:
            raise ValueError(f"a prompt needs at least one token: prompt {i} has none")
    for start in range(0, bounds[-1], chunk_size):
        end = min(start + chunk_size, bounds[-1])
        # Sequences first, ..., after - 1 overlap the chunk.
        first, after = bisect.bisect_right(bounds, start) - 1, bisect.bisect_left(bounds, end)
        # Bounds clipped to the chunk and relative to its start.
        inside = [min(max(b - start, 0), end - start) for b in bounds[first : after + 1]]
        last_positions = [b - start - 1 for b in bounds[first + 1 : after + 1] if b <= end]
        yield PrefillChunk(start, end, slice(first, after), torch.tensor(inside, dtype=torch.int32), last_positions)


def run_prefill_chunk(
    lm: LanguageModel, embeds: Tensor | EmbedFn, chunk: PrefillChunk, state: LMState, logits_at: Sequence[int]
) -> Tensor:
    """Run one chunk and advance the state of its sequences.

    Args:
        lm: language model.
        embeds: (1, total, D) embeddings of all packed tokens, or a function that computes a range of them.
        chunk: range of tokens to run.
        state: state of all S sequences, updated in place.
        logits_at: positions within the chunk for which logits are wanted.

    Returns:
        Logits (len(logits_at), V).
    """
    vectors = embeds[:, chunk.start : chunk.end] if isinstance(embeds, Tensor) else embeds(chunk.start, chunk.end)
    rows = states.select(state, chunk.rows)  # views, so `state` itself advances
    positions = torch.tensor(logits_at, dtype=torch.int64, device=vectors.device)
    output = lm(inputs_embeds=vectors, state=rows, cu_seqlens=chunk.cu_seqlens, logits_at=positions)
    return output.logits[0]  # (len(logits_at), V)


def prefill(lm: LanguageModel, embeds: Tensor | EmbedFn, cu_seqlens: Tensor, state: LMState, chunk_size: int) -> Tensor:
    """Run packed prompts, at most `chunk_size` tokens per forward pass, and advance their state.

    Memory depends on `chunk_size` only. Results do not depend on it, up to rounding.

    Args:
        lm: language model.
        embeds: (1, total, D) embeddings, or a function that computes a range of them.
        cu_seqlens: (S + 1,) bounds of the prompts.
        state: state of S sequences, updated in place.
        chunk_size: most tokens of a forward pass.

    Returns:
        Logits after each prompt, (S, V).

    Raises:
        ValueError: a prompt is empty.
    """
    chunks = prefill_chunks(cu_seqlens, chunk_size)
    return torch.cat([run_prefill_chunk(lm, embeds, chunk, state, chunk.last_positions) for chunk in chunks])


def packed_tokens(lm: LanguageModel, tokens: Sequence[Sequence[int]]) -> tuple[EmbedFn, Tensor]:
    """Pack sequences of tokens one after the other.

    Returns:
        A function that embeds a range of them, and their bounds (S + 1,), int32.
    """
    # On the CPU: one chunk at a time moves to the device.
    ids = torch.tensor([t for sequence in tokens for t in sequence], dtype=torch.int64)  # (total,)
    bounds = torch.tensor([0, *itertools.accumulate(len(t) for t in tokens)], dtype=torch.int32)

    def embed(start: int, end: int) -> Tensor:
        return lm.embed(ids[start:end].to(lm.device)).unsqueeze(0)  # (1, end - start, D)

    return embed, bounds


def check_tokens(lm: LanguageModel, sequences: Sequence[Sequence[int]], whose: str = "the model's") -> None:
    """Reject token ids outside the model's vocabulary, which a tokenizer of another model produces.

    Args:
        lm: language model.
        sequences: token ids; negative ones stand for features of an image.
        whose: name of the model for the error.

    Raises:
        ValueError: a token is outside the vocabulary, even where the embedding has a padding row for it.
    """
    for i, tokens in enumerate(sequences):
        if max(tokens, default=0) >= lm.config.vocab_size:
            raise ValueError(
                f"sequence {i} has token {max(tokens)}, but {whose} vocabulary has {lm.config.vocab_size} tokens: "
                "the tokenizer is that of another model"
            )

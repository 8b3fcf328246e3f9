"""Log-likelihood of given answers: multiple choice, and evaluation without generation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ssm_kernels import states

from .generation.interface import LanguageModel, LMState
from .generation.prefill import EmbedFn, check_tokens, packed_tokens, prefill, prefill_chunks, run_prefill_chunk

BATCH_SIZE = 16
"""Answers per batch: each has its own state."""
PREFILL_CHUNK = 1024
"""Tokens per forward pass: each has logits over the entire vocabulary."""


class Score(NamedTuple):
    """Likelihood of an answer given its prompt."""

    logprob: float
    """Natural logarithm of the answer's probability: the sum over its tokens."""
    greedy: bool
    """Whether greedy decoding gives exactly this answer: each token is the most probable one."""
    tokens: int
    """Length of the answer in tokens."""


def score(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], batch_size: int = BATCH_SIZE
) -> list[Score]:
    """Compute the likelihood of each answer given its prompt, both as tokens.

    Everything is packed, nothing padded, and memory does not grow with the length. A prompt that several pairs share
    is run once.

    Args:
        lm: language model.
        prompts: at least one token each; a document starts with the end-of-text token.
        answers: at least one token each. Append the end-of-text token where ending there counts.
        batch_size: answers per batch.

    Returns:
        One score per pair.

    Raises:
        ValueError: the numbers of answers and prompts differ; or one of either is empty or has a token outside the
            vocabulary.
    """
    if len(prompts) != len(answers):
        raise ValueError(f"answers must have one entry a prompt ({len(prompts)}), got {len(answers)}")
    for name, sequences in (("prompts", prompts), ("answers", answers)):
        for i, tokens in enumerate(sequences):
            if not len(tokens):
                raise ValueError(f"{name}[{i}] must have at least one token, got none")
    check_tokens(lm, prompts)
    indices_of: dict[tuple[int, ...], list[int]] = {}  # prompt -> pairs that have it
    for i, prompt in enumerate(prompts):
        indices_of.setdefault(tuple(prompt), []).append(i)
    distinct, shared = list(indices_of), list(indices_of.values())
    scores: list[Score] = [Score(0.0, True, 0)] * len(prompts)
    for batch in batches([len(p) for p in shared], batch_size):
        batch_answers = [[answers[i] for i in p] for p in shared[batch]]
        batch_scores = score_packed(lm, *packed_tokens(lm, distinct[batch]), batch_answers, batch_size)
        for i, one in zip(itertools.chain(*shared[batch]), itertools.chain(*batch_scores), strict=True):
            scores[i] = one
    return scores


def pick(scores: Sequence[Score], per_token: bool = False) -> int:
    """Return the index of the best of several answers to one prompt; the first one of equals.

    By default the probability of the answer decides: among answers scored with their end-of-text token, the one that
    the model would give most often.

    Args:
        scores: scores of the answers.
        per_token: compare the mean log-probability per token instead. Use it for answers of unequal length that are
            scored without their ends, where the sum favours short ones.

    Raises:
        ValueError: there are no scores.
    """
    if not scores:
        raise ValueError("scores must not be empty")
    return max(range(len(scores)), key=lambda i: scores[i].logprob / (scores[i].tokens if per_token else 1))


def batches(answers: Sequence[int], batch_size: int) -> Iterator[slice]:
    """Yield runs of prompts that together have at most `batch_size` answers, but at least one prompt each.

    Args:
        answers: number of answers of each prompt.
        batch_size: most answers of a run.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    start = 0
    while start < len(answers):
        end, n = start + 1, answers[start]
        while end < len(answers) and n + answers[end] <= batch_size:
            n += answers[end]
            end += 1
        yield slice(start, end)
        start = end


@torch.no_grad()
def score_packed(
    lm: LanguageModel,
    embeds: Tensor | EmbedFn,
    cu_seqlens: Tensor,
    answers: Sequence[Sequence[Sequence[int]]],
    batch_size: int,
) -> list[list[Score]]:
    """Compute the likelihood of each packed prompt's answers. Every prompt is run once.

    Args:
        lm, embeds, cu_seqlens: the prompts, see `generate_tokens`.
        answers: for each prompt, any number of answers as tokens.
        batch_size: answers per batch.

    Returns:
        For each prompt, the scores of its answers.

    Raises:
        ValueError: see `check_tokens`, for the answers.
    """
    check_tokens(lm, [answer for group in answers for answer in group])
    state = lm.new_state(len(answers))
    last = prefill(lm, embeds, cu_seqlens, state, PREFILL_CHUNK)  # (prompts, V)
    flat = [(row, answer) for row, group in enumerate(answers) for answer in group]
    scores: list[Score] = []
    for i in range(0, len(flat), batch_size):
        scores += _score_after(lm, state, last, flat[i : i + batch_size])
    remaining = iter(scores)
    return [list(itertools.islice(remaining, len(group))) for group in answers]


def _score_after(
    lm: LanguageModel, state: LMState, last: Tensor, pairs: Sequence[tuple[int, Sequence[int]]]
) -> list[Score]:
    """Score pairs of (row of the prompt, answer), given the state and the last logits (prompts, V) of the prompts."""
    device = last.device
    # The prompt's logits predict the first token of each answer.
    rows = torch.tensor([row for row, _ in pairs], device=device)  # (pairs,)
    first = torch.tensor([answer[0] for _, answer in pairs], device=device)  # (pairs,)
    logprob, greedy = _target_logprob(last[rows], first)

    # The other tokens are predicted by a packed run over the answers, from copies of the prompts' states.
    longer = [i for i, (_, answer) in enumerate(pairs) if len(answer) > 1]
    if longer:
        copies = states.select(state, rows[longer])
        embed, bounds = packed_tokens(lm, [pairs[i][1][:-1] for i in longer])
        targets = torch.tensor([t for i in longer for t in pairs[i][1][1:]], device=device)  # (total,)
        owner = torch.tensor([i for i in longer for _ in pairs[i][1][1:]], device=device)  # (total,)
        for chunk in prefill_chunks(bounds, PREFILL_CHUNK):
            tokens = slice(chunk.start, chunk.end)
            logits = run_prefill_chunk(lm, embed, chunk, copies, range(chunk.end - chunk.start))  # (T, V)
            chunk_logprob, chunk_greedy = _target_logprob(logits, targets[tokens])
            logprob.index_add_(0, owner[tokens], chunk_logprob)
            greedy.index_add_(0, owner[tokens], chunk_greedy)
    return [
        Score(value, n_greedy == len(answer), len(answer))
        for value, n_greedy, (_, answer) in zip(logprob.tolist(), greedy.tolist(), pairs, strict=True)
    ]


def _target_logprob(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return each target's log-probability (T,) in float64, and 1 where it is the argmax of logits (T, V)."""
    at_target = logits.gather(1, targets[:, None]).squeeze(1)  # (T,)
    logprob = at_target.double() - logits.logsumexp(1).double()  # (T,)
    return logprob, (logits.argmax(1) == targets).long()

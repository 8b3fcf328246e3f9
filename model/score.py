"""How likely given answers are: for multiple choice, and for measuring without writing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ssm_kernels.modules import MixerState

from .generate import Embed, check_tokens, packed_tokens, pieces, prefill, run_piece

if TYPE_CHECKING:
    from .lm import LMState, MambaLM

BATCH_SIZE = 16
"""Answers that are run together: each has a state of its own."""
PIECE = 1024
"""Tokens run at once; each has logits over the whole vocabulary."""


class Score(NamedTuple):
    """How an answer fits its prompt."""

    logprob: float
    """Natural logarithm of the answer's probability: the sum over its tokens."""
    greedy: bool
    """Whether each token is the likeliest where it stands."""
    tokens: int
    """How many they are."""


def score(
    lm: MambaLM, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], batch_size: int = BATCH_SIZE
) -> list[Score]:
    """The likelihood of each answer after its prompt, both as tokens.

    All is run packed, none is padded, and the memory does not grow with the length. Pairs with the same prompt
    share its state, so that it is run once.

    Args:
        prompts: at least one token each; a document begins after the end-of-text token.
        answers: at least one token each; where the end of the answer counts, its token stands at the end.
        batch_size: answers that are run together.

    Raises:
        ValueError: there are not as many answers as prompts, or one of either is empty or has a token that is not the
            model's.
    """
    if len(prompts) != len(answers):
        raise ValueError(f"answers must have one entry a prompt ({len(prompts)}), got {len(answers)}")
    for name, sequences in (("prompts", prompts), ("answers", answers)):
        for i, tokens in enumerate(sequences):
            if not len(tokens):
                raise ValueError(f"{name}[{i}] must have at least one token, got none")
    check_tokens(lm, prompts)
    places: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        places.setdefault(tuple(prompt), []).append(i)
    distinct, shared = list(places), list(places.values())
    scores: list[Score] = [Score(0.0, True, 0)] * len(prompts)
    for chosen in batches([len(p) for p in shared], batch_size):
        wanted = [[answers[i] for i in p] for p in shared[chosen]]
        found = score_packed(lm, *packed_tokens(lm, distinct[chosen]), wanted, batch_size)
        for i, one in zip(itertools.chain(*shared[chosen]), itertools.chain(*found), strict=True):
            scores[i] = one
    return scores


def pick(scores: Sequence[Score], per_token: bool = False) -> int:
    """The best of several answers to one prompt: its place among them; of equals the first.

    The whole answer's probability decides, since that is what the model says: among answers scored with their ends,
    the one that it would give most often. `per_token` compares the mean over the tokens, for answers of unequal
    length that are scored without their ends, of which the probability favours the short ones.

    Raises:
        ValueError: there are no scores.
    """
    if not scores:
        raise ValueError("scores must not be empty")
    return max(range(len(scores)), key=lambda i: scores[i].logprob / (scores[i].tokens if per_token else 1))


def batches(answers: Sequence[int], batch_size: int) -> Iterator[slice]:
    """Runs of prompts that together have at most `batch_size` answers, but at least one prompt each."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    begin = 0
    while begin < len(answers):
        end, n = begin + 1, answers[begin]
        while end < len(answers) and n + answers[end] <= batch_size:
            n += answers[end]
            end += 1
        yield slice(begin, end)
        begin = end


@torch.no_grad()
def score_packed(
    lm: MambaLM, embeds: Tensor | Embed, cu_seqlens: Tensor, answers: Sequence[Sequence[Sequence[int]]], batch_size: int
) -> list[list[Score]]:
    """Scores of each prompt's answers; the prompts as in `generate_tokens`.

    Raises:
        ValueError: as `check_tokens`, of the answers.
    """
    check_tokens(lm, [answer for several in answers for answer in several])
    state = lm.new_state(len(answers))
    last = prefill(lm, embeds, cu_seqlens, state, PIECE)  # (prompts, V)
    flat = [(row, answer) for row, several in enumerate(answers) for answer in several]
    found: list[Score] = []
    for i in range(0, len(flat), batch_size):
        found += _score_after(lm, state, last, flat[i : i + batch_size])
    scores = iter(found)
    return [list(itertools.islice(scores, len(several))) for several in answers]


def _score_after(lm: MambaLM, state: LMState, last: Tensor, pairs: Sequence[tuple[int, Sequence[int]]]) -> list[Score]:
    """Scores of (prompt's row, answer): the first token by the prompt's `last` logits, the others by running on."""
    device = last.device
    rows = torch.tensor([row for row, _ in pairs], device=device)
    first = torch.tensor([answer[0] for _, answer in pairs], device=device)
    logprob, greedy = _judge(last[rows], first)

    longer = [i for i, (_, answer) in enumerate(pairs) if len(answer) > 1]
    if longer:
        branch = rows[longer]
        copies = [MixerState(*(t[branch] for t in layer)) for layer in state]
        embed, bounds = packed_tokens(lm, [pairs[i][1][:-1] for i in longer])
        targets = torch.tensor([t for i in longer for t in pairs[i][1][1:]], device=device)
        owner = torch.tensor([i for i in longer for _ in pairs[i][1][1:]], device=device)
        for piece in pieces(bounds, PIECE):
            places = slice(piece.begin, piece.end)
            logits = run_piece(lm, embed, piece, copies, range(piece.end - piece.begin))
            more, likeliest = _judge(logits, targets[places])
            logprob.index_add_(0, owner[places], more)
            greedy.index_add_(0, owner[places], likeliest)
    return [
        Score(value, right == len(answer), len(answer))
        for value, right, (_, answer) in zip(logprob.tolist(), greedy.tolist(), pairs, strict=True)
    ]


def _judge(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of each place (n, V): the target's log probability in float64, and 1 where it is the likeliest."""
    at_target = logits.gather(1, targets[:, None]).squeeze(1)
    logprob = at_target.double() - logits.logsumexp(1).double()
    return logprob, (logits.argmax(1) == targets).long()

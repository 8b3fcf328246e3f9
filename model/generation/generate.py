"""Generation: packed prompts to tokens, and tokens to text."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence

import torch
from torch import Tensor

from ..tokenizer import TextStream, Tokenizer, require_tokenizer
from .config import GenerationConfig
from .decoding import Decoder, acquire_decoder, release_decoder
from .interface import LanguageModel
from .prefill import EmbedFn, check_tokens, packed_tokens, prefill
from .sampling import SequenceSampling, choose_tokens
from .speculative import Draft, DraftStats, check_draft, generate_speculatively


@torch.no_grad()
def generate_tokens(
    lm: LanguageModel,
    embeds: Tensor | EmbedFn,
    cu_seqlens: Tensor,
    prompt_ids: Sequence[Sequence[int]],
    config: GenerationConfig,
    vocab_size: int,
    *,
    finished: Sequence[bool] | None = None,
    decoder: Decoder | None = None,
) -> Generator[tuple[list[int], Tensor], None, None]:
    """Generate tokens for S packed prompts, one per sequence and step.

    Continues until the caller stops or `max_new_tokens` is reached; the caller decides when a sequence has ended.

    Args:
        lm: language model.
        embeds: (1, total, D) prompts one after the other; or a function that computes a range of them, so that they
            need not all be in memory at once.
        cu_seqlens: (S + 1,) bounds of the prompts.
        prompt_ids: tokens of each prompt, for the repetition penalty.
        config: sampling settings and `max_new_tokens`.
        vocab_size: tokens from here on are padding rows of the embedding and are never chosen.
        finished: flags that the caller updates between steps. Finished sequences are dropped whenever that halves the
            batch, and repeat their last token from then on.
        decoder: decoder with S sequences to continue from; it is advanced. By default sequences start empty, with a
            state of `config.state_dtype`.

    Returns:
        An iterator over steps, each with the S tokens as a list and as a tensor (S,).

    Raises:
        ValueError: a prompt is empty.
    """
    n = len(cu_seqlens) - 1
    if config.max_new_tokens == 0 or not n:
        return
    device = lm.device
    # Only a decoder that was acquired here is released.
    owned = None
    if decoder is None:
        decoder = owned = acquire_decoder(lm, n, config.state_dtype)
    decoder.forget_fused_steps()
    try:
        sequences = [SequenceSampling(config, ids, vocab_size, device) for ids in prompt_ids]
        logits = prefill(lm, embeds, cu_seqlens, decoder.state, config.prefill_chunk)  # (S, V)
        rows = torch.arange(n, device=device)  # sequences that are still run
        last = torch.zeros_like(rows)  # (S,)
        for step in range(config.max_new_tokens):
            tokens = choose_tokens(logits, sequences, vocab_size)  # (rows,)
            last = last.index_copy(0, rows, tokens)
            # The only synchronization of a step: the host needs the tokens to find the end.
            yield last.tolist(), last
            # The last token is not run: no logits are needed after it.
            if step + 1 == config.max_new_tokens:
                return
            if finished is not None and any(finished):
                indices = rows_to_keep([finished[i] for i in rows.tolist()])
                if len(indices) < len(rows):
                    keep = torch.tensor(indices, device=device)  # (rows,)
                    rows, tokens = rows[keep], tokens[keep]  # (rows,) each
                    decoder.select(keep)
                    sequences = [sequences[i] for i in indices]
            logits = decoder(tokens)  # (rows, V)
    finally:
        if owned is not None:
            release_decoder(lm, owned)


def rows_to_keep(finished: list[bool]) -> list[int]:
    """Rows to continue with: the unfinished ones, filled up with finished ones to n, n / 2, n / 4, ... rows.

    With so few batch sizes, few graphs are captured.
    """
    unfinished_first = sorted(range(len(finished)), key=lambda i: finished[i])
    n, unfinished = len(finished), len(finished) - sum(finished)
    while n > 1 and unfinished <= n // 2:
        n //= 2
    return sorted(unfinished_first[:n])


class Completion:
    """Generated text of one sequence while it grows.

    Args:
        tokenizer: decodes the tokens; its end-of-text token finishes the sequence.
        stop: strings that finish the sequence and are cut off.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]):
        self.eos_id, self.stop = tokenizer.eos_id, stop
        self.stream = TextStream(tokenizer)
        self.ids: list[int] = []
        """Generated tokens, the end-of-text token included."""
        self.text = ""
        self.finished = False

    def push(self, token: int) -> None:
        """Append a token. Text that may be the start of a stop string is withheld until that is decided."""
        self.ids.append(token)
        if token == self.eos_id:
            self.finish()
            return
        self.stream.push(token)
        text = self.stream.text
        if not self.stop:
            self.text = text
            return
        # The first stop string in the text, not the first of the list.
        cut = min((i for s in self.stop if (i := text.find(s)) >= 0), default=-1)
        if cut >= 0:
            self.text, self.finished = text[:cut], True
        else:
            self.text = text[: len(text) - self._withheld()]

    def finish(self) -> None:
        """Release the withheld text: no more tokens follow."""
        if not self.finished:
            self.stream.finish()
            self.text, self.finished = self.stream.text, True

    def _withheld(self) -> int:
        """Length of the longest suffix of the text that is a prefix of a stop string."""
        return max(_overlap(self.stream.text, s) for s in self.stop)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of a text that is a prefix of a stop string, and not all of it."""
    at = text.find(stop[0], max(len(text) - len(stop) + 1, 0))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return len(text) - at if at >= 0 else 0


def generate_packed(
    lm: LanguageModel,
    embeds: Tensor | EmbedFn,
    cu_seqlens: Tensor,
    prompt_ids: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    config: GenerationConfig,
    decoder: Decoder | None = None,
    draft: Draft | None = None,
) -> Generator[list[Completion], None, None]:
    """Generate text for packed prompts.

    Args:
        lm, embeds, cu_seqlens, prompt_ids, config, decoder: see `generate_tokens`.
        tokenizer: decodes the generated tokens.
        draft: proposes tokens to the model, which has checked it (`check_draft`); not with a `decoder`.

    Returns:
        An iterator that yields the same completions after every step, and once more when they are complete.

    Raises:
        ValueError: see `generate_tokens` and `check_tokens`.
    """
    # Before the prefill, which embeds tokens in chunks.
    check_tokens(lm, prompt_ids)
    if draft is not None:
        check_tokens(draft.lm, prompt_ids, "the draft model's")
    completions = [Completion(tokenizer, config.stop) for _ in prompt_ids]
    finished = [False] * len(completions)
    # The embedding may have padding rows, and a tokenizer more or fewer tokens than the model.
    vocab_size = min(tokenizer.vocab_size, lm.config.vocab_size)
    if draft is None:
        steps = _single_tokens(
            generate_tokens(lm, embeds, cu_seqlens, prompt_ids, config, vocab_size, finished=finished, decoder=decoder)
        )
    else:
        vocab_size = min(vocab_size, draft.lm.config.vocab_size)
        steps = generate_speculatively(lm, embeds, cu_seqlens, draft, config, vocab_size, finished)
    with contextlib.closing(steps):
        for new in steps:
            for i, (completion, tokens) in enumerate(zip(completions, new, strict=True)):
                for token in tokens:
                    if not completion.finished:
                        completion.push(token)
                finished[i] = completion.finished
            yield completions
            if all(finished):
                return
    for completion in completions:
        completion.finish()
    yield completions


def _single_tokens(
    steps: Generator[tuple[list[int], Tensor], None, None],
) -> Generator[list[list[int]], None, None]:
    """Yield the tokens of `generate_tokens` as lists of one."""
    with contextlib.closing(steps):
        for tokens, _ in steps:
            yield [[token] for token in tokens]


def generate_texts(
    lm: LanguageModel,
    prompts: Sequence[str],
    config: GenerationConfig | None = None,
    draft_model: LanguageModel | None = None,
    draft_stats: DraftStats | None = None,
) -> Generator[list[Completion], None, None]:
    """Generate text for prompts in text. An empty prompt is encoded as the end-of-text token, which starts a document.

    Args:
        lm: language model with a tokenizer.
        prompts: texts to continue.
        config: generation settings; the defaults if None.
        draft_model: language model that proposes tokens.
        draft_stats: counts of its proposals, which are added to.

    Returns:
        See `generate_packed`.

    Raises:
        ValueError: the model has no tokenizer; or see `check_draft`.
    """
    tokenizer, config, draft = require_tokenizer(lm), config or GenerationConfig(), None
    prompt_ids = [tokenizer.encode(p) or [tokenizer.eos_id] for p in prompts]
    if draft_model is not None:
        check_draft(lm, draft_model, (tokenizer, require_tokenizer(draft_model)), config)
        draft = Draft(
            draft_model, *packed_tokens(draft_model, prompt_ids), DraftStats() if draft_stats is None else draft_stats
        )
    return generate_packed(lm, *packed_tokens(lm, prompt_ids), prompt_ids, tokenizer, config, draft=draft)


def stream_text(steps: Iterator[list[Completion]]) -> Iterator[str]:
    """Yield the new text of a single completion after each step, where there is any."""
    emitted = ""
    for (completion,) in steps:
        new, emitted = completion.text[len(emitted) :], completion.text
        if new:
            yield new

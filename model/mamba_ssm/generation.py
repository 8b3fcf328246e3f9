"""`mamba_ssm.utils.generation`: greedy decoding or sampling with caches, for batches of prompts of one length."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ssm_kernels.compat.mamba_ssm import InferenceParams

from ..generation.cuda_graph import capture, graph_key, has_graphs, warm_up, warn_once


class Streamer(Protocol):
    """Interface of `transformers.TextStreamer`: takes tokens as they are generated."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


@dataclass
class DecoderOnlyOutput:
    """Result of `decode`, by attribute, name or index, like the output classes of `transformers`."""

    sequences: Tensor
    """(B, L) tokens, prompts included."""
    scores: tuple[Tensor, ...] | None = None
    """Logits (B, V) before each new token; None if not requested."""

    def __getitem__(self, key: str | int) -> Any:
        # Absent fields have no index, as in `transformers`.
        present = {name: value for name, value in vars(self).items() if value is not None}
        return present[key] if isinstance(key, str) else tuple(present.values())[key]


class GenerationMixin:
    """`generate` for a model that takes `inference_params` and has `allocate_inference_cache`."""

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        raise NotImplementedError

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> Tensor | DecoderOnlyOutput:
        """Continue prompts (B, L) until all have `max_length` tokens.

        Args:
            return_dict_in_generate: return a `DecoderOnlyOutput` instead of its `sequences`.
            output_scores: return the logits of each new token too.
            input_ids, max_length, top_k, top_p, min_p, temperature, kwargs: see `decode`.

        Returns:
            Tokens (B, L') or a `DecoderOnlyOutput`.
        """
        output = decode(
            input_ids,
            self,  # pyright: ignore[reportArgumentType]  the class is mixed into an nn.Module
            max_length,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            temperature=temperature,
            **kwargs,
        )
        if not output_scores:
            output.scores = None
        return output if return_dict_in_generate else output.sequences


@torch.inference_mode()
def decode(
    input_ids: Tensor,
    model: nn.Module,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    streamer: Streamer | None = None,
) -> DecoderOnlyOutput:
    """Continue prompts of one length.

    Args:
        input_ids: (B, L) prompts.
        model: called with `input_ids`, `position_ids`, `inference_params` and `num_last_tokens`; its result has
            `logits`.
        max_length: final length of a sequence in tokens, prompt included.
        top_k, top_p, min_p, temperature: see `sample`.
        repetition_penalty: for tokens that a sequence has already; see `modify_logit_for_repetition_penalty`.
        eos_token_id: stops decoding once all sequences produce it in the same step.
        teacher_outputs: (B, L') tokens to force, as far as they go.
        vocab_size: only tokens below it may be chosen; all rows of the head by default.
        cg: replay a CUDA graph for each token. Where there is none, on a CPU or under autocast, this is logged once.
        enable_timing: print the time that decoding took.
        streamer: receives the prompts, and each step's tokens (B, 1).

    Returns:
        Tokens, and the logits before each new one.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """
    # Everything is checked before the model runs.
    _check(input_ids, max_length, repetition_penalty, teacher_outputs)
    check_sampling(top_k, top_p, min_p, temperature)
    batch, length = input_ids.shape
    cache, run = None, None  # static memory, and a step on it
    if cg:
        # Removed from the model while in use: two calls at once must not share it.
        cache = update_graph_cache(model, vars(model).pop("_decoding_cache", None), batch, length, max_length)
        params, run = cache.params, cache.run
        params.reset(max_length, batch)
    else:
        params = InferenceParams(max_seqlen=max_length, max_batch_size=batch)
    started = time.perf_counter()
    if streamer is not None:
        streamer.put(input_ids.cpu())
    sequences, scores = [input_ids], []
    while params.seqlen_offset < max_length - 1:
        last = sequences[-1]
        # The first call is the prefill; each further one takes one token.
        if params.seqlen_offset == 0:
            logits = model(last, position_ids=None, inference_params=params, num_last_tokens=1).logits
        else:
            positions = torch.full_like(last, params.seqlen_offset)  # (B, 1)
            logits = (
                model(last, position_ids=positions, inference_params=params, num_last_tokens=1).logits
                if run is None
                else run(last, positions, params.seqlen_offset)
            )
        params.seqlen_offset += last.shape[1]
        # One position remains: the last.
        logits = logits.squeeze(1)  # (B, V)
        scores.append(logits[:, :vocab_size])
        # Teacher forcing as far as the given tokens go.
        if teacher_outputs is not None and params.seqlen_offset < teacher_outputs.shape[1]:
            tokens = teacher_outputs[:, params.seqlen_offset]  # (B,)
        else:
            if repetition_penalty != 1.0:  # before padding rows are cut, since a prompt may have any token
                seen = torch.cat(sequences, dim=1)  # (B, L)
                logits = modify_logit_for_repetition_penalty(logits.clone(), seen, repetition_penalty)
            tokens = sample(logits[:, :vocab_size], top_k, top_p, min_p, temperature)  # (B,)
        sequences.append(tokens.unsqueeze(1))  # (B, 1)
        if streamer is not None:
            streamer.put(sequences[-1].cpu())
        # All sequences in the same step, as in the original: none is tracked on its own.
        if eos_token_id is not None and (tokens == eos_token_id).all():
            break
    if cache is not None:
        model._decoding_cache = cache  # pyright: ignore[reportArgumentType]  torch's stub takes tensors and modules
    if streamer is not None:
        streamer.end()
    if enable_timing:
        # Kernels run asynchronously.
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        print(f"Prompt processing + decoding time: {1000 * (time.perf_counter() - started):.0f}ms")
    return DecoderOnlyOutput(torch.cat(sequences, dim=1), tuple(scores))


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """Choose a token of each row, sampling with PyTorch's global generator.

    Args:
        logits: (B, V).
        top_k: 1 is greedy; otherwise sample among the k most probable tokens, or among all with 0.
        top_p: of these, the most probable whose cumulative probability reaches this; 0 and 1 keep all.
        min_p: of these, tokens at least this times as probable as the most probable one, before the temperature
            (arXiv 2407.01082). The original compares logits with this number, and ignores it with `top_k`.
        temperature: divides the logits.

    Returns:
        Tokens (B,).

    Raises:
        ValueError: an argument is out of its range.
    """
    check_sampling(top_k, top_p, min_p, temperature)
    # Greedy, whatever the temperature.
    if top_k == 1:
        return logits.argmax(dim=-1)
    logits, tokens = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True), None
    if top_k > 0:
        logits, tokens = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    modify_logits_for_min_p_filtering(logits, min_p)
    # min_p is relative to the distribution at temperature 1.
    logits /= temperature
    modify_logits_for_top_p_filtering(logits, top_p)
    sampled = torch.multinomial(logits.softmax(dim=-1), num_samples=1)  # (B, 1)
    return (sampled if tokens is None else tokens.gather(-1, sampled)).squeeze(-1)  # (B,)


def modify_logits_for_top_k_filtering(logits: Tensor, top_k: int) -> None:
    """Set all but the `top_k` most probable of logits (B, V) to -inf, in place."""
    logits.masked_fill_(logits < logits.topk(top_k, dim=-1).values[..., -1:], -torch.inf)


def modify_logits_for_top_p_filtering(logits: Tensor, top_p: float) -> None:
    """Set logits (B, V) outside the nucleus of probability `top_p` to -inf, in place."""
    if not 0 < top_p < 1:
        return
    ordered, order = logits.sort(dim=-1)  # (B, V) each
    # Ascending: the tail whose cumulative probability is at most 1 - top_p.
    unlikely = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    logits.masked_fill_(unlikely.scatter(-1, order, unlikely), -torch.inf)


def modify_logits_for_min_p_filtering(logits: Tensor, min_p: float) -> None:
    """Set logits (B, V) of tokens less probable than `min_p` times the most probable to -inf, in place."""
    if min_p > 0:
        probabilities = logits.softmax(dim=-1)  # (B, V)
        logits.masked_fill_(probabilities < min_p * probabilities.amax(dim=-1, keepdim=True), -torch.inf)


def modify_logit_for_repetition_penalty(
    logits: Tensor, prev_output_tokens: Tensor, repetition_penalty: float = 1.0
) -> Tensor:
    """Penalize tokens that have occurred, in place (arXiv 1909.05858).

    Args:
        logits: (B, V). Positive ones are divided, negative ones multiplied.
        prev_output_tokens: (B, L).
        repetition_penalty: 1 changes nothing.

    Returns:
        `logits`.
    """
    if repetition_penalty == 1.0:
        return logits
    seen = logits.gather(1, prev_output_tokens)  # (B, L)
    seen = torch.where(seen < 0, seen * repetition_penalty, seen / repetition_penalty)
    return logits.scatter_(1, prev_output_tokens, seen)  # (B, V)


def check_sampling(top_k: int, top_p: float, min_p: float, temperature: float) -> None:
    """Raise a ValueError that names the argument of `sample` that is out of its range."""
    if top_k < 0:
        raise ValueError(f"top_k must not be negative, got {top_k}")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p must be in [0, 1], got {top_p}")
    if not 0 <= min_p < 1:
        raise ValueError(f"min_p must be in [0, 1), got {min_p}")
    if top_k != 1 and not 0 < temperature < torch.inf:
        raise ValueError(f"temperature must be positive unless top_k is 1, got {temperature}")


def _check(input_ids: Tensor, max_length: int, repetition_penalty: float, teacher_outputs: Tensor | None) -> None:
    if input_ids.dim() != 2 or not input_ids.shape[1]:
        raise ValueError(f"input_ids must have shape (B, L) with L at least 1, got {tuple(input_ids.shape)}")
    if max_length <= input_ids.shape[1]:
        raise ValueError(f"max_length must be more than the prompt's {input_ids.shape[1]} tokens, got {max_length}")
    if repetition_penalty <= 0:
        raise ValueError(f"repetition_penalty must be positive, got {repetition_penalty}")
    if teacher_outputs is not None and (teacher_outputs.dim() != 2 or len(teacher_outputs) != len(input_ids)):
        raise ValueError(f"teacher_outputs must have shape ({len(input_ids)}, L), got {tuple(teacher_outputs.shape)}")


@dataclass
class DecodingCGCache:
    """Caches with fixed addresses, and the CUDA graphs that use them."""

    max_batch_size: int = 0
    max_seqlen: int = 0
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    callables: dict[tuple[int, ...], Callable[[Tensor, Tensor, int], Tensor]] = field(default_factory=dict)
    inference_params: InferenceParams | None = None
    run: Callable[[Tensor, Tensor, int], Tensor] | None = None
    """Step: (tokens (B, L'), their positions, number of tokens before them) -> logits (B, L', V)."""
    key: tuple = ()
    """`graph_key` of the model and of the stream that runs the steps."""

    @property
    def params(self) -> InferenceParams:
        """`inference_params` of a cache that `update_graph_cache` has made.

        Raises:
            ValueError: the cache is empty.
        """
        if self.inference_params is None:
            raise ValueError("the cache is empty: make one by update_graph_cache")
        return self.inference_params


@torch.inference_mode()
def update_graph_cache(
    model: nn.Module,
    cache: DecodingCGCache | None,
    batch_size: int,
    seqlen_og: int,
    max_seqlen: int,
    decoding_seqlens: tuple[int, ...] = (1,),
    dtype: torch.dtype | None = None,
    n_warmups: int = 2,
) -> DecodingCGCache:
    """Allocate caches for a batch and capture steps on them: CUDA graphs, or on a CPU the model itself.

    If capture fails, the reason is logged once and steps run eagerly. Steps belong to the stream of this call: one that
    runs them on another stream has to order them itself. Not run on a GPU.

    Args:
        model: with `allocate_inference_cache`.
        cache: of an earlier call, reused where it fits.
        batch_size: number of sequences.
        seqlen_og: tokens of the prompt.
        max_seqlen: final length of a sequence.
        decoding_seqlens: tokens of a step; one graph for each.
        dtype: of the caches; that of the model's first parameter by default.
        n_warmups: steps before a graph is captured.

    Returns:
        The caches, with `run` for a step.
    """
    # The first parameter has the device and dtype of the model.
    like = next(model.parameters())
    dtype = like.dtype if dtype is None else dtype
    key = graph_key(model, like.device)
    if (
        cache is None
        or (cache.key, cache.dtype, cache.max_batch_size) != (key, dtype, batch_size)
        or max_seqlen > cache.max_seqlen
    ):
        params = InferenceParams(
            max_seqlen,
            batch_size,
            seqlen_og,
            key_value_memory_dict=_allocate(model, batch_size, max_seqlen, dtype),
            lengths_per_sample=torch.full((batch_size,), seqlen_og, dtype=torch.int32, device=like.device),
        )
        cache = DecodingCGCache(batch_size, max_seqlen, like.device, dtype, inference_params=params, key=key)
    # One graph per shape; graphs of an earlier call are kept.
    for steps in decoding_seqlens:
        if (batch_size, steps) not in cache.callables:
            cache.callables[batch_size, steps] = _make_step(model, cache, batch_size, steps, n_warmups)

    # Picks the graph by the shape of the tokens.
    def run(input_ids: Tensor, position_ids: Tensor, seqlen: int) -> Tensor:
        return cache.callables[tuple(input_ids.shape)](input_ids, position_ids, seqlen)

    cache.run = run
    cache.params.seqlen_offset = 0
    return cache


def _make_step(
    model: nn.Module, cache: DecodingCGCache, batch: int, steps: int, n_warmups: int
) -> Callable[[Tensor, Tensor, int], Tensor]:
    params, device = cache.params, next(model.parameters()).device

    def eager(input_ids: Tensor, position_ids: Tensor, seqlen: int) -> Tensor:
        _set_lengths(params, seqlen)
        return model(
            input_ids, position_ids=position_ids, inference_params=params, num_last_tokens=input_ids.shape[1]
        ).logits

    obstacle = None
    if not has_graphs(device):
        obstacle = f"on {device}, which has no CUDA graphs"
    elif torch.is_autocast_enabled("cuda"):
        obstacle = "under autocast, whose copies of the weights do not last until a replay"
    if obstacle is not None:
        warn_once(f"cg=True changes nothing {obstacle}")
        return eager
    # Static inputs of the graph.
    tokens, positions = (torch.zeros(batch, steps, dtype=torch.long, device=device) for _ in range(2))
    # Capture at the last position, so that caches of attention are large enough for any replay.
    offset, params.seqlen_offset = params.seqlen_offset, cache.max_seqlen - steps

    def step() -> Tensor:
        return model(tokens, position_ids=positions, inference_params=params, num_last_tokens=steps).logits

    _set_lengths(params, params.seqlen_offset)
    try:
        for _ in range(n_warmups):
            warm_up(step, device)
        replay, logits = capture(step, device)
    except RuntimeError as e:
        warn_once(f"decoding runs without a CUDA graph, since capture failed: {e}")
        return eager
    finally:
        params.seqlen_offset = offset

    def replayed(input_ids: Tensor, position_ids: Tensor, seqlen: int) -> Tensor:
        _set_lengths(params, seqlen)
        tokens.copy_(input_ids)
        positions.copy_(position_ids)
        replay()
        # The next replay overwrites the static logits.
        return logits.clone()

    return replayed


def _set_lengths(params: InferenceParams, length: int) -> None:
    """Set the number of tokens before the next one, in place: a captured graph reads it."""
    if params.lengths_per_sample is not None:
        params.lengths_per_sample.fill_(length)


def _allocate(model: nn.Module, batch: int, max_seqlen: int, dtype: torch.dtype) -> dict[int, Any]:
    allocate: Callable[..., dict[int, Any]] = model.allocate_inference_cache  # pyright: ignore[reportAssignmentType]
    return allocate(batch, max_seqlen, dtype)

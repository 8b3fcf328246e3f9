"""Writing on from a prompt, token by token, with a state whose size does not grow."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ssm_kernels import resolve_backend
from ssm_kernels.modules import MixerState

from .generation_config import GenerationConfig
from .tokenizer import TextStream, Tokenizer

if TYPE_CHECKING:
    from .lm import LMState, MambaLM

logger = logging.getLogger(__name__)


Embed = Callable[[int, int], Tensor]
"""Gives the vectors of packed tokens from one place to another, (1, end - begin, D)."""


@torch.no_grad()
def generate_tokens(
    lm: MambaLM,
    embeds: Tensor | Embed,
    cu_seqlens: Tensor,
    seen: Sequence[Sequence[int]],
    config: GenerationConfig,
    vocab_size: int,
    *,
    done: Sequence[bool] | None = None,
    decoder: Decoder | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield, step by step, the next token of each of S sequences, as a list and as a tensor (S,).

    It goes on until the caller stops or `max_new_tokens` is reached: what ends a sequence is the caller's to say.

    Args:
        embeds: (1, total, D) prompts one after the other; or a function that gives them piece by piece, so that they
            need not all be there at once.
        cu_seqlens: (S + 1,) their bounds. Prompts are run packed, so none is padded.
        seen: tokens of each prompt, for the repetition penalty.
        vocab_size: tokens beyond it, which only fill up the embedding, are never chosen.
        done: the caller's, read before each step: sequences that are True have ended, and are left out of the steps
            whenever that halves the batch. They then keep giving the last token that they had.
        decoder: of S rows; the sequences go on from the state in it, and it is advanced. Else they begin.

    Raises:
        ValueError: a prompt is empty.
    """
    n = len(cu_seqlens) - 1
    if config.max_new_tokens == 0 or not n:
        return
    device = lm.device
    mine = decoder is None
    if mine:
        decoder = _take_decoder(lm, n)
    try:
        chooser = _Chooser(config, seen, vocab_size, device)
        logits = prefill(lm, embeds, cu_seqlens, decoder.state, config.prefill_chunk)
        rows = torch.arange(n, device=device)  # the sequences that are run
        last = torch.zeros_like(rows)
        for step in range(config.max_new_tokens):
            tokens = chooser(logits)
            last = last.index_copy(0, rows, tokens)
            yield last.tolist(), last
            if step + 1 == config.max_new_tokens:
                return
            if done is not None and any(done):
                kept = rows_to_keep([done[i] for i in rows.tolist()])
                if len(kept) < len(rows):
                    kept = torch.tensor(kept, device=device)
                    rows, tokens = rows[kept], tokens[kept]
                    decoder.keep(kept)
                    chooser.keep(kept)
            logits = decoder(tokens)
    finally:
        if mine:
            _give_back(lm, decoder)


def rows_to_keep(done: list[bool]) -> list[int]:
    """The rows to go on with: those that are not done, filled up with others to all, a half, a quarter, ... of them.

    Few sizes occur then, so that few graphs are captured.
    """
    going = sorted(range(len(done)), key=lambda i: done[i])
    n, alive = len(done), len(done) - sum(done)
    while n > 1 and alive <= n // 2:
        n //= 2
    return sorted(going[:n])


class Piece(NamedTuple):
    """A run of places in a pack of sequences."""

    begin: int
    end: int
    rows: slice
    """The sequences of which it holds a part."""
    cu_seqlens: Tensor
    """Their bounds within the piece, int32, on the CPU."""
    ends: list[int]
    """Places within the piece at which a sequence has its last token."""


def pieces(cu_seqlens: Tensor, size: int) -> Iterator[Piece]:
    """Cut packed sequences in pieces of at most `size` places, whatever the bounds.

    Raises:
        ValueError: a sequence is empty.
    """
    bounds = cu_seqlens.tolist()
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        if a >= b:
            raise ValueError(f"a prompt needs at least one token: prompt {i} has none")
    for begin in range(0, bounds[-1], size):
        end = min(begin + size, bounds[-1])
        first, after = bisect.bisect_right(bounds, begin) - 1, bisect.bisect_left(bounds, end)
        inside = [min(max(b - begin, 0), end - begin) for b in bounds[first : after + 1]]
        ends = [b - begin - 1 for b in bounds[first + 1 : after + 1] if b <= end]
        yield Piece(begin, end, slice(first, after), torch.tensor(inside, dtype=torch.int32), ends)


def run_piece(lm: MambaLM, embeds: Tensor | Embed, piece: Piece, state: LMState, at: Sequence[int]) -> Tensor:
    """Run one piece: logits (places, V) at these places of it. The state of its sequences is advanced."""
    vectors = embeds[:, piece.begin : piece.end] if isinstance(embeds, Tensor) else embeds(piece.begin, piece.end)
    rows = [MixerState(*(t[piece.rows] for t in layer)) for layer in state]  # views
    places = torch.tensor(at, dtype=torch.int64, device=vectors.device)
    return lm(inputs_embeds=vectors, state=rows, cu_seqlens=piece.cu_seqlens, at=places).logits[0]


def prefill(lm: MambaLM, embeds: Tensor | Embed, cu_seqlens: Tensor, state: LMState, size: int) -> Tensor:
    """Run packed prompts, at most `size` tokens at once: the logits after each, (S, V). The state is advanced.

    The memory that this takes depends on `size` alone. The answer is, to rounding, that of one piece.
    """
    return torch.cat([run_piece(lm, embeds, piece, state, piece.ends) for piece in pieces(cu_seqlens, size)])


class Decoder:
    """Steps of some sequences, each by one token: last tokens (S,) to logits (S, V).

    State, tokens and (in a graph) logits stay where they are in memory. On a GPU the first steps of a number of
    sequences warm up, then a step is captured in a CUDA graph and replayed from there on: one graph for each number.
    The host waits for nothing in a step. Where capture fails, the reason is logged once and steps run one by one.

    The rules are those of `torch.cuda.graphs`: warm-up on a side stream, static memory, nothing read by the host.
    Not run on a GPU; what is tested on a CPU is that addresses stay and that nothing is read.
    """

    WARM_UP = 3
    """Steps before capture; they are steps of the answer, so that a short one is never slowed down by a capture."""

    def __init__(self, lm: MambaLM, batch: int):
        self.lm = weakref.proxy(lm)
        with torch.inference_mode(False):  # else the state could not be updated outside of that mode
            self.buffers = lm.new_state(batch)
            self.device = lm.device
            self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
        self.graphs: dict[int, tuple[Callable[[], None], Tensor]] = {}
        # Not over several devices; nor under autocast, whose copies of the weights do not last until a replay.
        self.may_capture = (
            has_graphs(self.device)
            and all(layer.ssm.device == self.device for layer in self.buffers)
            and not torch.is_autocast_enabled("cuda")
        )
        self.captured_with = graph_key(lm)
        self.use(batch)

    def use(self, batch: int) -> None:
        """Work on the first rows of the memory, as they stand."""
        self.batch, self.steps = batch, 0
        self.state: LMState = [MixerState(*(t[:batch] for t in layer)) for layer in self.buffers]

    def reset(self) -> None:
        """Sequences that have not begun."""
        for layer in self.state:
            for t in layer:
                t.zero_()

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, which become the first ones."""
        for layer in self.state:
            for t in layer:
                t[: len(rows)] = t[rows.to(t.device)]
        self.use(len(rows))

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Advance each sequence by its token. The logits hold until the next step."""
        self.tokens[: self.batch, 0].copy_(tokens)
        if self.may_capture and self.steps == self.WARM_UP and self.batch not in self.graphs:
            try:
                self.graphs[self.batch] = capture(self.step, self.device)
            except RuntimeError as e:
                self.may_capture = False
                _say_once(f"decoding runs without a CUDA graph, since capture failed: {e}")
        if self.batch in self.graphs:
            replay, logits = self.graphs[self.batch]
            replay()
            return logits
        self.steps += 1
        return warm_up(self.step, self.device) if self.may_capture else self.step()

    def step(self) -> Tensor:
        """What is captured."""
        return self.lm(self.tokens[: self.batch], state=self.state).logits[:, 0]


def has_graphs(device: torch.device) -> bool:
    """Whether work on this device can be captured."""
    return device.type == "cuda"


def warm_up(step: Callable[[], Tensor], device: torch.device) -> Tensor:
    """Run a step on a side stream, as it must be run before its capture."""
    here, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(here)
    with torch.cuda.stream(side):
        result = step()
    here.wait_stream(side)
    result.record_stream(here)
    return result


def capture(step: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Capture a step without running it: what replays it, and where its result then lies.

    Raises:
        RuntimeError: the step does what a graph cannot hold.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads may allocate meanwhile.
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = step()
    return graph.replay, result


_already_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _already_said:
        _already_said.add(message)
        logger.warning(message)


# The last decoder of each model, for its graphs; it is taken out while it is used.
_decoders: weakref.WeakKeyDictionary[MambaLM, Decoder] = weakref.WeakKeyDictionary()


def _take_decoder(lm: MambaLM, batch: int) -> Decoder:
    decoder = _decoders.pop(lm, None)
    if decoder is None or len(decoder.tokens) < batch or decoder.captured_with != graph_key(lm):
        decoder = Decoder(lm, batch)
    decoder.use(batch)
    decoder.reset()
    return decoder


def _give_back(lm: MambaLM, decoder: Decoder) -> None:
    if has_graphs(decoder.device):
        _decoders[lm] = decoder


def graph_key(lm: MambaLM) -> tuple:
    """What a graph has taken in for good, besides the memory that is the decoder's own."""
    device = lm.device
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    kernels = resolve_backend("auto", device, "ssd")
    weights = tuple((t.data_ptr(), t.dtype) for t in itertools.chain(lm.parameters(), lm.buffers()))
    return device, autocast, kernels, torch.get_float32_matmul_precision(), weights


def state_bytes(state: LMState) -> int:
    """Memory of a state; the same however long the sequences are."""
    return sum(t.numel() * t.element_size() for layer in state for t in layer)


class _Chooser:
    def __init__(self, config: GenerationConfig, seen: Sequence[Sequence[int]], vocab_size: int, device: torch.device):
        self.config, self.vocab_size = config, vocab_size
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.occurred = None
        if config.repetition_penalty != 1:
            self.occurred = torch.zeros(len(seen), vocab_size, dtype=torch.bool, device=device)
            for row, tokens in zip(self.occurred, seen, strict=True):
                row[[t for t in tokens if t >= 0]] = True

    def keep(self, rows: Tensor) -> None:
        if self.occurred is not None:
            self.occurred = self.occurred[rows]

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits[:, : self.vocab_size]
        config = self.config
        if self.occurred is not None:
            p = config.repetition_penalty
            logits = torch.where(self.occurred, torch.where(logits > 0, logits / p, logits * p), logits)
        if config.temperature > 0:
            logits = truncated(logits / config.temperature, config.top_k, config.top_p) - self._noise(logits).log()
        tokens = logits.argmax(-1)
        if self.occurred is not None:
            self.occurred.scatter_(1, tokens[:, None], True)
        return tokens

    def _noise(self, logits: Tensor) -> Tensor:
        """Exponential, (V,): the token with the largest p / noise is a draw from p. `multinomial` makes the host wait.

        It is the same for all sequences, so that the draws of each are those that it would make alone.
        """
        noise = torch.empty_like(logits[0]).exponential_(generator=self.generator)
        return noise.clamp_(min=torch.finfo(noise.dtype).tiny)


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
        self.ids: list[int] = []
        """Its tokens, the end-of-text token included."""
        self.text = ""
        self.done = False

    def push(self, token: int) -> None:
        """Take the next token. Text that may be the beginning of a stop text is held back until that is decided."""
        self.ids.append(token)
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


def generate_packed(
    lm: MambaLM,
    embeds: Tensor | Embed,
    cu_seqlens: Tensor,
    seen: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    config: GenerationConfig,
    decoder: Decoder | None = None,
) -> Iterator[list[Answer]]:
    """Answer packed prompts, giving the answers after each step and once more when they are complete.

    The arguments are those of `generate_tokens`.

    Raises:
        ValueError: as `generate_tokens` and `check_tokens`.
    """
    check_tokens(lm, seen)
    given = [Answer(tokenizer, config.stop) for _ in seen]
    done = [False] * len(given)
    # Rows that fill up the embedding are no tokens, and a tokenizer may have more or fewer tokens than the model.
    vocab_size = min(tokenizer.vocab_size, lm.config.vocab_size)
    steps = generate_tokens(lm, embeds, cu_seqlens, seen, config, vocab_size, done=done, decoder=decoder)
    with contextlib.closing(steps):
        for tokens, _ in steps:
            for i, (answer, token) in enumerate(zip(given, tokens, strict=True)):
                if not answer.done:
                    answer.push(token)
                    done[i] = answer.done
            yield given
            if all(done):
                return
    for answer in given:
        answer.finish()
    yield given


def check_tokens(lm: MambaLM, sequences: Sequence[Sequence[int]]) -> None:
    """Refuse tokens that the model has not: those of a tokenizer of another model.

    Args:
        sequences: tokens; what is below 0 stands for features of an image.

    Raises:
        ValueError: a token is not in the model's vocabulary, though the embedding may have a row to spare for it.
    """
    for i, tokens in enumerate(sequences):
        if max(tokens, default=0) >= lm.config.vocab_size:
            raise ValueError(
                f"sequence {i} has token {max(tokens)}, but the model's vocabulary has {lm.config.vocab_size} tokens: "
                "the tokenizer is that of another model"
            )


def pieces_of_text(steps: Iterator[list[Answer]]) -> Iterator[str]:
    """The text of one answer as it grows, piece by piece."""
    given = ""
    for (answer,) in steps:
        piece, given = answer.text[len(given) :], answer.text
        if piece:
            yield piece


def generate_texts(lm: MambaLM, prompts: Sequence[str], config: GenerationConfig | None) -> Iterator[list[Answer]]:
    """`generate_packed` for texts. An empty one becomes the end-of-text token, after which a document begins.

    Raises:
        ValueError: the model has no tokenizer.
    """
    if lm.tokenizer is None:
        raise ValueError("the model has no tokenizer: set model.tokenizer")
    seen = [lm.tokenizer.encode(p) or [lm.tokenizer.eos_id] for p in prompts]
    return generate_packed(lm, *packed_tokens(lm, seen), seen, lm.tokenizer, config or GenerationConfig())


def packed_tokens(lm: MambaLM, tokens: Sequence[Sequence[int]]) -> tuple[Embed, Tensor]:
    """Sequences of tokens one after the other: what embeds them, and their bounds."""
    ids = torch.tensor([t for sequence in tokens for t in sequence], dtype=torch.int64)
    bounds = torch.tensor([0, *itertools.accumulate(len(t) for t in tokens)], dtype=torch.int32)

    def embed(begin: int, end: int) -> Tensor:
        return lm.embed(ids[begin:end].to(lm.device)).unsqueeze(0)

    return embed, bounds

"""Continuous batching: requests join and leave the running batch between two steps.

A sequence's state has a constant size, so the batch is a table with one row a sequence: joining copies a row in,
leaving copies the last row over it, and a step runs the first rows, where they are. Nothing is paged or padded.

Letters: S sequences of a pass, D width, V rows of the embedding.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ssm_kernels import states
from ssm_kernels.modules.state import read_ssm, write_ssm

from ..model.feature_cache import FeatureCache
from ..model.generation.config import GenerationConfig
from ..model.generation.cuda_graph import has_graphs
from ..model.generation.decoding import Decoder, narrow_dtype
from ..model.generation.generate import Completion
from ..model.generation.interface import LMState
from ..model.generation.prefill import EmbedFn, PrefillChunk, check_tokens, packed_tokens, run_prefill_chunk
from ..model.generation.sampling import SequenceSampling, choose_tokens
from ..model.lm import MambaLM
from ..model.prompt import IMAGE_MARK, Turn
from ..model.tokenizer import require_tokenizer
from ..model.vlm import VLM
from .config import ServeConfig
from .prompts import Prompt, chat_prompt, text_prompt
from .state_cache import StateCache
from .waiting import WaitingQueue

logger = logging.getLogger(__name__)

QUANTUM = 64
"""Prompt tokens by which requests take turns. Scans split at multiples of 64 steps are equal to the bit."""
MAX_LOGPROBS = 20
"""Most alternatives of a token whose log-probabilities are returned."""

FinishReason = Literal["stop", "length", "error"]


class Busy(Exception):
    """No more requests may wait."""


class Stopping(Exception):
    """The server takes no more requests."""


class TokenLogprob(NamedTuple):
    """A token, and its log-probability under the model, before temperature and filters."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most probable tokens with theirs."""


class Event(NamedTuple):
    """Progress of a request."""

    text: str = ""
    """New text."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Log-probabilities of the new tokens, if they were asked for; the end-of-text token is left out."""
    finish: FinishReason | None = None
    """Reason of the end: end of text or a stop string, the most tokens, or an error."""
    error: str = ""


def join_events(events: Sequence[Event]) -> Event:
    """Join successive events of a request into one."""
    text = "".join([e.text for e in events])
    logprobs = tuple([p for e in events for p in e.logprobs])
    return Event(text, logprobs, events[-1].finish, events[-1].error)


@dataclass(eq=False)
class Request:
    """One answer to generate, and the counts of its tokens so far."""

    prompt: Prompt
    sampling: GenerationConfig
    logprobs: int | None = None
    """Number of alternatives of each token to return log-probabilities of; None returns none at all."""
    ignore_eos: bool = False
    """Go on after the end-of-text token, up to `max_new_tokens`: for load tests."""
    cached_tokens: int = 0
    """Prompt tokens whose state was in the cache."""
    new_tokens: int = 0
    """Generated tokens, the end-of-text token included."""
    cancelled: bool = False


@dataclass
class EngineStats:
    """Counts since the start."""

    prompt_tokens: int = 0
    """Tokens that were run as prompts; those of cached states are not among them."""
    new_tokens: int = 0
    prefill_passes: int = 0
    decode_steps: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0


class _Sequence:
    """A request that has a slot."""

    def __init__(self, request: Request, lm: MambaLM, vocab_size: int):
        self.request, self.ids = request, request.prompt.ids
        self.completion = Completion(require_tokenizer(lm), request.sampling.stop)
        if request.ignore_eos:
            self.completion.eos_id = -1  # equals no token
        self.sampling = SequenceSampling(request.sampling, self.ids, vocab_size, lm.device)
        self.position = 0
        """Number of prompt tokens that were run."""
        self.state: LMState | None = None
        """State after them, until the sequence is in the running batch; None before the first. In the model's own
        format until the prompt is complete, so that it is rounded once, however the prompt was divided."""
        self.embed: EmbedFn | None = None
        self.n_sent = 0
        """Length of the text that was delivered."""

    def next_cut(self, position: int) -> int:
        """End of the quantum that starts at a position: never beyond the end of an image."""
        end = min((position // QUANTUM + 1) * QUANTUM, len(self.ids))
        return min([end, *(s.end for s in self.request.prompt.images if s.end > position)])

    def ends_image(self, position: int) -> bool:
        """Whether an image ends at a position: another question about it may go on from there."""
        return any(span.end == position for span in self.request.prompt.images)


class Engine:
    """Answer requests in one running batch.

    An answer is the one that `generate` gives to its prompt alone, with the same `state_dtype`. Sampling is the same to
    the bit, with a noise of the request's own seed; logits agree up to the rounding of matrix products, which depends
    on the number of rows. A state of the cache that a longer prompt goes on from adds its own rounding.

    Every step runs at most `prefill_tokens` prompt tokens, which requests share in quanta, and then one token of every
    running answer. `start` steps in a thread of its own; tests call `step`.

    Args:
        model: with a tokenizer, in evaluation mode.
        config: sizes and limits.
        deliver: called after each part of a step, in the thread of the engine, with requests and their events.

    Raises:
        ValueError: the model has no tokenizer.
    """

    def __init__(
        self,
        model: VLM | MambaLM,
        config: ServeConfig,
        deliver: Callable[[list[tuple[Request, Event]]], None],
    ):
        self.model, self.config, self.deliver = model, config, deliver
        self.lm = model.language_model if isinstance(model, VLM) else model
        tokenizer = require_tokenizer(model)
        self.lm.tokenizer = tokenizer
        self.vocab_size = min(tokenizer.vocab_size, self.lm.config.vocab_size)
        self.cache = StateCache(int(config.cache_mb * 2**20))
        self.features = FeatureCache(int(config.feature_cache_mb * 2**20))
        self.stats = EngineStats()
        self.decoder = Decoder(self.lm, config.slots, config.state_dtype)
        self.prefilling: list[_Sequence] = []
        self.running: list[_Sequence] = []
        """Sequence i has row i of the decoder."""
        self.waiting: WaitingQueue[Request] = WaitingQueue()
        self._admitted: dict[Request, None] = {}
        """Requests that got a slot and are not finished, wherever a step that fails leaves them."""
        self._stopping = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def n_active(self) -> int:
        """Number of requests that have a slot."""
        return len(self.prefilling) + len(self.running)

    def submit(self, *requests: Request) -> None:
        """Queue requests: all of them or none.

        Raises:
            Busy: so many wait already.
            Stopping: `stop` was called.
            ValueError: a token is outside the vocabulary.
        """
        check_tokens(self.lm, [r.prompt.ids for r in requests])
        with self._changed:
            if self._stopping:
                raise Stopping
            if self.n_active + len(self.waiting) + len(requests) > self.config.slots + self.config.max_waiting:
                raise Busy
            for request in requests:
                self.waiting.push(request.prompt.salt, request)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """End a request without further events. Its slot is free at the next step."""
        with self._changed:
            if not request.cancelled and self.waiting.remove(request.prompt.salt, request):
                self.stats.cancelled += 1
            request.cancelled = True
            self._changed.notify()

    def warm_up(self) -> None:
        """Run a prompt and two steps, so that the first client does not wait for what is compiled at first use."""
        eos, sampling = require_tokenizer(self.lm).eos_id, GenerationConfig(2)
        prompt = text_prompt(self.lm, [eos] * 8)
        if isinstance(self.model, VLM):
            image = Image.new("RGB", (32, 32))
            prompt = chat_prompt(self.model, self.model.template, [Turn("user", IMAGE_MARK)], [image])
        # One sequence alone may run by another kernel than several.
        for n in {1, min(4, self.config.slots)}:
            self.submit(*(Request(prompt, sampling, ignore_eos=True) for _ in range(n)))
            while self.n_active or len(self.waiting):
                self.step()
        self.cache, self.features = StateCache(self.cache.max_bytes), FeatureCache(self.features.max_bytes)
        self.stats = EngineStats()

    def start(self) -> None:
        """Step in a thread for as long as there are requests."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Requests that are not finished get an error."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        with self._changed:
            # Taken under the lock: of two calls at once, one ends a request.
            unfinished = [*self._admitted, *self.waiting.clear()]
            self._admitted.clear()
        self._fail(unfinished, "the server stopped before the answer was complete")

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self.n_active or len(self.waiting))
                if self._stopping:
                    return
            try:
                self.step()
            except Exception:
                # A step that fails leaves states that cannot be trusted: its requests end, the others go on.
                logger.exception("a step failed")
                self._fail([*self._admitted], "the model failed on this request or on another one in its batch")

    def _fail(self, requests: Sequence[Request], message: str) -> None:
        """End requests, among them all that have a slot, with an error."""
        self.prefilling, self.running = [], []
        self.stats.failed += len(requests)
        self._deliver([(r, Event(finish="error", error=message)) for r in requests if not r.cancelled])
        self._admitted.clear()

    def _deliver(self, events: list[tuple[Request, Event]]) -> None:
        for request, event in events:
            if event.finish is not None:
                self._admitted.pop(request, None)
        self.deliver(events)

    @torch.no_grad()
    def step(self) -> None:
        """Admit requests, run a share of their prompts, then one token of each running answer."""
        self._drop_cancelled()
        self._admit()
        if self.prefilling:
            self._prefill()
        if self.running:
            self._decode()

    def _drop_cancelled(self) -> None:
        gone = [s for s in self.prefilling if s.request.cancelled]
        self.prefilling = [s for s in self.prefilling if not s.request.cancelled]
        rows = [i for i, s in enumerate(self.running) if s.request.cancelled]
        gone += [self.running[i] for i in rows]
        self.stats.cancelled += len(gone)
        for sequence in gone:
            del self._admitted[sequence.request]
        self._leave(rows)

    def _admit(self) -> None:
        """Give free slots to waiting requests, each with the longest prefix of its prompt that the cache has."""
        known: list[tuple[_Sequence, Tensor]] = []
        with self._changed:
            n = min(self.config.slots - self.n_active, len(self.waiting))
            requests = [self.waiting.pop() for _ in range(n)]
            self._admitted.update(dict.fromkeys(requests))
        for request in requests:
            sequence = _Sequence(request, self.lm, self.vocab_size)
            prefix = self.cache.find(request.prompt)
            if prefix is not None:
                request.cached_tokens = sequence.position = prefix.length
            if prefix is not None and prefix.length == len(sequence.ids):
                assert prefix.logits is not None  # else it would not have been found
                sequence.state = prefix.state
                known.append((sequence, prefix.logits))
            else:
                sequence.state = None if prefix is None else self._in_own_format(prefix.state)
                self.prefilling.append(sequence)
        if known:
            self._join([s for s, _ in known], torch.stack([logits for _, logits in known]))

    def _prefill(self) -> None:
        """Run the next tokens of prompts, packed; sequences whose prompt is complete join the batch."""
        ends = self._share()
        granted = [s for s in self.prefilling if s in ends]
        self._embed([s for s in granted if s.embed is None])
        lengths = [ends[s] - s.position for s in granted]
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)  # (S + 1,)
        parts = [s.embed(s.position, ends[s]) for s in granted if s.embed is not None]
        vectors = torch.cat(parts, dim=1)  # (1, tokens, D)
        empty = self.lm.new_state(1)
        state = _joined([s.state or empty for s in granted])
        complete = [i for i, s in enumerate(granted) if ends[s] == len(s.ids)]
        positions = [int(bounds[i + 1]) - 1 for i in complete]
        chunk = PrefillChunk(0, sum(lengths), slice(None), bounds, positions)
        logits = run_prefill_chunk(self.lm, vectors, chunk, state, positions)  # (complete, V)
        self.stats.prefill_passes += 1
        self.stats.prompt_tokens += sum(lengths)
        for i, sequence in enumerate(granted):
            sequence.position = ends[sequence]
            sequence.state = states.select(state, slice(i, i + 1))
            if sequence.ends_image(sequence.position):
                seen, image_state = sequence.ids[: sequence.position], self._in_kept_format(sequence.state)
                self.cache.store(sequence.request.prompt, seen, image_state)
        joining = [granted[i] for i in complete]
        for sequence, row in zip(joining, logits, strict=True):
            assert sequence.state is not None
            sequence.state = self._in_kept_format(sequence.state)
            self.cache.store(sequence.request.prompt, sequence.ids, sequence.state, row)
        # Those that had their turn go to the end of the line.
        self.prefilling = [s for s in self.prefilling if s not in ends] + [s for s in granted if s not in joining]
        if joining:
            self._join(joining, logits)

    def _in_kept_format(self, state: LMState) -> LMState:
        """Convert the state of one sequence to that of slots and cache, `config.state_dtype`."""
        dtype = narrow_dtype(self.config.state_dtype)
        if dtype is None:
            return state
        return _convert(state, self.lm.new_state(1, dtype))

    def _in_own_format(self, state: LMState) -> LMState:
        """Convert the state of one sequence from the cache to the format that prompts are run in."""
        if narrow_dtype(self.config.state_dtype) is None:
            return state
        return _convert(state, self.lm.new_state(1))

    def _share(self) -> dict[_Sequence, int]:
        """Share the tokens of a pass: a quantum each in turn, until none are left. Return the new positions."""
        left, ends = self.config.prefill_tokens, {}
        line = deque(self.prefilling)
        while line:
            sequence = line.popleft()
            start = ends.get(sequence, sequence.position)
            end = sequence.next_cut(start)
            if end - start > left:
                break
            ends[sequence], left = end, left - (end - start)
            # The state at the end of an image is kept, and needs the end of a pass.
            if end < len(sequence.ids) and not sequence.ends_image(end):
                line.append(sequence)
        return ends

    def _embed(self, sequences: list[_Sequence]) -> None:
        """Give sequences the embeddings of the rest of their prompts. Images in them are encoded together."""
        if not sequences:
            return
        rests = [s.request.prompt.sample.after(s.position) for s in sequences]
        if isinstance(self.model, VLM):
            embed, bounds = self.model.packed(rests, self.features)
        else:
            embed, bounds = packed_tokens(self.lm, [rest.input_ids for rest in rests])
        # Short prompts are embedded together; of a long one, only what a pass takes is in memory.
        if bounds[-1] <= self.config.prefill_tokens:
            embed = _sliced(embed(0, int(bounds[-1])))
        for sequence, start in zip(sequences, bounds.tolist(), strict=False):
            sequence.embed = _shifted(embed, start - sequence.position)

    def _join(self, sequences: list[_Sequence], logits: Tensor) -> None:
        """Choose first tokens by logits (S, V), and give rows of the batch to sequences that go on."""
        events = [
            (sequence.request, self._push(sequence, token, logprob))
            for sequence, (token, logprob) in zip(sequences, self._choose(sequences, logits), strict=True)
        ]
        if joining := [s for s in sequences if not s.completion.finished]:
            n = len(self.running)
            rows = states.select(self.decoder.buffers, slice(n, n + len(joining)))
            for layer, new in zip(rows, _joined([s.state for s in joining if s.state is not None]), strict=True):
                for t, values in zip(layer, new, strict=True):
                    t.copy_(values)
            self.running += joining
        for sequence in sequences:
            sequence.state = sequence.embed = None
        self._deliver(events)

    def _decode(self) -> None:
        """Run the last token of each sequence of the batch, and choose the next ones."""
        batch = self._batch_rows(len(self.running))
        if self.decoder.batch != batch:
            self.decoder.set_batch(batch)
        tokens = [s.completion.ids[-1] for s in self.running] + [0] * (batch - len(self.running))
        logits = self.decoder(torch.tensor(tokens))[: len(self.running)]  # (S, V)
        self.stats.decode_steps += 1
        events, finished = [], []
        for i, (token, logprob) in enumerate(self._choose(self.running, logits)):
            sequence = self.running[i]
            events.append((sequence.request, self._push(sequence, token, logprob)))
            if sequence.completion.finished:
                finished.append(i)
                # The last token was chosen, but not run. The next turn of a conversation goes on from here.
                seen = sequence.ids + sequence.completion.ids[:-1]
                state = states.select(self.decoder.buffers, slice(i, i + 1))
                self.cache.store(sequence.request.prompt, seen, state)
        self._leave(finished)
        self._deliver(events)

    def _batch_rows(self, n: int) -> int:
        """Number of rows to run for n sequences: with graphs a power of two, so that few are captured."""
        if not has_graphs(self.decoder.device):
            return n
        return min(1 << (n - 1).bit_length(), self.config.slots)

    def _leave(self, rows: list[int]) -> None:
        """Free rows of the batch; the last rows move into the gaps."""
        for row in reversed(rows):
            last = self.running.pop()
            if row < len(self.running):
                _copy_row(self.decoder.buffers, len(self.running), self.decoder.buffers, row)
                self.running[row] = last

    def _choose(self, sequences: list[_Sequence], logits: Tensor) -> list[tuple[int, tuple[TokenLogprob, ...]]]:
        """Choose a token of each sequence by its logits (S, V)."""
        chosen = choose_tokens(logits, [s.sampling for s in sequences], self.vocab_size)  # (S,)
        logprobs: dict[int, TokenLogprob] = {}
        if asked := [i for i, s in enumerate(sequences) if s.request.logprobs is not None]:
            n = [sequences[i].request.logprobs or 0 for i in asked]
            found = _logprobs(logits[asked, : self.vocab_size], chosen[asked], n)
            logprobs = dict(zip(asked, found, strict=True))
        return [(token, (logprobs[i],) if i in logprobs else ()) for i, token in enumerate(chosen.tolist())]

    def _push(self, sequence: _Sequence, token: int, logprobs: tuple[TokenLogprob, ...]) -> Event:
        """Append a token to an answer, and return the event of it."""
        request, completion = sequence.request, sequence.completion
        completion.push(token)
        request.new_tokens += 1
        self.stats.new_tokens += 1
        reason: FinishReason | None = "stop" if completion.finished else None
        if reason is None and request.new_tokens == request.sampling.max_new_tokens:
            completion.finish()
            reason = "length"
        text = completion.text[sequence.n_sent :]
        sequence.n_sent = len(completion.text)
        if reason is not None:
            self.stats.finished += 1
        return Event(text, () if token == completion.eos_id else logprobs, reason)


def _logprobs(logits: Tensor, tokens: Tensor, n: Sequence[int]) -> list[TokenLogprob]:
    """Log-probabilities of tokens (S,), and of the n most probable ones of each row, from logits (S, V)."""
    logprobs = logits.log_softmax(-1)
    of_tokens = logprobs.gather(1, tokens[:, None])[:, 0]  # (S,)
    values, top = logprobs.topk(min(max(n), logprobs.shape[1]))  # (S, most of n)
    rows = zip(tokens.tolist(), of_tokens.tolist(), top.tolist(), values.tolist(), n, strict=True)
    return [
        TokenLogprob(token, logprob, tuple(zip(best[:k], of_best[:k], strict=True)))
        for token, logprob, best, of_best, k in rows
    ]


def _sliced(embeds: Tensor) -> EmbedFn:
    return lambda start, end: embeds[:, start:end]


def _shifted(embed: EmbedFn, offset: int) -> EmbedFn:
    return lambda start, end: embed(start + offset, end + offset)


def _convert(source: LMState, target: LMState) -> LMState:
    """Copy a state into a new one of another format, and return that."""
    for a, b in zip(source, target, strict=True):
        for name, part in a._asdict().items():
            if name not in ("ssm", "ssm_scale", "rand_seed"):
                getattr(b, name).copy_(part)
        write_ssm(b, read_ssm(a))
    return target


def _joined(parts: Sequence[LMState]) -> LMState:
    """Copy the states of sequences into one of all of them."""
    return [type(layers[0])(*map(torch.cat, zip(*layers, strict=True))) for layers in zip(*parts, strict=True)]


def _copy_row(source: LMState, source_row: int, target: LMState, target_row: int) -> None:
    """Copy the state of one sequence."""
    for a, b in zip(source, target, strict=True):
        for s, t in zip(a, b, strict=True):
            t[target_row].copy_(s[source_row])

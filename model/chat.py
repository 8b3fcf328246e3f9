"""Multi-turn conversation whose past is the model's recurrent state, not text to run again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from ssm_kernels import states

from .batch import Sample
from .feature_cache import FeatureCache
from .generation.config import GenerationConfig
from .generation.cuda_graph import graph_key
from .generation.decoding import Decoder, narrow_dtype, state_bytes
from .generation.generate import Completion, generate_packed
from .generation.interface import LMState
from .generation.prefill import EmbedFn, packed_tokens
from .image_tokens import ProcessedImage
from .lm import MambaLM
from .prompt import IGNORE, IMAGE_MARK, PromptTemplate, Turn, count_marks
from .tokenizer import require_tokenizer
from .vlm import VLM, Images, as_list


class TurnStats(NamedTuple):
    """Cost of a turn."""

    prompt_tokens: int
    """Tokens of the prefill: of the new turn, and of the last answer if the state had to be rewound."""
    prompt_seconds: float
    """Time until the first token."""
    tokens: int
    """Tokens of the answer."""
    seconds: float
    """Time for the tokens after the first."""

    @property
    def tokens_per_second(self) -> float:
        """Decoding throughput."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 else 0.0


class _Checkpoint(NamedTuple):
    """Tokens, and the state after them."""

    tokens: list[int]
    state: LMState


class Conversation:
    """Multi-turn conversation with streamed answers.

    Answers are those that the entire conversation would get if it were run from the start, but only new tokens are
    run. If the generated tokens differ from the tokens of the answer's text in a prompt (it was cut short, or a stop
    string was removed), the state is rewound to the end of the question, and that text is run.

    >>> conversation = Conversation(model, "picture.png")                   # doctest: +SKIP
    >>> print(*conversation.ask("What is this?"), sep="")                   # doctest: +SKIP

    Args:
        model: with a tokenizer.
        image: the image that a VLM's conversation is about, or a list of them.
        config: generation settings; greedy by default. `seed` is that of the first answer; each answer takes the
            next one.
        template: the VLM's own by default. A language model without one continues each text by itself.
        history: whether a turn depends on the ones before, where the template has turns.

    Raises:
        ValueError: there is no tokenizer, or an image for a language model.
        ValueError, FileNotFoundError: see `open_image`.
    """

    def __init__(
        self,
        model: VLM | MambaLM,
        image: Images = None,
        config: GenerationConfig | None = None,
        template: PromptTemplate | None = None,
        history: bool = True,
    ):
        self.tokenizer = require_tokenizer(model)
        self.model, self.config = model, config or GenerationConfig()
        self.lm = model.language_model if isinstance(model, VLM) else model
        self.template = template or (model.template if isinstance(model, VLM) else None)
        self.history = history and self.template is not None and self.template.has_turns
        self.turn_stats = TurnStats(0, 0.0, 0, 0.0)
        self.features = FeatureCache()
        """Features of images that were shown, also before a reset."""
        self._decoder: Decoder | None = None
        self._n_asked = 0
        """Number of answers started. Each takes the next seed, so that a repeated question is sampled anew."""
        self.reset(image)

    def reset(self, image: Images = None) -> None:
        """Start a new conversation.

        Args:
            image: the image that it is about, or a list of them.

        Raises:
            ValueError, FileNotFoundError: see the constructor; the conversation is then unchanged.
        """
        self.images: list[ProcessedImage] = self._process(image)
        """Images of the turns so far and of the next one, in the order of their marks."""
        self.turns: list[Turn] = []
        """Turns so far. A user's turn has a mark `<image>` for each image that came with it."""
        self._state_tokens: list[int] | None = None
        """Tokens that the decoder's state has seen; None if unknown."""
        self._checkpoint: _Checkpoint | None = None
        """Tokens up to the last answer, and the state after them."""

    def add(self, image: Images) -> None:
        """Show an image, or a list of them, with the next question; the conversation continues.

        Args:
            image: what to show.

        Raises:
            ValueError, FileNotFoundError: see the constructor; the conversation is then unchanged.
        """
        self.images += self._process(image)

    @property
    def state_bytes(self) -> int:
        """Size of the state in bytes. However long the conversation, nothing else but its text is stored."""
        return state_bytes(
            self.lm.new_state(1, narrow_dtype(self.config.state_dtype))
            if self._decoder is None
            else self._decoder.state
        )

    def ask(self, text: str) -> Generator[str, None, None]:
        """Add a user turn, yielding the answer as it is generated.

        If the generator is closed early, the answer in the history is the text so far.

        Args:
            text: the user's turn. Images that it is the first to see come before it, or at its marks `<image>`.

        Yields:
            Parts of the answer.

        Raises:
            ValueError: the text has marks, but not as many as there are new images.
        """
        # Marks are written into the turns, so that the whole conversation has the same layout if it is run again.
        if not count_marks([question := Turn("user", text)]):
            n_new = len(self.images) - count_marks(self.turns)
            question = Turn("user", f"{IMAGE_MARK}\n" * n_new + text)
        turns = [*self.turns, question]
        ids = self._tokens(turns)
        started = time.perf_counter()
        decoder, n_seen = self._rewind(ids)
        embeds, bounds = self._embed(ids, n_seen)
        # Seeds wrap around at the end of their range.
        config = replace(self.config, seed=(self.config.seed + self._n_asked) % 2**63)
        self._n_asked += 1
        steps = generate_packed(self.lm, embeds, bounds, [ids], self.tokenizer, config, decoder)
        answer: Completion | None = None
        emitted, first_token = "", started
        try:
            # Generation ends even if the caller stops early.
            with contextlib.closing(steps):
                for (answer,) in steps:
                    now = time.perf_counter()
                    if len(answer.ids) == 1:
                        # The state is that after the prompt: the first token is chosen but not yet run.
                        self._checkpoint = _Checkpoint(ids, states.clone(decoder.state))
                        first_token = now
                    self.turn_stats = TurnStats(
                        len(ids) - n_seen, first_token - started, len(answer.ids), now - first_token
                    )
                    new, emitted = answer.text[len(emitted) :], answer.text
                    if new:
                        yield new
            assert answer is not None  # the last step yields even where max_new_tokens is 0
            # Not reached when the caller stops early: the state is then unknown until the next rewind.
            self._state_tokens = ids + answer.ids[:-1]  # the last token was chosen, but not run
        finally:
            # An interrupted answer counts with the text so far.
            if self.history and answer is not None:
                self.turns = [*turns, Turn("assistant", answer.text)]

    def _tokens(self, turns: list[Turn]) -> list[int]:
        if self.template is None:
            # Without a template, the text itself is continued.
            return self.tokenizer.encode(turns[-1].text) or [self.tokenizer.eos_id]
        return self.template.encode(self.tokenizer, turns, [i.n_tokens for i in self.images])[0]

    def _process(self, image: Images) -> list[ProcessedImage]:
        images = as_list(image)
        if not isinstance(self.model, VLM):
            if images:
                raise ValueError("the model is a language model, which sees no image")
            return []
        return [i if isinstance(i, ProcessedImage) else self.model.preprocess(i) for i in images]

    def _rewind(self, ids: list[int]) -> tuple[Decoder, int]:
        """Bring the state to the longest known prefix of a prompt. Return the decoder and the prefix's length."""
        decoder = self._decoder
        key = (graph_key(self.lm, self.lm.device), self.config.state_dtype)
        if decoder is None or (decoder.graph_key, decoder.state_dtype) != key:
            self._decoder = decoder = Decoder(self.lm, 1, self.config.state_dtype)
            self._state_tokens = self._checkpoint = None

        def is_prefix(tokens: list[int]) -> bool:
            return len(tokens) < len(ids) and ids[: len(tokens)] == tokens

        current, self._state_tokens = self._state_tokens, None  # unknown until this turn has ended well
        if current is not None and is_prefix(current):
            return decoder, len(current)
        if self._checkpoint is not None and is_prefix(self._checkpoint.tokens):
            # In place: captured graphs read the state at these addresses.
            for layer, saved in zip(decoder.state, self._checkpoint.state, strict=True):
                for t, s in zip(layer, saved, strict=True):
                    t.copy_(s)
            return decoder, len(self._checkpoint.tokens)
        decoder.reset()
        return decoder, 0

    def _embed(self, ids: list[int], n_seen: int) -> tuple[EmbedFn, Tensor]:
        """Return a function that embeds the tokens after the first `n_seen`, and their bounds."""
        # Earlier images are in the state: a known prefix ends with a turn, and never within an image.
        new = Sample(ids, [IGNORE] * len(ids), tuple(self.images)).after(n_seen)
        if isinstance(self.model, VLM) and new.images:
            return self.model.packed([new], self.features)
        return packed_tokens(self.lm, [new.input_ids])

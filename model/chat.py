"""A conversation whose past is kept as the model's state, not as text to be run again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ssm_kernels.modules import MixerState

from .generation.config import GenerationConfig
from .generation.decoding import Decoder, graph_key, state_bytes
from .generation.generate import generate_packed
from .generation.interface import LMState
from .generation.prefill import EmbedFn, packed_tokens
from .image import ImageLike, open_image
from .lm import MambaLM
from .prompt import PromptTemplate, Turn
from .vlm import VLM


class TurnStats(NamedTuple):
    """What an answer took."""

    prompt_tokens: int
    """Tokens that were run before it: of the new turn, and of the last answer if the state had to go back."""
    prompt_seconds: float
    tokens: int
    """Tokens of the answer."""
    seconds: float
    """For the tokens after the first."""

    @property
    def tokens_per_second(self) -> float:
        return (self.tokens - 1) / self.seconds if self.tokens > 1 else 0.0


class Conversation:
    """Turn after turn with a model, an answer piece by piece.

    The answers are those that the whole conversation would get if it were run from the beginning, but only what is new
    is run. Where the tokens that the model wrote are not those that the text of its answer has in a prompt (it was cut
    short, or a stop text was left out), the state goes back to the end of the question, and that text is run.

    >>> conversation = Conversation(model, "picture.png")                   # doctest: +SKIP
    >>> print(*conversation.ask("What is this?"), sep="")                   # doctest: +SKIP
    """

    def __init__(
        self,
        model: VLM | MambaLM,
        image: ImageLike | None = None,
        config: GenerationConfig | None = None,
        template: PromptTemplate | None = None,
        history: bool = True,
    ):
        """
        Args:
            model: with a tokenizer.
            image: what a VLM's conversation is about.
            config: how answers are chosen; the greedy one by default. `seed` is that of the first answer, and each
                answer takes the next one.
            template: the VLM's own by default. A language model without one goes on from each text by itself.
            history: whether a turn is about the ones before, where the template has turns.

        Raises:
            ValueError: there is no tokenizer, or an image for a model that sees none.
            ValueError, FileNotFoundError: as `open_image`.
        """
        if model.tokenizer is None:
            raise ValueError("the model has no tokenizer: set model.tokenizer")
        self.model, self.config = model, config or GenerationConfig()
        self.lm = model.language_model if isinstance(model, VLM) else model
        self.template = template or (model.template if isinstance(model, VLM) else None)
        self.history = history and self.template is not None and self.template.has_turns
        self.turn_stats = TurnStats(0, 0.0, 0, 0.0)
        self._decoder: Decoder | None = None
        self._asked = 0
        """Answers that were begun: each is drawn with the next seed, so that a question asked again is drawn anew."""
        self.reset(image)

    def reset(self, image: ImageLike | None = None) -> None:
        """Begin anew, about another image or none.

        Raises:
            ValueError, FileNotFoundError: as at the beginning; the conversation is then as it was.
        """
        if image is not None and not isinstance(self.model, VLM):
            raise ValueError("the model is a language model, which sees no image")
        self.image = open_image(image) if isinstance(image, str | Path) else image
        self.turns: list[Turn] = []
        self._here: list[int] | None = None
        """The tokens that the decoder's state has seen; None where that is not known."""
        self._mark: tuple[list[int], LMState] | None = None
        """The tokens up to the last answer, and the state after them."""

    @property
    def state_bytes(self) -> int:
        """Memory of the state: all that is kept of the conversation but its text, however long it is."""
        return state_bytes(self.lm.new_state(1) if self._decoder is None else self._decoder.state)

    def ask(self, text: str) -> Generator[str, None, None]:
        """Say something, and give the answer piece by piece. Closed early, the answer is what was given so far."""
        turns = [*self.turns, Turn("user", text)]
        ids = self._tokens(turns)
        begin = time.perf_counter()
        start = self._go_back(ids)
        embeds, bounds = self._embed(turns, ids, start)
        config = replace(self.config, seed=(self.config.seed + self._asked) % 2**63)
        self._asked += 1
        steps = generate_packed(self.lm, embeds, bounds, [ids], self.model.tokenizer, config, self._decoder)
        answer, given, written = None, "", begin
        try:
            with contextlib.closing(steps):
                for (answer,) in steps:
                    now = time.perf_counter()
                    if len(answer.ids) == 1:
                        # The prompt is run, and the answer is not.
                        self._mark = ids, [MixerState(*(t.clone() for t in layer)) for layer in self._decoder.state]
                        written = now
                    self.turn_stats = TurnStats(len(ids) - start, written - begin, len(answer.ids), now - written)
                    piece, given = answer.text[len(given) :], answer.text
                    if piece:
                        yield piece
            self._here = ids + answer.ids[:-1]  # the last token was chosen, but not run
        finally:
            if self.history and answer is not None:
                self.turns = [*turns, Turn("assistant", answer.text)]

    def _tokens(self, turns: list[Turn]) -> list[int]:
        tokenizer = self.model.tokenizer
        if self.template is None:
            return tokenizer.encode(turns[-1].text) or [tokenizer.eos_id]
        n_image_tokens = 0 if self.image is None else self.model.image_tokens
        return self.template.encode(tokenizer, turns, n_image_tokens)[0]

    def _go_back(self, ids: list[int]) -> int:
        """Bring the state to the latest known place of this prompt; give how many of its tokens are behind."""
        if self._decoder is None or self._decoder.graph_key != graph_key(self.lm):
            self._decoder, self._here, self._mark = Decoder(self.lm, 1), None, None

        def behind(tokens: list[int]) -> bool:
            return len(tokens) < len(ids) and ids[: len(tokens)] == tokens

        here, self._here = self._here, None  # until this turn has gone well
        if here is not None and behind(here):
            return len(here)
        if self._mark is not None and behind(self._mark[0]):
            for layer, saved in zip(self._decoder.state, self._mark[1], strict=True):
                for t, s in zip(layer, saved, strict=True):
                    t.copy_(s)
            return len(self._mark[0])
        self._decoder.reset()
        return 0

    def _embed(self, turns: list[Turn], ids: list[int], start: int) -> tuple[EmbedFn, Tensor]:
        if self.image is not None and start == 0:
            return self.model.packed([self.model.prepare(turns, self.image)])
        return packed_tokens(self.lm, [ids[start:]])

"""Prompt templates: conversations about an image to tokens, for training, inference and evaluation.

The tokens of the image come first, without a token before them. Each turn is tokenized by itself, so that a prompt has
the same tokens whether or not the answer follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from .tokenizer import END_OF_TEXT, Tokenizer

IMAGE_TOKEN = -200
"""Value in `input_ids` at the positions of image features."""
IGNORE = -100
"""Value in `labels` at positions that are not targets."""


@dataclass(frozen=True)
class Turn:
    """Message of one side."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True)
class PromptTemplate:
    """Text of the turns of a conversation.

    Args:
        user: (message, whether it is the first turn) -> text of a user turn.
        answer: message -> text of an assistant turn.
        has_turns: whether a conversation may go on after the first answer.
    """

    user: Callable[[str, bool], str]
    answer: Callable[[str], str]
    has_turns: bool = True

    def encode(
        self, tokenizer: Tokenizer, turns: Sequence[Turn], n_image_tokens: int = 0
    ) -> tuple[list[int], list[int]]:
        """Encode a conversation. Only answers are targets.

        Args:
            tokenizer: encodes each turn by itself.
            turns: user and assistant alternating, the user first. Without the last answer, the result is its prompt.
            n_image_tokens: number of tokens of the image, 0 without one.

        Returns:
            `input_ids` and `labels`, of equal length.

        Raises:
            ValueError: no turns, or turns that do not alternate starting with the user.
        """
        check_turns(turns)
        # The image comes first and is never a target.
        ids, labels = [IMAGE_TOKEN] * n_image_tokens, [IGNORE] * n_image_tokens
        for i, turn in enumerate(turns):
            is_answer = turn.role == "assistant"
            if is_answer:
                tokens = self.encode_answer(tokenizer, turn.text)
            else:
                tokens = tokenizer.encode(self.user(strip_image_tag(turn.text), i == 0))
            ids += tokens
            labels += tokens if is_answer else [IGNORE] * len(tokens)
        return ids, labels

    def encode_answer(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Encode an answer as it follows its prompt, its end-of-text token included."""
        return tokenizer.encode(self.answer(strip_image_tag(text)))


def strip_image_tag(text: str) -> str:
    """Remove `<image>`, since the image always comes first, and surrounding space."""
    return text.replace("<image>", "").strip()


def check_turns(turns: Sequence[Turn]) -> None:
    """Raise a ValueError unless user and assistant alternate, the user first."""
    if not turns:
        raise ValueError("a conversation needs at least one turn, got none")
    for i, turn in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if turn.role != expected:
            raise ValueError(f"turn {i} of a conversation must be by the {expected}, got {turn.role!r}")


def _zephyr_user(message: str, first: bool) -> str:
    return f"{'' if first else chr(10)}<|user|>\n{message}{END_OF_TEXT}\n<|assistant|>\n"


def _in_out_user(message: str, first: bool) -> str:
    return f"{'' if first else chr(10)}In: {message}\nOut: "


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def _vicuna_user(message: str, first: bool) -> str:
    return f"{_VICUNA_SYSTEM if first else ''} USER: {message} ASSISTANT:"


def _no_user(message: str, first: bool) -> str:
    return ""


def _qa_user(message: str, first: bool) -> str:
    return f"{message}\n"


def _answer(answer: str) -> str:
    return f"{answer}{END_OF_TEXT}"


def _answer_or_space(answer: str) -> str:
    return f"{answer or ' '}{END_OF_TEXT}"


def _vicuna_answer(answer: str) -> str:
    return f" {answer}{END_OF_TEXT}"


# Functions by name, so that templates can be pickled for processes that do not fork.
TEMPLATES: dict[str, PromptTemplate] = {
    # ML-Mamba and Cobra.
    "zephyr": PromptTemplate(_zephyr_user, _answer_or_space),
    # Cobra with language models that were not tuned for chat.
    "in-out": PromptTemplate(_in_out_user, _answer_or_space),
    # LLaVA-1.5, whose recipe VL-Mamba follows.
    "vicuna": PromptTemplate(_vicuna_user, _vicuna_answer),
    # Align stage: a caption only, without the request for it.
    "caption": PromptTemplate(_no_user, _answer, has_turns=False),
    # Demo.
    "qa": PromptTemplate(_qa_user, _answer),
}


def get_template(name: str) -> PromptTemplate:
    """Return the template of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in TEMPLATES:
        raise ValueError(f"template must be one of {', '.join(TEMPLATES)}; got {name!r}")
    return TEMPLATES[name]

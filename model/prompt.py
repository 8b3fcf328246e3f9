"""How a conversation about an image becomes tokens: one place for training, inference and evaluation.

The tokens of the image stand first, without a token before them. Each turn is tokenised by itself, so that a prompt
has the same tokens whether or not the answer follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from .tokenizer import END_OF_TEXT, Tokenizer

IMAGE_TOKEN = -200
"""In `input_ids`: a place that a feature of the image takes."""
IGNORE = -100
"""In `labels`: a place that is not learned."""


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True)
class PromptTemplate:
    """Text of the turns.

    Args:
        user: text of a user turn, given the message and whether it is the first one.
        answer: text of an assistant turn.
        has_turns: whether a conversation may go on after the first answer.
    """

    user: Callable[[str, bool], str]
    answer: Callable[[str], str]
    has_turns: bool = True

    def encode(
        self, tokenizer: Tokenizer, turns: Sequence[Turn], n_image_tokens: int = 0
    ) -> tuple[list[int], list[int]]:
        """Turns -> input_ids and labels, equally long; only answers are learned.

        The last answer may be absent: the tokens are then a prompt for it.

        Raises:
            ValueError: no turns, or turns that do not alternate beginning with the user.
        """
        check_turns(turns)
        ids, labels = [IMAGE_TOKEN] * n_image_tokens, [IGNORE] * n_image_tokens
        for i, turn in enumerate(turns):
            is_answer = turn.role == "assistant"
            if is_answer:
                tokens = self.encode_answer(tokenizer, turn.text)
            else:
                tokens = tokenizer.encode(self.user(cleaned(turn.text), i == 0))
            ids += tokens
            labels += tokens if is_answer else [IGNORE] * len(tokens)
        return ids, labels

    def encode_answer(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """An answer as it follows its prompt, its end included."""
        return tokenizer.encode(self.answer(cleaned(text)))


def cleaned(text: str) -> str:
    """A turn's text without `<image>`, whose place is always the beginning, and without space around it."""
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
    # Of ML-Mamba and Cobra.
    "zephyr": PromptTemplate(_zephyr_user, _answer_or_space),
    # Of Cobra's models whose language model was not tuned to chat.
    "in-out": PromptTemplate(_in_out_user, _answer_or_space),
    # Of LLaVA-1.5, whose recipe VL-Mamba follows.
    "vicuna": PromptTemplate(_vicuna_user, _vicuna_answer),
    # Of the align stage: a caption and nothing else, the request for it left out.
    "caption": PromptTemplate(_no_user, _answer, has_turns=False),
    # Of the demo.
    "qa": PromptTemplate(_qa_user, _answer),
}


def get_template(name: str) -> PromptTemplate:
    """The template of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in TEMPLATES:
        raise ValueError(f"template must be one of {', '.join(TEMPLATES)}; got {name!r}")
    return TEMPLATES[name]

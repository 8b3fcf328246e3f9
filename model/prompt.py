"""Prompt templates: conversations about images to tokens, for training, inference and evaluation.

An image's tokens are at its mark `<image>` in a user's turn. In the first turn, images before all text precede the
template's text too, and so does an only image wherever its mark is: the layout that the released models were trained
on. Each turn is tokenized by itself, so that a prompt has the same tokens whether or not the answer follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .tokenizer import END_OF_TEXT, Tokenizer

IMAGE_TOKEN = -200
"""Value in `input_ids` at the positions of image features."""
IGNORE = -100
"""Value in `labels` at positions that are not targets."""
IMAGE_MARK = "<image>"
"""Place of an image in the text of a user's turn."""


@dataclass(frozen=True)
class Turn:
    """Message of one side."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True)
class PromptTemplate:
    """Text of the turns of a conversation.

    Args:
        user: (message, whether it is the first turn) -> text of a user turn, which has the marks of the message.
        answer: message -> text of an assistant turn.
        has_turns: whether a conversation may go on after the first answer.
    """

    user: Callable[[str, bool], str]
    answer: Callable[[str], str]
    has_turns: bool = True

    def encode(
        self, tokenizer: Tokenizer, turns: Sequence[Turn], image_tokens: Sequence[int] = ()
    ) -> tuple[list[int], list[int]]:
        """Encode a conversation. Only answers are targets.

        Args:
            tokenizer: encodes each turn by itself.
            turns: user and assistant alternating, the user first. Without the last answer, the result is its prompt.
            image_tokens: number of tokens of each image, in the order of their marks. An only image needs no mark.

        Returns:
            `input_ids` and `labels`, of equal length.

        Raises:
            ValueError: no turns, turns that do not alternate starting with the user, or as many marks as there are
                not images.
        """
        check_turns(turns)
        sizes = iter(image_tokens)
        ids: list[int] = []
        labels: list[int] = []
        for i, turn in enumerate(mark_images(turns, len(image_tokens))):
            is_answer = turn.role == "assistant"
            if is_answer:
                tokens = self.encode_answer(tokenizer, turn.text)
            else:
                tokens = self._encode_user(tokenizer, turn.text, i == 0, sizes)
            ids += tokens
            # Images are never targets.
            labels += tokens if is_answer else [IGNORE] * len(tokens)
        return ids, labels

    def text(self, turns: Sequence[Turn], n_images: int = 0) -> str:
        """Return a conversation as text, with a mark at the place of each image.

        Args:
            turns: as of `encode`.
            n_images: number of images.

        Returns:
            The text. `encode` may have other tokens at its seams, since it encodes each turn by itself.

        Raises:
            ValueError: see `encode`.
        """
        check_turns(turns)
        text = ""
        for i, turn in enumerate(mark_images(turns, n_images)):
            if turn.role == "assistant":
                text += self.answer(_plain(turn.text))
                continue
            n_before, message = split_first_images(turn.text.strip()) if i == 0 else (0, turn.text.strip())
            text += IMAGE_MARK * n_before + self.user(message, i == 0)
        return text

    def encode_answer(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Encode an answer as it follows its prompt, its end-of-text token included. Marks of images are removed."""
        return tokenizer.encode(self.answer(_plain(text)))

    def _encode_user(self, tokenizer: Tokenizer, text: str, is_first: bool, sizes: Iterator[int]) -> list[int]:
        """Encode a user's turn; `sizes` has the number of tokens of the next images."""
        message, tokens = text.strip(), []
        # Released models have the image before their template's first words.
        if is_first:
            n_before, message = split_first_images(message)
            for _ in range(n_before):
                tokens += [IMAGE_TOKEN] * next(sizes)
        # The text between two images is tokenized by itself.
        start, *others = self.user(message, is_first).split(IMAGE_MARK)
        tokens += tokenizer.encode(start)
        for part in others:
            tokens += [IMAGE_TOKEN] * next(sizes) + tokenizer.encode(part)
        return tokens


def _plain(answer: str) -> str:
    return answer.replace(IMAGE_MARK, "").strip()


def split_first_images(message: str) -> tuple[int, str]:
    """Split the first message into the number of images that precede the template's text, and the rest."""
    # LLaVA's recipe, too, moves an only image to the front.
    if message.count(IMAGE_MARK) == 1:
        return 1, message.replace(IMAGE_MARK, "").strip()
    n_before = 0
    while message.startswith(IMAGE_MARK):
        n_before, message = n_before + 1, message.removeprefix(IMAGE_MARK).lstrip()
    return n_before, message


def mark_images(turns: Sequence[Turn], n_images: int) -> list[Turn]:
    """Return turns that have a mark for each image: an only image without a mark gets one, at the start.

    Args:
        turns: user and assistant alternating, the user first.
        n_images: number of images of the conversation.

    Returns:
        The turns.

    Raises:
        ValueError: marks and images are not equally many.
    """
    counts = {i: n for i, turn in enumerate(turns) if (n := count_marks([turn]))}
    # Data with one image often leave its mark out.
    if not counts and n_images == 1:
        return [replace(turns[0], text=IMAGE_MARK + turns[0].text), *turns[1:]]
    if sum(counts.values()) != n_images:
        places = ", ".join(f"{n} in turn {i}" for i, n in counts.items())
        raise ValueError(
            f"there must be a mark {IMAGE_MARK} for each image, got {sum(counts.values())} marks"
            f"{f' ({places})' if places else ''} for {n_images} images"
        )
    return list(turns)


def count_marks(turns: Sequence[Turn]) -> int:
    """Count the marks of images in the user's turns."""
    return sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user")


def cut_text(text: str, length: int) -> str:
    """Cut a text after `length` characters. Marks of images are not counted, and all of them are kept."""
    kept: list[str] = []
    for part in text.split(IMAGE_MARK):
        kept.append(part[: max(length, 0)])
        length -= len(part)
    return IMAGE_MARK.join(kept)


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
    return IMAGE_MARK * message.count(IMAGE_MARK)


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

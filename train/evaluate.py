"""Evaluation: the answers of a model to the questions of a dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tqdm import tqdm

from ..model.generation.config import GenerationConfig
from ..model.image_tokens import ProcessedImage
from ..model.prompt import IMAGE_MARK, Turn
from ..model.score import pick
from ..model.vlm import VLM
from .records import Record
from .sources import read_visual


class _Asked(NamedTuple):
    """Questions of a batch."""

    indices: list[int]
    """Their records."""
    questions: list[list[Turn]]
    images: list[list[ProcessedImage]]


def answer_all(
    model: VLM, records: Sequence[Record], *, batch_size: int = 256, max_new_tokens: int = 8, with_images: bool = True
) -> list[str]:
    """Answer the first question of each record, with the images of its first turn.

    Args:
        model: a model in any mode; it is in eval mode afterwards.
        records: conversations; their first turns are the questions.
        batch_size: questions in a batch.
        max_new_tokens: longest answer, in tokens.
        with_images: False asks without the images.

    Returns:
        The answers, in the order of the records.
    """
    config = GenerationConfig(max_new_tokens)
    answers = [""] * len(records)
    for asked in _batches(model, records, batch_size, with_images):
        for i, answer in zip(asked.indices, model.generate(asked.questions, asked.images, config), strict=True):
            answers[i] = answer
    return answers


def choose_all(model: VLM, records: Sequence[Record], choices: Sequence[str], *, batch_size: int = 256) -> list[str]:
    """Choose the likeliest of several beginnings of an answer to the first question of each record.

    Args:
        model: a model in any mode; it is in eval mode afterwards.
        records: conversations; their first turns are the questions.
        choices: texts that an answer may begin with.
        batch_size: questions in a batch.

    Returns:
        The choices, in the order of the records.
    """
    chosen = [""] * len(records)
    for asked in _batches(model, records, batch_size):
        # A prompt is run once for all choices.
        texts = [choices] * len(asked.indices)
        scores = model.score(asked.questions, asked.images, texts, batch_size=batch_size * len(choices), with_end=False)
        for i, of_choices in zip(asked.indices, scores, strict=True):
            chosen[i] = choices[pick(of_choices)]
    return chosen


def _batches(model: VLM, records: Sequence[Record], batch_size: int, with_images: bool = True) -> Iterator[_Asked]:
    """Yield the first questions of the records in batches, while a progress bar counts them."""
    model.eval()
    # Questions about the same image are adjacent, so that it is read once.
    order = sorted(range(len(records)), key=lambda i: ([str(image) for image in records[i].images], i))
    with tqdm(total=len(records), desc="evaluate", unit="question", dynamic_ncols=True) as bar:
        for start in range(0, len(records), batch_size):
            indices = order[start : start + batch_size]
            # The first turn alone: later questions would need the answers before them.
            asked = [records[i].first_question() for i in indices]
            # An image that several questions are about is processed once.
            if with_images:
                processed = {s: model.preprocess(read_visual(s)) for s in {s: None for _, seen in asked for s in seen}}
                questions, images = [[turn] for turn, _ in asked], [[processed[s] for s in seen] for _, seen in asked]
            else:
                questions = [[Turn("user", turn.text.replace(IMAGE_MARK, ""))] for turn, _ in asked]
                images = [[] for _ in asked]
            yield _Asked(indices, questions, images)
            bar.update(len(indices))

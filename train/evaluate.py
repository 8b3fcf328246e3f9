"""Evaluation by free generation: the answers of a model to the questions of a dataset."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from ..model.generation.config import GenerationConfig
from ..model.image import ImageLike
from ..model.vlm import VLM
from .records import Record
from .sources import Member, read_image


def answer_all(
    model: VLM, records: Sequence[Record], *, batch_size: int = 256, max_new_tokens: int = 8, with_images: bool = True
) -> list[str]:
    """Answer the first question of each record.

    Args:
        model: a model in any mode; it is in eval mode afterwards.
        records: conversations; their first turns are the questions.
        batch_size: questions in a batch.
        max_new_tokens: longest answer, in tokens.
        with_images: False asks without the images.

    Returns:
        The answers, in the order of the records.
    """
    model.eval()
    config = GenerationConfig(max_new_tokens)
    # Questions about the same image are adjacent, so that it is read and encoded once.
    order = sorted(range(len(records)), key=lambda i: (str(records[i].image), i))
    answers = [""] * len(records)
    with tqdm(total=len(records), desc="evaluate", unit="question", dynamic_ncols=True) as bar:
        for start in range(0, len(records), batch_size):
            chosen = order[start : start + batch_size]
            # The first turn alone: later questions would need the answers before them.
            questions = [records[i].turns[:1] for i in chosen]
            images = [_image(records[i]) if with_images else None for i in chosen]
            for i, answer in zip(chosen, model.generate(questions, images, config), strict=True):
                answers[i] = answer
            bar.update(len(chosen))
    return answers


def _image(record: Record) -> ImageLike | None:
    return read_image(record.image) if isinstance(record.image, Member) else record.image

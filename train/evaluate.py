"""Answering every question of a set by free generation."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from ..model.generation.config import GenerationConfig
from ..model.image import ImageLike
from ..model.vlm import VLM
from .data import Record
from .sources import Member, open_picture


def answer_all(
    model: VLM, records: Sequence[Record], *, batch_size: int = 256, max_new_tokens: int = 8, with_images: bool = True
) -> list[str]:
    """The model's answer to the first question of each record, in their order.

    Args:
        with_images: False asks without showing the images.
    """
    model.eval()
    config = GenerationConfig(max_new_tokens)
    # Questions about one image together, so that it is read and encoded once.
    order = sorted(range(len(records)), key=lambda i: (str(records[i].image), i))
    answers = [""] * len(records)
    with tqdm(total=len(records), desc="evaluate", unit="question", dynamic_ncols=True) as bar:
        for begin in range(0, len(records), batch_size):
            chosen = order[begin : begin + batch_size]
            questions = [records[i].turns[:1] for i in chosen]
            images = [_picture(records[i]) if with_images else None for i in chosen]
            for i, answer in zip(chosen, model.generate(questions, images, config), strict=True):
                answers[i] = answer
            bar.update(len(chosen))
    return answers


def _picture(record: Record) -> ImageLike | None:
    return open_picture(record.image) if isinstance(record.image, Member) else record.image

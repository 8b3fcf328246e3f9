"""Evaluation by free generation: the answers of a model to the questions of a dataset."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from ..model.generation.config import GenerationConfig
from ..model.prompt import IMAGE_MARK
from ..model.vlm import VLM
from .records import Record
from .sources import read_visual


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
    model.eval()
    config = GenerationConfig(max_new_tokens)
    # Questions about the same image are adjacent, so that it is read once.
    order = sorted(range(len(records)), key=lambda i: ([str(image) for image in records[i].images], i))
    answers = [""] * len(records)
    with tqdm(total=len(records), desc="evaluate", unit="question", dynamic_ncols=True) as bar:
        for start in range(0, len(records), batch_size):
            chosen = order[start : start + batch_size]
            # The first turn alone: later questions would need the answers before them.
            asked = [records[i].first_question() for i in chosen]
            if with_images:
                processed = {s: model.preprocess(read_visual(s)) for s in {s: None for _, seen in asked for s in seen}}
                questions, images = [[turn] for turn, _ in asked], [[processed[s] for s in seen] for _, seen in asked]
            else:
                questions = [turn.text.replace(IMAGE_MARK, "") for turn, _ in asked]
                images = [None] * len(asked)
            for i, answer in zip(chosen, model.generate(questions, images, config), strict=True):
                answers[i] = answer
            bar.update(len(chosen))
    return answers

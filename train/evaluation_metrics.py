"""Metrics of answers to questions about images: agreement with several people, and boxes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle by its left, upper, right and lower edge, as shares of the image's width and height."""

    x1: float
    y1: float
    x2: float
    y2: float


def vqa_accuracy(answer: str, truths: Sequence[str]) -> float:
    """Compute the accuracy of an answer by those of several people (arXiv 1505.00468, section 4.3).

    It is min(1, n / 3) for n of the others who say the same, the mean over leaving each person out: of ten, none to
    four or more who agree make 0, 0.3, 0.6, 0.9 and 1. Answers are compared by `normalized_answer`.

    Args:
        answer: the model's.
        truths: the people's.
    """
    answer = normalized_answer(answer)
    # Of the others, for each person left out, as many say the same as of all, less that person.
    same = [normalized_answer(t) == answer for t in truths]
    return sum(min(1.0, (sum(same) - s) / 3) for s in same) / len(same)


def normalized_answer(text: str) -> str:
    """Bring an answer to the form in which VQA's evaluation compares them.

    Lower case without punctuation, except periods before digits; numbers up to ten as digits; no articles; contractions
    with their apostrophes.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    # Beside a space, or in numbers such as 1,000, marks are dropped; elsewhere they part words.
    in_number = re.search(r"\d,\d", text)
    cleaned = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space or in_number else " ")
    # A period stays where it is that of a decimal.
    words = re.sub(r"\.(?!\d)", "", cleaned).lower().split()
    digits = (_DIGITS.get(word, word) for word in words)
    return " ".join(_CONTRACTIONS.get(word.replace("'", ""), word) for word in digits if word not in _ARTICLES)


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = ("a", "an", "the")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(i) for i, word in enumerate(_NUMBERS)}}
# Without those that are other words when they lose the apostrophe, such as "we're" and "it's".
_WITH_APOSTROPHE = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _WITH_APOSTROPHE.split()}


def parse_box(answer: str) -> Box | None:
    """Parse an answer that is one list of four numbers, `[x1, y1, x2, y2]`, and nothing else.

    Args:
        answer: the model's.

    Returns:
        The box; None for any other text, for numbers outside of [0, 1], and unless x1 < x2 and y1 < y2.
    """
    # Strict, as the papers' harness: the training data have boxes and nothing around them.
    match = _BOX.fullmatch(answer.strip())
    if match is None:
        return None
    box = Box(*map(float, match.groups()))
    return box if 0 <= box.x1 < box.x2 <= 1 and 0 <= box.y1 < box.y2 <= 1 else None


_NUMBER = r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]", re.ASCII)


def intersection_over_union(a: Box, b: Box) -> float:
    """Divide the area that two boxes share by the area that they cover."""
    # Negative where the boxes are apart.
    width = min(a.x2, b.x2) - max(a.x1, b.x1)
    height = min(a.y2, b.y2) - max(a.y1, b.y1)
    shared = max(0.0, width) * max(0.0, height)
    areas = ((box.x2 - box.x1) * (box.y2 - box.y1) for box in (a, b))
    return shared / (sum(areas) - shared)

"""The easy-VQA dataset, from the package `easy-vqa`: 5,000 images of one shape, 48,248 questions, 13 answers."""

from __future__ import annotations

import importlib.util
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ..model.prompt import Turn
from ..model.text_files import read_json
from .records import Record, write_llava

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
ATTRIBUTES = {"color": COLORS, "shape": SHAPES}
"""Attributes of an image, and their values."""


def load(split: Literal["train", "test"]) -> list[Record]:
    """Load the questions, answers and images of a split.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    questions = read_json(questions_file(split))
    images = _folder() / split / "images"
    return [Record((Turn("user", q), Turn("assistant", a)), (images / f"{i}.png",)) for q, a, i in questions]


def questions_file(split: Literal["train", "test"]) -> Path:
    """Path of the questions and answers of a split, as the package has them.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    return _folder() / split / "questions.json"


def export(folder: str | Path, n_turns: int = 6) -> list[Path]:
    """Write the dataset in LLaVA's format, which `read_llava` and `vlmamba train` read.

    `captions.json` has a description of each training image whose questions determine one, for the align stage;
    `train.json` the training questions and descriptions joined to conversations of `n_turns`; `test.json` the test
    questions, one a record. Images are copied to `images/`.

    Args:
        folder: folder to write to.
        n_turns: questions in a conversation of `train.json`.

    Returns:
        The annotation files written.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    folder = Path(folder)
    train, test = load("train"), load("test")
    for split in ("train", "test"):
        shutil.copytree(_folder() / split / "images", folder / "images" / split, dirs_exist_ok=True)
    # Captions and train share the training images, test has its own.
    written = []
    for name, split, records in (
        ("captions", "train", captions(train)),
        ("train", "train", conversations(train, n_turns)),
        ("test", "test", test),
    ):
        copied = [Record(r.turns, (folder / "images" / split / _path(r).name,)) for r in records]
        written.append(folder / f"{name}.json")
        write_llava(copied, written[-1], folder)
    return written


def category(answer: str) -> Literal["yes/no", "color", "shape"]:
    """Category of the question that has this answer."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in SHAPES else "color"


def attributes(records: Sequence[Record], names: Sequence[str] = tuple(ATTRIBUTES)) -> dict[Path, tuple[str, ...]]:
    """Color and shape, or one of them, of each image whose questions determine both.

    "What" questions have one of the two as their answer; a statement that is true names what is in it.
    """
    found: dict[Path, dict[str, str]] = defaultdict(dict)
    for record in records:
        question, answer = (t.text for t in record.turns)
        if category(answer) != "yes/no":
            found[_path(record)][category(answer)] = answer
        # "is it a red circle?" yes, and "is there no triangle?" no, state what is in the image.
        elif (answer == "yes") != bool({"no", "not"} & set(words := question.rstrip("?").split())):
            for word in words:
                if word in SHAPES or word in COLORS:
                    found[_path(record)][category(word)] = word
    # Images with only one of the two known are left out.
    return {image: tuple(a[name] for name in names) for image, a in found.items() if len(a) == len(ATTRIBUTES)}


def captions(records: Sequence[Record]) -> list[Record]:
    """Describe each image whose questions determine its color and shape, for the align stage."""
    described = attributes(records)
    return [
        Record((Turn("user", "describe the image"), Turn("assistant", f"a {color} {shape}")), (image,))
        for image, (color, shape) in sorted(described.items())
    ]


def conversations(records: Sequence[Record], n_turns: int, seed: int = 0) -> list[Record]:
    """Join questions about the same image, in an order drawn from the seed, to conversations of `n_turns` questions.

    The first conversation about an image begins with its description, if its questions determine one: three questions
    in four are yes/no, which teach nothing of an attribute that the model does not tell yet.
    """
    described = {_path(r): r for r in captions(records)}
    # Grouped by image, in the order of the images' first questions.
    about: dict[Path, list[Record]] = defaultdict(list)
    for record in records:
        about[_path(record)].append(record)
    rng = random.Random(seed)
    joined: list[Record] = []
    for image, group in about.items():
        rng.shuffle(group)
        group = [described[image], *group] if image in described else group
        for i in range(0, len(group), n_turns):
            joined.append(Record(tuple(t for r in group[i : i + n_turns] for t in r.turns), (image,)))
    return joined


def scores(records: Sequence[Record], answers: Sequence[str]) -> dict[str, float]:
    """Exact-match accuracy, overall and by category."""
    # The category follows from the correct answer.
    correct, total = Counter(), Counter()
    for record, answer in zip(records, answers, strict=True):
        truth = record.turns[1].text
        for name in ("overall", category(truth)):
            total[name] += 1
            correct[name] += answer.strip() == truth
    return {name: correct[name] / total[name] for name in ("overall", "yes/no", "color", "shape") if total[name]}


def _path(record: Record) -> Path:
    (image,) = record.images
    assert isinstance(image, Path)  # every record of easy-VQA has an image file
    return image


def _folder() -> Path:
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the easy-vqa package is not installed: pip install easy-vqa")
    return Path(spec.submodule_search_locations[0]) / "data"

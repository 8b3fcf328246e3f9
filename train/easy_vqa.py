"""The `easy-vqa` package's data: 5,000 images of one shape, 48,248 questions, 13 answers."""

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
from .data import Record, write_llava

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def load(split: Literal["train", "test"]) -> list[Record]:
    """Questions, answers and images of a split, as the package has them.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    questions = read_json(_folder() / split / "questions.json")
    images = _folder() / split / "images"
    return [Record((Turn("user", q), Turn("assistant", a)), images / f"{i}.png") for q, a, i in questions]


def export(folder: str | Path, n_turns: int = 6) -> list[Path]:
    """Write the data in LLaVA's format: what `read_llava` and `vlmamba train` read.

    `captions.json` has a description of each training image whose questions tell enough, for the align stage;
    `train.json` the training questions joined to conversations of `n_turns`; `test.json` the test questions, one a
    record. Images are copied to `images/`.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    folder = Path(folder)
    train, test = load("train"), load("test")
    for split in ("train", "test"):
        shutil.copytree(_folder() / split / "images", folder / "images" / split, dirs_exist_ok=True)
    written = []
    for name, split, records in (
        ("captions", "train", captions(train)),
        ("train", "train", conversations(train, n_turns)),
        ("test", "test", test),
    ):
        here = [Record(r.turns, folder / "images" / split / r.image.name) for r in records]
        written.append(folder / f"{name}.json")
        write_llava(here, written[-1], folder)
    return written


def category(answer: str) -> Literal["yes/no", "colour", "shape"]:
    """What kind of question has this answer."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in SHAPES else "colour"


def attributes(records: Sequence[Record]) -> dict[Path, tuple[str, str]]:
    """Colour and shape of the images whose questions tell both.

    "What" questions tell one of the two outright; a question answered with yes that names both tells both.
    """
    found: dict[Path, dict[str, str]] = defaultdict(dict)
    for record in records:
        question, answer = (t.text for t in record.turns)
        if category(answer) != "yes/no":
            found[record.image][category(answer)] = answer
        elif (answer == "yes") != bool({"no", "not"} & set(words := question.rstrip("?").split())):
            for word in words:
                if word in SHAPES or word in COLOURS:
                    found[record.image][category(word)] = word
    return {image: (a["colour"], a["shape"]) for image, a in found.items() if len(a) == 2}


def captions(records: Sequence[Record]) -> list[Record]:
    """A description of each image whose questions tell enough, for the align stage."""
    described = attributes(records)
    return [
        Record((Turn("user", "describe the image"), Turn("assistant", f"a {colour} {shape}")), image)
        for image, (colour, shape) in sorted(described.items())
    ]


def conversations(records: Sequence[Record], n_turns: int, seed: int = 0) -> list[Record]:
    """Questions about one image joined, in an order drawn by the seed, to conversations of so many questions."""
    about: dict[Path, list[Record]] = defaultdict(list)
    for record in records:
        about[record.image].append(record)
    rng = random.Random(seed)
    joined = []
    for image, group in about.items():
        rng.shuffle(group)
        for i in range(0, len(group), n_turns):
            joined.append(Record(tuple(t for r in group[i : i + n_turns] for t in r.turns), image))
    return joined


def scores(records: Sequence[Record], answers: Sequence[str]) -> dict[str, float]:
    """Share of answers that equal the truth to the letter: overall and by category."""
    right, total = Counter(), Counter()
    for record, answer in zip(records, answers, strict=True):
        truth = record.turns[1].text
        for name in ("overall", category(truth)):
            total[name] += 1
            right[name] += answer.strip() == truth
    return {name: right[name] / total[name] for name in ("overall", "yes/no", "colour", "shape") if total[name]}


def _folder() -> Path:
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the easy-vqa package is not installed: pip install easy-vqa")
    return Path(spec.submodule_search_locations[0]) / "data"

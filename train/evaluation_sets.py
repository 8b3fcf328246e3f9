"""VizWiz, VSR and RefCOCO from their published files, with the prompts and metrics of Cobra's and ML-Mamba's tables.

Those are of Prismatic's harness, TRI-ML/vlm-evaluation (arXiv 2402.07865, section 3), by which both were evaluated.
"""

from __future__ import annotations

import abc
import math
import pickle
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..model.prompt import Turn
from ..model.text_files import read_json
from ..model.vlm import VLM
from . import easy_vqa
from .errors import BrokenDataError
from .evaluate import answer_all, choose_all
from .evaluation_metrics import Box, intersection_over_union, parse_box, vqa_accuracy
from .json_records import Entry, json_lines_entries, json_list_entries
from .parquet import ParquetTable, image_size
from .records import Record
from .sources import Images, open_source

Benchmark = Literal["vizwiz", "vsr", "refcoco"]
T = TypeVar("T")


@dataclass(frozen=True)
class EvaluationSet(abc.ABC):
    """Questions of a benchmark."""

    records: Sequence[Record]
    """Conversations, whose first turns are asked."""

    def ask(self, model: VLM, batch_size: int = 256, max_new_tokens: int = 32) -> list[str]:
        """Ask a model every question.

        Args:
            model: a model in any mode; it is in eval mode afterwards.
            batch_size: questions in a batch.
            max_new_tokens: longest answer, in tokens.

        Returns:
            The answers, in the order of the records.
        """
        return answer_all(model, self.records, batch_size=batch_size, max_new_tokens=max_new_tokens)

    @abc.abstractmethod
    def scores(self, answers: Sequence[str]) -> dict[str, float]:
        """Compute the benchmark's figures, each from 0 to 1.

        Args:
            answers: one for each record.

        Returns:
            Figures by name.
        """


class Conversations(EvaluationSet):
    """Conversations in LLaVA's format."""

    def scores(self, answers: Sequence[str]) -> dict[str, float]:
        """Compute the share of answers that are the conversation's own."""
        # turns[1] is the answer to the first question.
        right = [a.strip() == r.turns[1].text.strip() for a, r in zip(answers, self.records, strict=True)]
        return {"exact match": sum(right) / len(right)}


class EasyVQA(EvaluationSet):
    """Test questions of easy-VQA."""

    def scores(self, answers: Sequence[str]) -> dict[str, float]:
        """Compute the share of right answers, of all questions and by category."""
        return easy_vqa.scores(self.records, answers)


@dataclass(frozen=True)
class VizWiz(EvaluationSet):
    """Questions of blind people about their own photographs (arXiv 1802.08218)."""

    truths: tuple[tuple[str, ...], ...]
    """Ten people's answers to each question."""
    answerable: tuple[bool, ...]

    def scores(self, answers: Sequence[str]) -> dict[str, float]:
        """Compute the mean of `vqa_accuracy`, of all questions and of the answerable and unanswerable ones."""
        # Parts of the set, of which a small one may lack either.
        accuracies = [vqa_accuracy(a, t) for a, t in zip(answers, self.truths, strict=True)]
        parts = {
            "accuracy": accuracies,
            "answerable": [a for a, can in zip(accuracies, self.answerable, strict=True) if can],
            "unanswerable": [a for a, can in zip(accuracies, self.answerable, strict=True) if not can],
        }
        return {name: sum(part) / len(part) for name, part in parts.items() if part}


@dataclass(frozen=True)
class VSR(EvaluationSet):
    """Statements about where things are, true or false (arXiv 2205.00363)."""

    truths: tuple[bool, ...]

    def ask(self, model: VLM, batch_size: int = 256, max_new_tokens: int = 32) -> list[str]:
        """Choose the likelier one of the words "True" and "False" for each statement; nothing is generated."""
        return choose_all(model, self.records, ("True", "False"), batch_size=batch_size)

    def scores(self, answers: Sequence[str]) -> dict[str, float]:
        """Compute the share of right answers, and what always answering "True" would get."""
        right = [(a == "True") == t for a, t in zip(answers, self.truths, strict=True)]
        return {"accuracy": sum(right) / len(right), 'always "True"': sum(self.truths) / len(self.truths)}


@dataclass(frozen=True)
class RefCOCO(EvaluationSet):
    """Descriptions of one thing in an image, whose box is asked for (arXiv 1608.00272)."""

    truths: tuple[Box, ...]

    def scores(self, answers: Sequence[str]) -> dict[str, float]:
        """Compute the share of boxes with an intersection over union of at least 0.5, its mean, and invalid answers.

        An answer that is no box (`parse_box`) counts as one that meets nothing.
        """
        # An answer that is no box meets nothing.
        boxes = [parse_box(a) for a in answers]
        ious = [0.0 if b is None else intersection_over_union(b, t) for b, t in zip(boxes, self.truths, strict=True)]
        return {
            "accuracy": sum(iou >= 0.5 for iou in ious) / len(ious),
            "mean IoU": sum(ious) / len(ious),
            "no box": sum(b is None for b in boxes) / len(boxes),
        }


def read_vizwiz(path: str | Path, images: str | Path | None = None) -> VizWiz:
    """Read VizWiz's annotations as published, `val.json`: a list of `image`, `question`, `answers`, `answerable`.

    Args:
        path: annotation file.
        images: folder or archive of the images; the file's own folder by default.

    Returns:
        The questions.

    Raises:
        FileNotFoundError: there is no such file, or no source of images.
        BrokenDataError: a record is malformed, has no answers (those of the test split are not published), or names a
            missing image.
        ValueError: the file is no JSON list.
    """
    records, truths = _read_questions(path, images, json_list_entries, _vizwiz_question)
    people, answerable = zip(*truths, strict=True)
    return VizWiz(records, people, answerable)


def _vizwiz_question(where: str, item: Mapping[str, Any]) -> tuple[str, tuple[tuple[str, ...], bool]]:
    question = _text(where, item, "question")
    answers = item.get("answers")
    if answers is None:
        raise BrokenDataError(f"{where}: it has no `answers`; those of VizWiz's test split are not published")
    if not isinstance(answers, list) or len(answers) != 10:
        raise BrokenDataError(f"{where}: `answers` must be a list of ten, got {reprlib.repr(answers)}")
    if not all(isinstance(a, dict) and isinstance(a.get("answer"), str) for a in answers):
        raise BrokenDataError(f"{where}: each of `answers` must have a text `answer`, got {reprlib.repr(answers)}")
    # 0 where most people found that the image does not answer the question.
    can = _zero_or_one(where, item, "answerable")
    prompt = (
        f"{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase."
    )
    # Each person's answer in full: the metric normalizes it.
    return prompt, (tuple(a["answer"] for a in answers), can)


def read_vsr(path: str | Path, images: str | Path | None = None) -> VSR:
    """Read a split of VSR as published, `test.jsonl`: lines of `image`, `caption`, `label`.

    Args:
        path: annotation file.
        images: folder or archive of the images; the file's own folder by default.

    Returns:
        The statements.

    Raises:
        FileNotFoundError: there is no such file, or no source of images.
        BrokenDataError: a record is malformed, or names a missing image.
    """
    return VSR(*_read_questions(path, images, json_lines_entries, _vsr_question))


def _vsr_question(where: str, item: Mapping[str, Any]) -> tuple[str, bool]:
    prompt = (
        f'Based on the image, is this statement "True" or "False"? {_text(where, item, "caption")}\n'
        'Respond with "True" or "False" directly.'
    )
    return prompt, _zero_or_one(where, item, "label")


def read_refcoco(path: str | Path, images: str | Path | None = None, split: str = "val") -> RefCOCO:
    """Read RefCOCO, RefCOCO+ or RefCOCOg as published: `refs(unc).p` or `refs(umd).p`, and `instances.json` beside it.

    Or a folder of parquet files with the images in them, as `lmms-lab/RefCOCO`, `RefCOCOplus` and `RefCOCOg` on the Hub
    have them (`pip install pyarrow`).

    The pickle is read without running anything that is in it. Boxes are rounded to two decimals, as the papers' are.

    Args:
        path: the pickle of the expressions, or the folder of the parquet files.
        images: folder or archive of COCO's `train2014`; the file's own folder by default. None for parquet files.
        split: `val`, `testA` and `testB`; RefCOCOg has `val` and `test`.

    Returns:
        The expressions of the split.

    Raises:
        FileNotFoundError: there is no such file, no `instances.json`, or no source of images.
        BrokenDataError: a record is malformed, or names a missing image, annotation or split.
        ValueError: a file is no pickle of plain values, or no JSON; or images are given for parquet files.
        ModuleNotFoundError: parquet files need the package `pyarrow`.
    """
    path = Path(path)
    # A folder is the Hub's format.
    if path.is_dir():
        if images is not None:
            raise ValueError(f"images must be left out: the parquet files in {path} hold them; got {images}")
        return _read_refcoco_parquet(path, split)
    source = _open(path, images)
    refs = _plain_pickle(path)
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise ValueError(f"{path} must hold a list of dictionaries, got {reprlib.repr(refs)}")
    # The file has all splits.
    splits = Counter(str(ref.get("split")) for ref in refs)
    if split not in splits:
        raise BrokenDataError(f"{path} has no split {split!r}, but {', '.join(sorted(splits)) or 'no expressions'}")
    instances = path.with_name("instances.json")
    if not instances.is_file():
        raise FileNotFoundError(f"no annotations at {instances}, which belong to {path.name}")
    # Boxes and the images' sizes.
    tables = read_json(instances)
    of_image, of_box = (_by_id(instances, tables, key) for key in ("images", "annotations"))
    # One question for each expression: a thing has several, and one box.
    records, truths = [], []
    for i, ref in enumerate(refs):
        if ref.get("split") != split:
            continue
        where = f"{path}, record {i}"
        annotation = _row(where, ref, "ann_id", of_box)
        image = _row(where, ref, "image_id", of_image)
        box = _normalized_box(where, annotation.get("bbox"), (image.get("width"), image.get("height")))
        sentences = ref.get("sentences")
        if not isinstance(sentences, list) or not sentences or not all(isinstance(s, dict) for s in sentences):
            raise BrokenDataError(f"{where}: `sentences` must be a list of dictionaries, got {reprlib.repr(sentences)}")
        for sentence in sentences:
            prompt = _box_prompt(_text(where, sentence, "sent"))
            records.append(_record(where, prompt, source, _text(where, image, "file_name")))
            truths.append(box)
    return RefCOCO(tuple(records), tuple(truths))


def _read_refcoco_parquet(folder: Path, split: str) -> RefCOCO:
    # A row is a thing, with all its expressions.
    records, truths = [], []
    for image, row in ParquetTable(folder, split).rows(("answer", "bbox")):
        box = _normalized_box(str(image), row["bbox"], image_size(image))
        # The expressions: other users of these files ask for a description of the box.
        expressions = row["answer"]
        if not isinstance(expressions, list) or not expressions:
            raise BrokenDataError(f"{image}: `answer` must be a list of texts, got {reprlib.repr(expressions)}")
        for expression in expressions:
            prompt = _box_prompt(_text(str(image), {"answer": expression}, "answer"))
            records.append(Record((Turn("user", prompt),), (image,)))
            truths.append(box)
    if not records:
        raise BrokenDataError(f"{folder} has no rows of split {split!r}")
    return RefCOCO(tuple(records), tuple(truths))


def _box_prompt(expression: str) -> str:
    return f'Please provide the bounding box coordinate of the region this sentence describes: "{expression}"'


def read_benchmark(
    name: Benchmark, path: str | Path, images: str | Path | None = None, split: str | None = None
) -> EvaluationSet:
    """Read a benchmark by name.

    Args:
        name: `vizwiz`, `vsr` or `refcoco`.
        path, images: see `read_vizwiz`, `read_vsr` and `read_refcoco`.
        split: for `refcoco`, `val` by default; the files of the others are one split each.

    Raises:
        ValueError: a split is given for another set.
        FileNotFoundError, BrokenDataError: see the reader.
    """
    # The other two publish a file a split.
    if name == "refcoco":
        return read_refcoco(path, images, split or "val")
    if split is not None:
        raise ValueError(f"split is for refcoco, whose file has all of them; got {split!r} for {name}")
    if name == "vizwiz":
        return read_vizwiz(path, images)
    return read_vsr(path, images)


def _open(path: str | Path, images: str | Path | None) -> Images:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no annotations at {path}")
    return open_source(Path(path).parent if images is None else images)


def _read_questions(
    path: str | Path,
    images: str | Path | None,
    entries: Callable[[Path], Iterable[Entry]],
    question: Callable[[str, Mapping[str, Any]], tuple[str, T]],
) -> tuple[tuple[Record, ...], tuple[T, ...]]:
    """Read a file of records with an `image` each.

    Args:
        path, images: of the reader.
        entries: reads the file's records.
        question: the prompt and the truth of a record, from its place and value.
    """
    source, records, truths = _open(path, images), [], []
    for where, item in _items(path, entries(Path(path))):
        prompt, truth = question(where, item)
        records.append(_record(where, prompt, source, _text(where, item, "image")))
        truths.append(truth)
    if not records:
        raise BrokenDataError(f"{path} has no records")
    return tuple(records), tuple(truths)


def _items(path: str | Path, entries: Iterable[Entry]) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield the place and value of each record, which is an object."""
    # A set is evaluated entirely or not at all: a figure of a part of it could not be compared.
    for entry in entries:
        where = f"{path}, {'line' if Path(path).suffix == '.jsonl' else 'record'} {entry.number}"
        # The reader gives a fault of one record in place of its value.
        if isinstance(entry.value, Exception):
            raise BrokenDataError(f"{where}: {entry.value}")
        if not isinstance(entry.value, dict):
            raise BrokenDataError(f"{where}: it must be an object, got {reprlib.repr(entry.value)}")
        yield where, entry.value


def _text(where: str, item: Mapping[str, Any], key: str) -> str:
    value = item.get(key)
    if not isinstance(value, str) or not value.strip():
        raise BrokenDataError(f"{where}: `{key}` must be a text, got {reprlib.repr(value)}")
    return value.strip()


def _zero_or_one(where: str, item: Mapping[str, Any], key: str) -> bool:
    value = item.get(key)
    if value not in (0, 1):
        raise BrokenDataError(f"{where}: `{key}` must be 0 or 1, got {reprlib.repr(value)}")
    return bool(value)


def _record(where: str, prompt: str, source: Images, name: str) -> Record:
    # In the listing: the image itself is read when its question is asked.
    if name not in source:
        raise BrokenDataError(f"{where}: {source.missing(name)}")
    return Record((Turn("user", prompt),), (source[name],))


class _PlainUnpickler(pickle.Unpickler):
    """Read lists, dictionaries, texts and numbers; nothing else can be made, so that nothing can run."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and plain values need nothing")


def _plain_pickle(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file, encoding="utf-8").load()  # published by Python 2
    except OSError:
        raise
    except Exception as e:  # a damaged pickle raises many kinds
        raise ValueError(f"{path} is no pickle of plain values: {e}") from e


def _by_id(path: Path, tables: Any, key: str) -> dict[Any, dict[str, Any]]:
    rows = tables.get(key) if isinstance(tables, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "id" in row for row in rows):
        raise BrokenDataError(f"{path}: `{key}` must be a list of objects with an `id`, got {reprlib.repr(rows)}")
    return {row["id"]: row for row in rows}


def _row(where: str, ref: Mapping[str, Any], key: str, rows: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    number = ref.get(key)
    if not isinstance(number, int) or number not in rows:
        raise BrokenDataError(f"{where}: `{key}` {reprlib.repr(number)} is not in instances.json")
    return rows[number]


def _normalized_box(where: str, box: Any, size: tuple[Any, Any]) -> Box:
    """Convert a box (left, upper, width, height) in pixels."""
    numbers = [*(box if isinstance(box, list) else [box]), *size]
    if len(numbers) != 6 or not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
        raise BrokenDataError(f"{where}: `bbox` must be four numbers, and its image's size two; got {box!r}, {size}")
    x, y, w, h, width, height = numbers
    # An empty box could be met by no answer.
    # COCO's boxes may leave the image by a fraction of a pixel.
    if w <= 0 or h <= 0 or x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
        raise BrokenDataError(f"{where}: its box {box} is empty or outside of its image of {width} x {height}")
    # Corners as shares of the image, which is what models answer.
    edges = (x / width, y / height, (x + w) / width, (y + h) / height)
    return Box(*(round(min(max(e, 0.0), 1.0), 2) for e in edges))

"""Conversations about images, and the LLaVA format that they come in."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..model.batch import Sample
from ..model.prompt import Turn, check_turns
from ..model.vlm import VLM


class BrokenDataError(ValueError):
    """More records or samples are broken than the stage allows."""


@dataclass(frozen=True)
class Record:
    """One conversation, about an image or none."""

    turns: tuple[Turn, ...]
    image: Path | None = None


class Conversations:
    """Records made ready for a model as they are asked for.

    Args:
        keep_images: keep prepared images in memory, for sets that are small and seen many times.
    """

    def __init__(self, records: Sequence[Record], model: VLM, keep_images: bool = False):
        self.records, self.model = records, model
        self.kept: dict[Path, tuple[Tensor, ...]] | None = {} if keep_images else None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        n_image_tokens = 0 if record.image is None else self.model.image_tokens
        ids, labels = self.model.template.encode(self.model.tokenizer, record.turns, n_image_tokens)
        return Sample(ids, labels, () if record.image is None else self._images(record.image))

    def _images(self, path: Path) -> tuple[Tensor, ...]:
        if self.kept is not None and path in self.kept:
            return self.kept[path]
        images = tuple(p(path) for p in self.model.processors)
        if self.kept is not None:
            self.kept[path] = images
        return images


def read_llava(path: str | Path, image_folder: str | Path | None = None) -> list[Record]:
    """Read conversations in LLaVA's format: a JSON list, or one JSON object a line (`.jsonl`).

    Each has `conversations`, a list of `{"from": "human" | "gpt", "value": text}`, and may have `image`, a path
    under `image_folder`.

    Raises:
        FileNotFoundError: the file, or an image that it names, is not there; the record is named.
        ValueError: a record is malformed; the file and the record (for JSONL the line) are named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no annotations at {path}")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        lines = [(f"{path}, line {i}", line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
        items = [(where, _parse(line, where)) for where, line in lines]
    else:
        data = _parse(text, str(path))
        if not isinstance(data, list):
            raise ValueError(f"{path} must hold a list of records, got {type(data).__name__}")
        items = [(f"{path}, record {i}", item) for i, item in enumerate(data)]
    folder = path.parent if image_folder is None else Path(image_folder)
    return [_record(item, where, folder) for where, item in items]


def write_llava(records: Sequence[Record], path: str | Path, image_folder: Path) -> None:
    """Write records in LLaVA's format, with image paths under `image_folder`."""
    names = {"user": "human", "assistant": "gpt"}
    items = []
    for i, record in enumerate(records):
        turns = [{"from": names[t.role], "value": t.text} for t in record.turns]
        if record.image is not None:
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
        image = {} if record.image is None else {"image": record.image.relative_to(image_folder).as_posix()}
        items.append({"id": str(i), **image, "conversations": turns})
    Path(path).write_text(json.dumps(items), encoding="utf-8")


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"{where} is not valid JSON: {e}") from e


def _record(item: object, where: str, folder: Path) -> Record:
    if not isinstance(item, dict) or not isinstance(item.get("conversations"), list):
        raise ValueError(f"{where} must be an object with a list `conversations`")
    roles: dict[object, Callable[[str], Turn]] = {
        "human": lambda text: Turn("user", text),
        "gpt": lambda text: Turn("assistant", text),
    }
    turns = []
    for turn in item["conversations"]:
        if not isinstance(turn, dict) or turn.get("from") not in roles or not isinstance(turn.get("value"), str):
            raise ValueError(f"{where}: a turn must be {{'from': 'human' or 'gpt', 'value': text}}, got {turn!r}")
        turns.append(roles[turn["from"]](turn["value"]))
    try:
        check_turns(turns)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from e
    if turns[-1].role != "assistant":
        raise ValueError(f"{where}: the last turn must be an answer")
    image = item.get("image")
    if image is None:
        return Record(tuple(turns))
    if not isinstance(image, str):
        raise ValueError(f"{where}: `image` must be one path, got {image!r}")
    if not (folder / image).is_file():
        raise FileNotFoundError(f"{where}: no image at {folder / image}")
    return Record(tuple(turns), folder / image)

"""Conversations about images, and the LLaVA format that they come in."""

from __future__ import annotations

import codecs
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from torch import Tensor

from ..model.batch import Sample
from ..model.image import is_image
from ..model.prompt import IGNORE, Turn, check_turns
from ..model.vlm import VLM
from .sources import FolderImages, Images, Member, TarImages, open_picture, open_source

logger = logging.getLogger("vlmamba.train")
CHUNK = 8 << 20
"""Characters of a JSON file that are held at once; more where one record is longer."""


class BrokenDataError(ValueError):
    """More records or samples are broken than the stage allows."""


@dataclass(frozen=True)
class Record:
    """One conversation, about an image or none."""

    turns: tuple[Turn, ...]
    image: Path | Member | None = None


class Conversations:
    """Records made ready for a model as they are asked for.

    Args:
        keep_images: keep prepared images in memory, for sets that are small and seen many times. Each worker keeps
            its own.
        max_tokens: tokens of text that a sample has at most; what is beyond is cut away, as LLaVA and ML-Mamba do. An
            image's tokens come on top. None cuts nothing.

    Raises:
        ValueError, FileNotFoundError: on access: the image is missing or damaged, or no learned token is left within
            `max_tokens`; the record is named.
    """

    def __init__(self, records: Sequence[Record], model: VLM, keep_images: bool = False, max_tokens: int | None = 2048):
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1 or None, got {max_tokens}")
        if model.tokenizer is None:
            raise ValueError("the model has no tokenizer: set model.tokenizer")
        self.records, self.max_tokens = records, max_tokens
        # Not the model itself: a worker has no use for the weights.
        self.tokenizer, self.template = model.tokenizer, model.template
        self.processors, self.image_tokens = model.processors, model.image_tokens
        self.kept: dict[Path | Member, tuple[Tensor, ...]] | None = {} if keep_images else None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        where = self.records.where(index) if isinstance(self.records, Records) else f"record {index}"
        try:
            return self._sample(self.records[index])
        except FileNotFoundError as e:
            raise FileNotFoundError(f"{where}: {e}") from e
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from e

    def _sample(self, record: Record) -> Sample:
        n_image_tokens = 0 if record.image is None else self.image_tokens
        ids, labels = self.template.encode(self.tokenizer, record.turns, n_image_tokens)
        if self.max_tokens is not None:
            ids, labels = (tokens[: n_image_tokens + self.max_tokens] for tokens in (ids, labels))
        if all(label == IGNORE for label in labels[1:]):
            raise ValueError(f"no learned token lies within max_tokens = {self.max_tokens}")
        return Sample(ids, labels, () if record.image is None else self._images(record.image))

    def _images(self, image: Path | Member) -> tuple[Tensor, ...]:
        if self.kept is not None and image in self.kept:
            return self.kept[image]
        opened = open_picture(image)
        images = tuple(p(opened) for p in self.processors)
        if self.kept is not None:
            self.kept[image] = images
        return images


class _File(NamedTuple):
    """A file of annotations as it was when it was read."""

    path: Path
    images: Images
    is_shard: bool
    stamp: tuple[int, int]
    """Size and time of the last change."""


class Records(Sequence[Record]):
    """Records that stay in their files: of each only its place is kept, 40 bytes."""

    def __init__(self, files: Sequence[_File], table: np.ndarray, broken: Sequence[str] = ()):
        self._files, self._table = files, table
        self.broken = tuple(broken)
        """What was left out, each with its place and reason."""

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> Record | Records:
        if isinstance(index, slice):
            return Records(self._files, self._table[index], self.broken)
        number, begin, size, _, image = self._table[index].tolist()
        path, images, is_shard, stamp = self._files[number]
        with open(path, "rb") as file:
            if _stamp(file.fileno()) != stamp:
                raise ValueError(f"{path} has changed since it was read")
            file.seek(begin)
            item = json.loads(file.read(size))
        turns, name = _parts(item)
        if is_shard:
            return Record(turns, None if image < 0 else images[image])
        return Record(turns, None if name is None else images[name])

    def where(self, index: int) -> str:
        """The file and the place in it of a record."""
        file, _, _, number, _ = self._table[index].tolist()
        return _where(self._files[file], number)

    @property
    def paths(self) -> list[Path]:
        """Files of annotations."""
        return [file.path for file in self._files]


def read_llava(
    paths: str | Path | Sequence[str | Path],
    images: str | Path | None | Sequence[str | Path | None] = None,
    max_broken: float = 0.0,
) -> Records:
    """Read conversations in LLaVA's format, and check every one of them.

    Each has `conversations`, a list of `{"from": "human" | "gpt", "value": text}`, and may have `image`, the name of
    one image. They lie in a JSON list, one a line (`.jsonl`), or in shards as WebDataset writes them: a `.tar`, a
    folder of them, or a pattern such as `shard-{000..012}.tar`, where `KEY.json` is a record and `KEY.jpg` (or
    another image ending) is its image. Whether the images are there is told by the names that their source lists, not
    by a request for each.

    Args:
        paths: one file, folder or pattern, or several, whose records follow each other.
        images: the folder, `.zip` or `.tar` that `image` names come from, one for all paths or one for each; by
            default the path's own folder. Shards have their own images.
        max_broken: share of the records that may be left out with a warning. They are malformed, have several images,
            or name one that is missing.

    Raises:
        FileNotFoundError: a file of annotations or a source of images is not there.
        ValueError: a file is no JSON, is cut short or holds no list, or an archive is damaged.
        BrokenDataError: more than `max_broken` of the records are broken; how many, and the first few, are named.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    several = images is not None and not isinstance(images, str | Path)
    sources = list(images) if several else [images] * len(paths)
    if len(sources) != len(paths):
        raise ValueError(f"images must be one for all paths or one for each of {len(paths)}, got {len(sources)}")
    opened: dict[Path, Images] = {}
    files: list[_File] = []
    rows: list[np.ndarray] = []
    broken: list[str] = []
    for path, source in zip(paths, sources, strict=True):
        shards = _shards(Path(path))
        for file in shards or [Path(path)]:
            if not file.is_file():
                raise FileNotFoundError(f"no annotations at {file}")
            if shards:
                contents = TarImages(file)
            else:
                folder = file.parent if source is None else Path(source)
                contents = opened[folder] = opened.get(folder) or open_source(folder)
            files.append(_File(file, contents, bool(shards), _stamp(file)))
            table, found = _read(files[-1], len(files) - 1)
            rows.append(table)
            broken += found
    for source in opened.values():
        if isinstance(source, FolderImages):
            source.forget()
    table = np.concatenate(rows) if rows else np.empty((0, 5), np.int64)
    if broken:
        text = f"{len(broken):,} of {len(table) + len(broken):,} records are broken"
        first = "; ".join(broken[:5]) + (f"; and {len(broken) - 5:,} more" if len(broken) > 5 else "")
        if len(broken) > max_broken * (len(table) + len(broken)):
            raise BrokenDataError(f"{text}, more than max_broken = {max_broken} allows: {first}")
        logger.warning("%s and left out: %s", text, first)
    return Records(files, table, broken)


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


def _read(file: _File, file_number: int) -> tuple[np.ndarray, list[str]]:
    """Places of the records of a file that are whole; and what is wrong with the others."""
    if file.is_shard:
        items = _shard_items(file.images)
    else:
        items = _line_items(file.path) if file.path.suffix == ".jsonl" else _list_items(file.path)
    rows, broken = [], []
    for item in items:
        try:
            if isinstance(item.value, Exception):
                raise item.value
            _, name = _parts(item.value)
            if not file.is_shard and name is not None and name not in file.images:
                raise ValueError(f"no image {name} in {file.images.path}")
        except ValueError as e:
            broken.append(f"{_where(file, item.number)}: {e}")
        else:
            rows.append((file_number, item.begin, item.size, item.number, item.image))
    return np.array(rows, dtype=np.int64).reshape(-1, 5), broken


class _Item(NamedTuple):
    """A record in its file."""

    begin: int
    size: int
    """In bytes."""
    number: int
    value: Any
    """As JSON; or the error in it."""
    image: int = -1
    """Number of its image in the shard."""


def _where(file: _File, number: int) -> str:
    if file.is_shard:
        return f"{file.path}, {file.images.name(number)}"
    return f"{file.path}, {'line' if file.path.suffix == '.jsonl' else 'record'} {number}"


def _stamp(file: Path | int) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def _parts(item: object) -> tuple[tuple[Turn, ...], str | None]:
    """Turns and the image's name of a record.

    Raises:
        ValueError: it is malformed.
    """
    if not isinstance(item, dict) or not isinstance(item.get("conversations"), list):
        raise ValueError("a record must be an object with a list `conversations`")
    roles: dict[object, Callable[[str], Turn]] = {
        "human": lambda text: Turn("user", text),
        "gpt": lambda text: Turn("assistant", text),
    }
    turns = []
    for turn in item["conversations"]:
        if not isinstance(turn, dict) or turn.get("from") not in roles or not isinstance(turn.get("value"), str):
            raise ValueError(f"a turn must be {{'from': 'human' or 'gpt', 'value': text}}, got {turn!r}")
        turns.append(roles[turn["from"]](turn["value"]))
    check_turns(turns)
    if turns[-1].role != "assistant":
        raise ValueError("the last turn must be an answer")
    image = item.get("image")
    if isinstance(image, list):
        raise ValueError(f"`image` must be one name, got {len(image)}: several images in a conversation cannot be read")
    if image is not None and not isinstance(image, str):
        raise ValueError(f"`image` must be one name, got {image!r}")
    return tuple(turns), image


def _line_items(path: Path) -> Iterator[_Item]:
    begin = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    value = json.loads(line)
                except ValueError as e:
                    value = ValueError(f"not valid JSON: {e}")
                yield _Item(begin, len(line), number, value)
            begin += len(line)


def _list_items(path: Path) -> Iterator[_Item]:
    """Records of a JSON list of any length, a piece of the file at a time."""
    with open(path, "rb") as file:
        text = _Text(path, file)
        first = text.peek()
        if first != "[":
            raise ValueError(f"{path} must hold a list of records, but begins with {first!r}")
        text.skip()
        number = 0
        while text.peek() != "]" or number:
            begin = text.byte
            value = text.value(number)
            yield _Item(begin, text.byte - begin, number, value)
            number += 1
            end = text.peek()
            if end == "]":
                break
            if end != ",":
                raise text.error(number, "is cut short" if not end else f"has {end!r} where a comma must be")
            text.skip()
        text.skip()
        if text.peek():
            raise text.error(number, "goes on after the end of its list")


class _Text:
    """A file of JSON, of which only what is being looked at is in memory."""

    def __init__(self, path: Path, file: Any):
        self.path, self.file = path, file
        self.decoder, self.utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.byte, self.ended = "", 0, 0, False

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            end = _SPACE.match(self.text, self.at).end()
            self.byte += end - self.at
            self.at = end
            if end < len(self.text) or self.ended:
                return self.text[end : end + 1]
            self._more()

    def skip(self) -> None:
        """Go past a character of one byte."""
        self.at, self.byte = self.at + 1, self.byte + 1

    def value(self, number: int) -> Any:
        """Go past the value that comes next."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as e:
                # An error this near to the end of what is in memory may be no error but a value that goes on.
                cut = e.msg.startswith("Unterminated string") or e.pos > len(self.text) - 16
                if not cut:
                    raise self.error(number, f"is not valid JSON: {e.msg}") from e
                if self.ended:
                    raise self.error(number, "is cut short") from e
                self._more()
            else:
                taken = self.text[self.at : end]
                self.byte += len(taken) if taken.isascii() else len(taken.encode())
                self.at = end
                return value

    def error(self, number: int, what: str) -> ValueError:
        return ValueError(f"{self.path} {what} (record {number}, after byte {self.byte:,})")

    def _more(self) -> None:
        rest = self.text[self.at :]
        chunk = self.file.read(max(CHUNK, len(rest)))
        self.ended = not chunk
        try:
            self.text, self.at = rest + self.utf8.decode(chunk, final=self.ended), 0
        except UnicodeDecodeError as e:
            raise ValueError(f"{self.path} is not UTF-8 after byte {self.byte:,}: {e.reason}") from e


_SPACE = re.compile(r"[ \t\n\r]*")


def _shard_items(shard: TarImages) -> Iterator[_Item]:
    """Records of a shard: files whose names are equal up to the first dot belong together."""
    samples: dict[str, dict[str, int]] = {}
    for name, number in shard.names.items():
        folder, base = os.path.split(name)
        key, _, ending = base.partition(".")
        kind = "json" if ending.lower() == "json" else "image" if is_image(base) else None
        if kind is not None:
            sample = samples.setdefault(os.path.join(folder, key), {})
            if kind in sample:
                raise ValueError(f"{shard.path} has several images for one record: {name} is the second")
            sample[kind] = number
    for files in samples.values():
        if "json" not in files:
            yield _Item(0, 0, files["image"], ValueError("an image without a .json beside it"))
            continue
        try:
            value = json.loads(shard.read(files["json"]))
        except ValueError as e:
            value = ValueError(f"not valid JSON: {e}")
        begin, size = shard.spans[files["json"]].tolist()
        yield _Item(begin, size, files["json"], value, files.get("image", -1))


def _shards(path: Path) -> list[Path]:
    """The shards that a path stands for; none where it is a file of another kind."""
    pattern = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", str(path))
    if pattern:
        before, first, last, after = pattern.groups()
        return [Path(f"{before}{i:0{len(first)}d}{after}") for i in range(int(first), int(last) + 1)]
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
        if not found:
            raise FileNotFoundError(f"no .tar in {path}")
        return found
    return [path] if path.suffix == ".tar" else []

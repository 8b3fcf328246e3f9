"""Conversations about images in LLaVA's format: reading, checking and writing."""

from __future__ import annotations

import json
import logging
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np

from ..model.files import write_atomic
from ..model.image import is_image
from ..model.prompt import Turn, check_turns
from ..model.text_files import parse_json
from .errors import BrokenDataError, ChangedDataError
from .json_records import json_lines_entries, json_list_entries
from .shards import shard_entries, shard_paths
from .sources import FolderImages, Images, Member, TarImages, open_source, stamp

logger = logging.getLogger("vlmamba.train")

_ROLES: dict[str, Literal["user", "assistant"]] = {"human": "user", "gpt": "assistant"}
"""Roles by the names that LLaVA gives them."""


@dataclass(frozen=True)
class Record:
    """One conversation, with or without an image."""

    turns: tuple[Turn, ...]
    image: Path | Member | None = None


class _AnnotationFile(NamedTuple):
    """An annotation file as it was when it was indexed."""

    path: Path
    images: Images
    is_shard: bool
    stamp: tuple[int, int]
    """Size and modification time."""


class Records(Sequence[Record]):
    """Records read from their files on access; only an index is in memory, 40 bytes a record.

    Args:
        files: the annotation files.
        table: int64, (records, 5): number of the file, byte offset, bytes, number within the file, and number of the
            image in a shard (elsewhere 0), -1 for none.
        broken: location and error of each record that was left out.
    """

    def __init__(self, files: Sequence[_AnnotationFile], table: np.ndarray, broken: Sequence[str] = ()):
        self._files, self._table = files, table
        self.broken = tuple(broken)

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> Record | Records:
        if isinstance(index, slice):
            return Records(self._files, self._table[index], self.broken)
        number, start, size, _, image = self._table[index].tolist()
        path, images, is_shard, indexed_stamp = self._files[number]
        try:
            file = open(path, "rb")
        except FileNotFoundError as e:
            raise ChangedDataError(f"{path} does not exist any more") from e
        # Offsets are valid only for the file that was indexed.
        with file:
            if stamp(file) != indexed_stamp:
                raise ChangedDataError(f"{path} has changed since it was read")
            file.seek(start)
            item = parse_json(file.read(size))
        turns, name = _parse(item)
        if image < 0:
            return Record(turns)
        if is_shard:
            assert isinstance(images, TarImages)
            return Record(turns, images.member(image))
        if name is None:
            raise ChangedDataError(f"{path} has changed since it was read")
        return Record(turns, images[name])

    def location(self, index: int) -> str:
        """Name the file of a record, and its place in it."""
        file, _, _, number, _ = self._table[index].tolist()
        return _location(self._files[file], number)

    @property
    def n_with_image(self) -> int:
        """Number of records with an image."""
        return int((self._table[:, 4] >= 0).sum())

    def __str__(self) -> str:
        left_out = f"; {len(self.broken):,} more are broken and left out" if self.broken else ""
        return f"{len(self):,} records, {self.n_with_image:,} of them with an image{left_out}"

    @property
    def paths(self) -> list[Path]:
        """Annotation files."""
        return [file.path for file in self._files]


def read_llava(
    paths: str | Path | Sequence[str | Path],
    images: str | Path | None | Sequence[str | Path | None] = None,
    max_broken: float = 0.0,
) -> Records:
    """Read conversations in LLaVA's format, and check every one of them.

    A record has `conversations`, a list of `{"from": "human" | "gpt", "value": text}`, and may have `image`, the name
    of one image, or a list of one name; `images` means the same. Records are the items of a JSON list, the lines of a
    `.jsonl` file, or in shards as WebDataset writes them: a `.tar`, a folder of them, or a pattern such as
    `shard-{000..012}.tar`, where `KEY.json` is a record and `KEY.jpg` (or another image format) is its image. Whether
    an image exists is looked up in a listing of its source, without a request for each.

    Args:
        paths: one file, folder or pattern, or several, whose records are concatenated.
        images: the folder, `.zip` or `.tar` that `image` names are relative to, one for all paths or one for each; by
            default the path's own folder. Shards have their own images.
        max_broken: fraction of the records that may be left out with a warning. A record is broken if it is malformed,
            is larger than `MAX_RECORD_BYTES`, has several images, or refers to a missing one: by its name, by
            `<image>` in a question, or under another key.

    Returns:
        The records that are not broken, as an index into their files.

    Raises:
        FileNotFoundError: an annotation file or a source of images does not exist.
        ValueError: a file is not JSON, is truncated or holds no list, or an archive is damaged.
        BrokenDataError: more than `max_broken` of the records are broken; the message has their number and the first
            few.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    sources = [images] * len(paths) if images is None or isinstance(images, str | Path) else list(images)
    if len(sources) != len(paths):
        raise ValueError(f"images must be one for all paths or one for each of {len(paths)}, got {len(sources)}")
    # Several annotation files may share a source of images, which is indexed once.
    opened: dict[Path, Images] = {}
    files: list[_AnnotationFile] = []
    tables: list[np.ndarray] = []
    broken: list[str] = []
    for path, source in zip(paths, sources, strict=True):
        shards = shard_paths(Path(path))
        for file in shards or [Path(path)]:
            if not file.is_file():
                raise FileNotFoundError(f"no annotations at {file}")
            if shards:
                contents = TarImages(file)
            else:
                folder = file.parent if source is None else Path(source)
                contents = opened[folder] = opened.get(folder) or open_source(folder)
            with open(file, "rb") as opened_file:
                current_stamp = stamp(opened_file)
            files.append(_AnnotationFile(file, contents, bool(shards), current_stamp))
            table, broken_here = _index(files[-1], len(files) - 1)
            tables.append(table)
            broken += broken_here
    # Records hold paths and archive members from here on.
    for source in opened.values():  # the listings are not needed any more
        if isinstance(source, FolderImages):
            source.clear_cache()
    table = np.concatenate(tables) if tables else np.empty((0, 5), np.int64)  # (records, 5)
    if broken:
        text = f"{len(broken):,} of {len(table) + len(broken):,} records are broken"
        first = "; ".join(broken[:5]) + (f"; and {len(broken) - 5:,} more" if len(broken) > 5 else "")
        # All of them are counted before the decision, so that the message has the total.
        if len(broken) > max_broken * (len(table) + len(broken)):
            raise BrokenDataError(f"{text}, more than max_broken = {max_broken} allows: {first}")
        logger.warning("%s and left out: %s", text, first)
    return Records(files, table, broken)


def write_llava(records: Sequence[Record], path: str | Path, images: str | Path) -> None:
    """Write records in LLaVA's format, to be read with the same `images`.

    Args:
        records: conversations to write, in this order.
        path: JSON file to write.
        images: the folder or archive that image names are relative to.

    Raises:
        ValueError: an image is elsewhere.
    """
    names = {role: name for name, role in _ROLES.items()}
    items = []
    for i, record in enumerate(records):
        turns = [{"from": names[t.role], "value": t.text} for t in record.turns]
        # Only what `read_llava` reads, and an id, which other programs expect.
        item: dict[str, Any] = {"id": str(i), "conversations": turns}
        if record.image is not None:
            item["image"] = _name_in(record.image, Path(images))
            # LLaVA marks the place of the image in the first question.
            if not _mentions_image(record.turns):
                turns[0]["value"] = "<image>\n" + turns[0]["value"]
        items.append(item)
    write_atomic(path, json.dumps(items))


def _name_in(image: Path | Member, images: Path) -> str:
    if isinstance(image, Member) and image.archive.path == images:
        return image.name
    if isinstance(image, Path) and image.is_relative_to(images):
        return image.relative_to(images).as_posix()
    raise ValueError(f"{image} is not in {images}, which image names must be relative to")


def _index(file: _AnnotationFile, file_number: int) -> tuple[np.ndarray, list[str]]:
    """Read all records of a file.

    Returns:
        Rows of `Records.table`, (records, 5), for the valid ones; location and error of each broken one.
    """
    if isinstance(file.images, TarImages) and file.is_shard:
        entries = shard_entries(file.images)
    else:
        entries = json_lines_entries(file.path) if file.path.suffix == ".jsonl" else json_list_entries(file.path)
    rows, broken = [], []
    # Every record is parsed now, so that errors are reported before training; only its place is stored.
    for entry in entries:
        try:
            if isinstance(entry.value, Exception):
                raise entry.value
            turns, name = _parse(entry.value)
            image = entry.image
            if not file.is_shard and name is not None:
                # A lookup in the listing; the image itself is decoded when its sample is prepared.
                if name not in file.images:
                    raise ValueError(file.images.missing(name))
                image = 0
            if image < 0:
                _check_no_image(entry.value, turns, name)
        except ValueError as e:
            broken.append(f"{_location(file, entry.number)}: {e}")
        else:
            rows.append((file_number, entry.start, entry.size, entry.number, image))
    return np.array(rows, dtype=np.int64).reshape(-1, 5), broken


def _location(file: _AnnotationFile, number: int) -> str:
    if file.is_shard:
        assert isinstance(file.images, TarImages)
        return f"{file.path}, {file.images.name(number)}" if number >= 0 else str(file.path)
    return f"{file.path}, {'line' if file.path.suffix == '.jsonl' else 'record'} {number}"


def _parse(item: object) -> tuple[tuple[Turn, ...], str | None]:
    """Parse a record into its turns and the name of its image.

    Raises:
        ValueError: it is malformed.
    """
    if not isinstance(item, dict) or not isinstance(item.get("conversations"), list):
        raise ValueError("a record must be an object with a list `conversations`")
    # LLaVA's `from` is human or gpt, and turns alternate.
    turns = []
    for turn in item["conversations"]:
        role = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in _ROLES or not isinstance(turn.get("value"), str):
            raise ValueError(f"a turn must be {{'from': 'human' or 'gpt', 'value': text}}, got {reprlib.repr(turn)}")
        turns.append(Turn(_ROLES[role], turn["value"]))
    check_turns(turns)
    if turns[-1].role != "assistant":
        raise ValueError("the last turn must be an answer")
    names = {name for key in ("image", "images") if (name := _one_name(key, item.get(key))) is not None}
    if len(names) > 1:
        raise ValueError(f"`image` and `images` name two: {' and '.join(map(reprlib.repr, sorted(names)))}")
    return tuple(turns), names.pop() if names else None


def _one_name(key: str, value: object) -> str | None:
    if isinstance(value, list) and len(value) > 1:
        raise ValueError(f"`{key}` must be one name, got {len(value)}: a conversation has one image at most")
    name = value[0] if isinstance(value, list) and value else value
    if name is None or name == []:
        return None
    if not isinstance(name, str) or not name:
        raise ValueError(f"`{key}` must be one name, got {reprlib.repr(name)}")
    return name


def _check_no_image(item: Mapping[str, Any], turns: Sequence[Turn], name: str | None) -> None:
    """Check that a record without an image refers to none, so that none is trained on without its image.

    Raises:
        ValueError: it refers to an image.
    """
    if name is not None:
        raise ValueError(f"it names the image {name}, but the shard has none for it")
    if _mentions_image(turns):
        raise ValueError("a question has <image>, but the record names no image")
    # Other keys that hold an image, such as img or image_path: by their name, or by a value that is an image's name.
    for key, value in item.items():
        texts = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]
        names_one = bool(value) and isinstance(value, str | list | dict) and _IMAGE_KEY.search(key)
        if key not in ("id", "conversations") and (names_one or any(map(is_image, texts))):
            raise ValueError(f"it has `{key}`: {reprlib.repr(value)}, but only `image` is read as an image")


_IMAGE_KEY = re.compile("image|img|picture|photo", re.IGNORECASE)


def _mentions_image(turns: Sequence[Turn]) -> bool:
    return any(turn.role == "user" and "<image>" in turn.text for turn in turns)

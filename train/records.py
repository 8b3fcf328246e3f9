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
from ..model.prompt import Turn, check_turns, count_marks, mark_images
from ..model.text_files import parse_json
from .errors import BrokenDataError, ChangedDataError
from .json_records import json_lines_entries, json_list_entries
from .shards import shard_entries, shard_paths
from .sources import Clip, FolderImages, Images, Member, TarImages, open_source, stamp

logger = logging.getLogger("vlmamba.train")

_ROLES: dict[str, Literal["user", "assistant"]] = {"human": "user", "gpt": "assistant"}
"""Roles by the names that LLaVA gives them."""


@dataclass(frozen=True)
class Record:
    """One conversation, with any number of images."""

    turns: tuple[Turn, ...]
    images: tuple[Path | Member | Clip, ...] = ()
    """Images or videos, in the order of their marks `<image>` in the turns. An only image needs no mark."""

    def first_question(self) -> tuple[Turn, tuple[Path | Member | Clip, ...]]:
        """Return the first turn and its images."""
        # An only image without a mark belongs to the first turn.
        marked = count_marks(self.turns)
        return self.turns[0], self.images[: count_marks(self.turns[:1])] if marked else self.images


class _AnnotationFile(NamedTuple):
    """An annotation file as it was when it was indexed."""

    path: Path
    images: Images
    is_shard: bool
    stamp: tuple[int, int]
    """Size and modification time."""


class Records(Sequence[Record]):
    """Records read from their files on access; only an index is in memory, 48 bytes a record.

    Args:
        files: the annotation files.
        table: int64, (records, 6): number of the file, byte offset, bytes, number within the file, number of images,
            and in a shard the position of the first one in `members`.
        members: int64, numbers of the images of shards within their shard, those of a record one after the other.
        broken: location and error of each record that was left out.
    """

    def __init__(
        self, files: Sequence[_AnnotationFile], table: np.ndarray, members: np.ndarray, broken: Sequence[str] = ()
    ):
        self._files, self._table, self._members = files, table, members
        self.broken = tuple(broken)

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> Record | Records:
        if isinstance(index, slice):
            return Records(self._files, self._table[index], self._members, self.broken)
        number, start, size, _, n_images, first = self._table[index].tolist()
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
        turns, names, is_video = _parse(item)
        if is_shard:
            assert isinstance(images, TarImages)
            return Record(turns, tuple(map(images.member, self._members[first : first + n_images].tolist())))
        if len(names) != n_images:
            raise ChangedDataError(f"{path} has changed since it was read")
        files = (images[name] for name in names)
        return Record(turns, tuple(Clip(file) if is_video else file for file in files))

    def location(self, index: int) -> str:
        """Name the file of a record, and its place in it."""
        file, _, _, number, *_ = self._table[index].tolist()
        return _location(self._files[file], number)

    @property
    def n_with_image(self) -> int:
        """Number of records with an image."""
        return int((self._table[:, 4] > 0).sum())

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
    of an image or a list of names; `images` means the same. In its place `video` names folders of frames or animated
    files. The questions have a mark `<image>` at the place of each image or video, which an only one does not need.

    Records are the items of a JSON list, the lines of a `.jsonl` file, or in shards as WebDataset writes them: a
    `.tar`, a folder of them, or a pattern such as `shard-{000..012}.tar`, where `KEY.json` is a record and `KEY.jpg`
    (or another image format) its image, or `KEY.0.jpg`, `KEY.1.jpg`, ... its images. Whether an image exists is looked
    up in a listing of its source, without a request for each.

    Args:
        paths: one file, folder or pattern, or several, whose records are concatenated.
        images: the folder, `.zip` or `.tar` that `image` names are relative to, one for all paths or one for each; by
            default the path's own folder. Shards have their own images.
        max_broken: fraction of the records that may be left out with a warning. A record is broken if it is malformed,
            is larger than `MAX_RECORD_BYTES`, has more marks than images or fewer, or refers to a missing image: by
            its name, by `<image>` in a question, or under another key.

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
    members: list[int] = []
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
            table, broken_here = _index(files[-1], len(files) - 1, members)
            tables.append(table)
            broken += broken_here
    # Records hold paths and archive members from here on.
    for source in opened.values():  # the listings are not needed any more
        if isinstance(source, FolderImages):
            source.clear_cache()
    table = np.concatenate(tables) if tables else np.empty((0, 6), np.int64)  # (records, 6)
    if broken:
        text = f"{len(broken):,} of {len(table) + len(broken):,} records are broken"
        first = "; ".join(broken[:5]) + (f"; and {len(broken) - 5:,} more" if len(broken) > 5 else "")
        # All of them are counted before the decision, so that the message has the total.
        if len(broken) > max_broken * (len(table) + len(broken)):
            raise BrokenDataError(f"{text}, more than max_broken = {max_broken} allows: {first}")
        logger.warning("%s and left out: %s", text, first)
    return Records(files, table, np.array(members, dtype=np.int64), broken)


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
        if record.images:
            names_in = [_name_in(image, Path(images)) for image in record.images]
            key = "video" if isinstance(record.images[0], Clip) else "image"
            item[key] = names_in[0] if len(names_in) == 1 else names_in
            # LLaVA marks the place of an only image in the first question.
            if not count_marks(record.turns):
                turns[0]["value"] = "<image>\n" + turns[0]["value"]
        items.append(item)
    write_atomic(path, json.dumps(items))


def _name_in(image: Path | Member | Clip, images: Path) -> str:
    if isinstance(image, Clip):
        return _name_in(image.file, images)
    if isinstance(image, Member) and image.archive.path == images:
        return image.name
    if isinstance(image, Path) and image.is_relative_to(images):
        return image.relative_to(images).as_posix()
    raise ValueError(f"{image} is not in {images}, which image names must be relative to")


def _index(file: _AnnotationFile, file_number: int, members: list[int]) -> tuple[np.ndarray, list[str]]:
    """Read all records of a file, and append the images of a shard to `members`.

    Returns:
        Rows of `Records.table`, (records, 6), for the valid ones; location and error of each broken one.
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
            turns, names, is_video = _parse(entry.value)
            if file.is_shard:
                if is_video:
                    raise ValueError("it names a video, but shards have images only")
                n_images = len(entry.images)
                # In a shard a name says nothing but that there is an image.
                if names and len(names) != n_images:
                    raise ValueError(f"it names {_listed(names)}, but the shard has {n_images or 'no'} images for it")
            else:
                n_images = len(names)
                # A lookup in the listing; the image itself is decoded when its sample is prepared.
                for name in names:
                    if name not in file.images:
                        raise ValueError(file.images.missing(name))
            mark_images(turns, n_images)
            if not n_images:
                _check_no_image(entry.value)
        except ValueError as e:
            broken.append(f"{_location(file, entry.number)}: {e}")
        else:
            rows.append((file_number, entry.start, entry.size, entry.number, n_images, len(members)))
            members += entry.images
    return np.array(rows, dtype=np.int64).reshape(-1, 6), broken


def _location(file: _AnnotationFile, number: int) -> str:
    if file.is_shard:
        assert isinstance(file.images, TarImages)
        return f"{file.path}, {file.images.name(number)}" if number >= 0 else str(file.path)
    return f"{file.path}, {'line' if file.path.suffix == '.jsonl' else 'record'} {number}"


def _parse(item: object) -> tuple[tuple[Turn, ...], list[str], bool]:
    """Parse a record into its turns, the names of its images or videos, and whether they are videos.

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
    image, images, video = (_names(key, item.get(key)) for key in ("image", "images", "video"))
    if image and images and image != images:
        raise ValueError(f"`image` and `images` differ: {_listed(image)} and {_listed(images)}")
    if video and (image or images):
        raise ValueError("it has images and a video, whose order is unknown; a record has one kind alone")
    return tuple(turns), video or image or images, bool(video)


def _names(key: str, value: object) -> list[str]:
    if value is None:
        return []
    names: list[str] = []
    for name in value if isinstance(value, list) else [value]:
        if not isinstance(name, str) or not name:
            raise ValueError(f"`{key}` must be a name or a list of names, got {reprlib.repr(name)}")
        names.append(name)
    return names


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(reprlib.repr, names))


def _check_no_image(item: Mapping[str, Any]) -> None:
    """Check that no other key of a record without an image holds one, so that none is trained on without its image.

    Raises:
        ValueError: one does.
    """
    # Other keys that hold an image, such as img or image_path: by their name, or by a value that is an image's name.
    for key, value in item.items():
        texts = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]
        names_one = bool(value) and isinstance(value, str | list | dict) and _IMAGE_KEY.search(key)
        if key not in ("id", "conversations") and (names_one or any(map(is_image, texts))):
            raise ValueError(f"it has `{key}`: {reprlib.repr(value)}, but only `image` is read as an image")


_IMAGE_KEY = re.compile("image|img|picture|photo", re.IGNORECASE)

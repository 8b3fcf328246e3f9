"""Conversations about images, and the LLaVA format that they come in."""

from __future__ import annotations

import codecs
import json
import logging
import mimetypes
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from PIL import Image
from torch import Tensor

from ..model.batch import Sample
from ..model.files import write_whole
from ..model.image import is_image
from ..model.limits import MAX_RECORD_BYTES
from ..model.prompt import IGNORE, Turn, check_turns, cleaned
from ..model.text_files import check_characters, parse_json, skip_byte_order_mark
from ..model.vlm import VLM
from .errors import BrokenDataError, ChangedDataError
from .sources import FolderImages, Images, Member, TarImages, open_picture, open_source, stamp

logger = logging.getLogger("vlmamba.train")
CHUNK = 8 << 20
"""Characters of a JSON file that are held at once; more where one record is longer."""


_ROLES: dict[str, Literal["user", "assistant"]] = {"human": "user", "gpt": "assistant"}
"""Of turns, by LLaVA's names."""


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
        ChangedDataError: on access: a file of data is not the one that was read at the start.
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
        except ChangedDataError:
            raise
        except FileNotFoundError as e:
            raise FileNotFoundError(f"{where}: {e}") from e
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from e

    def _sample(self, record: Record) -> Sample:
        n_image_tokens = 0 if record.image is None else self.image_tokens
        ids, labels = self.template.encode(self.tokenizer, self._within_reach(record.turns), n_image_tokens)
        if self.max_tokens is not None:
            ids, labels = (tokens[: n_image_tokens + self.max_tokens] for tokens in (ids, labels))
        if all(label == IGNORE for label in labels[1:]):
            raise ValueError(f"no learned token lies within max_tokens = {self.max_tokens}")
        return Sample(ids, labels, () if record.image is None else self._images(record.image))

    def _within_reach(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """Turns without the text that lies beyond `max_tokens` however it is tokenised, so that it need not be."""
        if self.max_tokens is None:
            return turns
        left, kept = self.max_tokens * self.tokenizer.longest_token, []
        for i, turn in enumerate(turns):
            text = cleaned(turn.text)[:left]
            kept.append(Turn(turn.role, text))
            is_answer = turn.role == "assistant"
            left -= len(self.template.answer(text) if is_answer else self.template.user(text, i == 0))
            if left <= 0:
                break
        return kept

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
        path, images, is_shard, stamp_then = self._files[number]
        try:
            file = open(path, "rb")
        except FileNotFoundError as e:
            raise ChangedDataError(f"{path} is not there any more") from e
        with file:
            if stamp(file) != stamp_then:
                raise ChangedDataError(f"{path} has changed since it was read")
            file.seek(begin)
            item = parse_json(file.read(size))
        turns, name = _parts(item)
        if image < 0:
            return Record(turns)
        return Record(turns, images[image if is_shard else name])

    def where(self, index: int) -> str:
        """The file and the place in it of a record."""
        file, _, _, number, _ = self._table[index].tolist()
        return _where(self._files[file], number)

    @property
    def n_with_image(self) -> int:
        """Count of the records that have an image."""
        return int((self._table[:, 4] >= 0).sum())

    def __str__(self) -> str:
        left_out = f"; {len(self.broken):,} more are broken and left out" if self.broken else ""
        return f"{len(self):,} records, {self.n_with_image:,} of them with an image{left_out}"

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
    one image, or a list of one name; `images` means the same. They lie in a JSON list, one a line (`.jsonl`), or in
    shards as WebDataset writes them: a `.tar`, a folder of them, or a pattern such as `shard-{000..012}.tar`, where
    `KEY.json` is a record and `KEY.jpg` (or another image ending) is its image. Whether the images are there is told
    by the names that their source lists, not by a request for each.

    Args:
        paths: one file, folder or pattern, or several, whose records follow each other.
        images: the folder, `.zip` or `.tar` that `image` names come from, one for all paths or one for each; by
            default the path's own folder. Shards have their own images.
        max_broken: share of the records that may be left out with a warning. They are malformed, larger than
            `MAX_RECORD_BYTES`, have several images, or speak of one that is missing: by its name, by `<image>` in a
            question, or under another key.

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
            with open(file, "rb") as opened_file:
                stamp_now = stamp(opened_file)
            files.append(_File(file, contents, bool(shards), stamp_now))
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


def write_llava(records: Sequence[Record], path: str | Path, images: str | Path) -> None:
    """Write records in LLaVA's format, to be read with the same `images`.

    Args:
        images: the folder or archive that image names are relative to.

    Raises:
        ValueError: an image lies elsewhere.
    """
    names = {role: name for name, role in _ROLES.items()}
    items = []
    for i, record in enumerate(records):
        turns = [{"from": names[t.role], "value": t.text} for t in record.turns]
        item: dict[str, Any] = {"id": str(i), "conversations": turns}
        if record.image is not None:
            item["image"] = _name_in(record.image, Path(images))
            if not _mentions_image(record.turns):
                turns[0]["value"] = "<image>\n" + turns[0]["value"]
        items.append(item)
    write_whole(path, json.dumps(items))


def _name_in(image: Path | Member, images: Path) -> str:
    if isinstance(image, Member) and image.archive.path == images:
        return image.name
    if isinstance(image, Path) and image.is_relative_to(images):
        return image.relative_to(images).as_posix()
    raise ValueError(f"{image} does not lie in {images}, which the names of images must be relative to")


def _read(file: _File, file_number: int) -> tuple[np.ndarray, list[str]]:
    """Places of the records of a file that are whole; and what is wrong with the others."""
    if isinstance(file.images, TarImages) and file.is_shard:
        items = _shard_items(file.images)
    else:
        items = _line_items(file.path) if file.path.suffix == ".jsonl" else _list_items(file.path)
    rows, broken = [], []
    for item in items:
        try:
            if isinstance(item.value, Exception):
                raise item.value
            turns, name = _parts(item.value)
            image = item.image
            if not file.is_shard and name is not None:
                if name not in file.images:
                    raise ValueError(file.images.missing(name))
                image = 0
            if image < 0:
                _check_no_image(item.value, turns, name)
        except ValueError as e:
            broken.append(f"{_where(file, item.number)}: {e}")
        else:
            rows.append((file_number, item.begin, item.size, item.number, image))
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
    """Number of its image in the shard; -1 where there is none."""


def _where(file: _File, number: int) -> str:
    if file.is_shard:
        return f"{file.path}, {file.images.name(number)}" if number >= 0 else str(file.path)
    return f"{file.path}, {'line' if file.path.suffix == '.jsonl' else 'record'} {number}"


def _parts(item: object) -> tuple[tuple[Turn, ...], str | None]:
    """Turns and the image's name of a record.

    Raises:
        ValueError: it is malformed.
    """
    if not isinstance(item, dict) or not isinstance(item.get("conversations"), list):
        raise ValueError("a record must be an object with a list `conversations`")
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
        raise ValueError(f"`{key}` must be one name, got {len(value)}: several images in a conversation cannot be read")
    name = value[0] if isinstance(value, list) and value else value
    if name is None or name == []:
        return None
    if not isinstance(name, str) or not name:
        raise ValueError(f"`{key}` must be one name, got {reprlib.repr(name)}")
    return name


def _check_no_image(item: Mapping[str, Any], turns: Sequence[Turn], name: str | None) -> None:
    """Hold a record without an image against what it says, so that none is trained on without its image.

    Raises:
        ValueError: it speaks of an image.
    """
    if name is not None:
        raise ValueError(f"it names the image {name}, but the shard has none for it")
    if _mentions_image(turns):
        raise ValueError("a question has <image>, but the record names no image")
    for key, value in item.items():
        texts = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]
        names_one = bool(value) and isinstance(value, str | list | dict) and _IMAGE_KEY.search(key)
        if key not in ("id", "conversations") and (names_one or any(map(is_image, texts))):
            raise ValueError(f"it has `{key}`: {reprlib.repr(value)}, but an image is read from `image` alone")


_IMAGE_KEY = re.compile("image|img|picture|photo", re.IGNORECASE)


def _mentions_image(turns: Sequence[Turn]) -> bool:
    return any(turn.role == "user" and "<image>" in turn.text for turn in turns)


def _line_items(path: Path) -> Iterator[_Item]:
    begin = number = 0
    with open(path, "rb") as file:
        skip_byte_order_mark(file, path)
        begin = file.tell()
        while line := file.readline(MAX_RECORD_BYTES + 1):
            number, size = number + 1, len(line)
            if line.strip():
                value: Any = None
                try:
                    if size > MAX_RECORD_BYTES:
                        raise ValueError(_TOO_LARGE)
                    value = parse_json(line)
                except ValueError as e:
                    value = ValueError(f"not valid JSON: {e}") if size <= MAX_RECORD_BYTES else e
                while not line.endswith(b"\n") and (line := file.readline(MAX_RECORD_BYTES)):
                    size += len(line)  # the rest of one that is too large
                yield _Item(begin, size, number, value)
            begin += size


_TOO_LARGE = f"it is larger than {MAX_RECORD_BYTES:,} bytes"


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
        skip_byte_order_mark(file, path)
        self.decoder = json.JSONDecoder()
        # A byte that is not UTF-8 becomes half a surrogate pair, and so a fault of the record that it lies in.
        self.utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at, self.byte, self.ended = "", 0, file.tell(), False

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
        """Go past the value that comes next, and give it; or, where it alone is what is wrong, the error in it."""
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
                if len(self.text) - self.at > MAX_RECORD_BYTES:
                    return self._skip_value(number, ValueError(_TOO_LARGE))
                self._more()
            except RecursionError:
                return self._skip_value(number, ValueError("not valid JSON: it is nested too deeply"))
            except ValueError as e:  # a number of too many digits
                return self._skip_value(number, ValueError(f"not valid JSON: {e}"))
            else:
                if end == len(self.text) and not self.ended:
                    self._more()  # a number may go on
                    continue
                taken = self.text[self.at : end]
                self._go_to(end)
                if len(taken) > MAX_RECORD_BYTES:
                    return ValueError(_TOO_LARGE)
                try:
                    check_characters(taken, value)
                except ValueError as e:
                    return ValueError(f"not valid JSON: {e}")
                return value

    def _skip_value(self, number: int, error: ValueError) -> ValueError:
        """Go past a value that is not decoded, by its brackets and quotes."""
        depth, in_string, escaped = 0, False, False
        while True:
            found = (_ANY if escaped else _IN_STRING if in_string else _OUTSIDE).search(self.text, self.at)
            if not found:
                self._go_to(len(self.text))
                if self.ended:
                    raise self.error(number, "is cut short")
                self._more()
                continue
            mark = found[0]
            if not in_string and not depth and mark in ",]}":  # what follows a number
                self._go_to(found.start())
                return error
            self._go_to(found.end())
            if escaped:
                escaped = False
            elif mark == "\\":
                escaped = True
            elif mark == '"':
                in_string = not in_string
            else:
                depth += 1 if mark in "[{" else -1 if mark in "]}" else 0
            if not depth and not in_string and mark != ",":
                return error

    def _go_to(self, end: int) -> None:
        taken = self.text[self.at : end]
        self.byte += len(taken) if taken.isascii() else len(taken.encode("utf-8", "surrogateescape"))
        self.at = end

    def error(self, number: int, what: str) -> ValueError:
        return ValueError(f"{self.path} {what} (record {number}, after byte {self.byte:,})")

    def _more(self) -> None:
        rest = self.text[self.at :]
        chunk = self.file.read(max(CHUNK, len(rest)))
        self.ended = not chunk
        self.text, self.at = rest + self.utf8.decode(chunk, final=self.ended), 0


_SPACE = re.compile(r"[ \t\n\r]*")
_OUTSIDE, _IN_STRING, _ANY = re.compile(r'["\[\]{},]'), re.compile(r'["\\]'), re.compile(r"(?s:.)")


def _shard_items(shard: TarImages) -> Iterator[_Item]:
    """Records of a shard: files whose names are equal up to the first dot belong together."""
    samples: dict[str, list[str]] = {}
    for name in [*shard.names, *shard.problems]:
        folder, base = os.path.split(name)
        if _is_record(base) or is_image(base) or _is_image_of_another_format(base):
            samples.setdefault(os.path.join(folder, base.partition(".")[0]), []).append(name)
    for parts in samples.values():
        records = [name for name in parts if _is_record(os.path.basename(name))]
        images = [name for name in parts if is_image(name)]
        number = next((shard.names[name] for name in [*records, *parts] if name in shard.names), -1)
        try:
            for name in parts:
                if name in shard.problems:
                    raise ValueError(f"{name} is {shard.problems[name]}")
            if not records:
                raise ValueError(f"an image without a .json beside it: {parts[0]}")
            for some in (records, images):
                if len(some) > 1:
                    raise ValueError(f"it has several {'images' if some is images else 'records'}: {', '.join(some)}")
            if not images and len(parts) > 1:
                raise ValueError(f"its image is in a format that is not read: {parts[-1]}")
            begin, size = shard.spans[number].tolist()
            if size > MAX_RECORD_BYTES:
                raise ValueError(_TOO_LARGE)
            try:
                value = parse_json(shard.read(number))
            except ValueError as e:
                raise ValueError(f"not valid JSON: {e}") from e
        except ChangedDataError:
            raise
        except ValueError as e:
            yield _Item(0, 0, number, e)
        else:
            yield _Item(begin, size, number, value, shard.names[images[0]] if images else -1)


def _is_record(base: str) -> bool:
    return base.partition(".")[2].lower() == "json"


def _is_image_of_another_format(name: str) -> bool:
    kind = mimetypes.guess_type(name)[0] or ""
    ending = os.path.splitext(name)[1].lower()
    return not is_image(name) and (kind.startswith("image/") or ending in Image.registered_extensions())


def _shards(path: Path) -> list[Path]:
    """The shards that a path stands for; none where it is a file of another kind."""
    pattern = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", str(path))
    if pattern:
        before, first, last, after = pattern.groups()
        return [Path(f"{before}{i:0{len(first)}d}{after}") for i in range(int(first), int(last) + 1)]
    if path.is_dir():
        found = sorted(p for p in path.glob("*.tar") if not p.name.startswith("._"))  # the latter macOS leaves
        if not found:
            raise FileNotFoundError(f"no .tar in {path}")
        return found
    return [path] if path.suffix == ".tar" else []

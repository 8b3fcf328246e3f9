"""Shards as WebDataset writes them: tars in which the files of one sample share their name up to the first dot."""

from __future__ import annotations

import mimetypes
import os
import re
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ..model.image import is_image
from ..model.limits import MAX_RECORD_BYTES
from ..model.text_files import parse_json
from .errors import ChangedDataError
from .json_records import TOO_LARGE, Entry
from .sources import TarImages


def shard_entries(shard: TarImages) -> Iterator[Entry]:
    """Yield the records of a shard. An error that concerns one record is its entry's value."""
    # a/000.json and a/000.jpg are a sample, keyed a/000; 000.seg.json has the extension seg.json and is no record.
    samples: dict[str, list[str]] = {}
    for name in [*shard.names, *shard.problems]:
        folder, base = os.path.split(name)
        if _is_record(base) or is_image(base) or _is_image_of_another_format(base):
            samples.setdefault(os.path.join(folder, base.partition(".")[0]), []).append(name)
    for parts in samples.values():
        records = [name for name in parts if _is_record(os.path.basename(name))]
        images = [name for name in parts if is_image(name)]
        # Number of the file to report an error with: the record if there is one.
        number = next((shard.names[name] for name in [*records, *parts] if name in shard.names), -1)
        # Exactly one record and any number of images, all of them readable.
        try:
            for name in parts:
                if name in shard.problems:
                    raise ValueError(f"{name} is {shard.problems[name]}")
            if not records:
                raise ValueError(f"an image without a .json beside it: {parts[0]}")
            if len(records) > 1:
                raise ValueError(f"it has several records: {', '.join(records)}")
            numbers = set(map(_image_number, images))
            if len(images) > 1 and (len(numbers) < len(images) or () in numbers):
                raise ValueError(
                    f"it has several images, which must be numbered as KEY.0.jpg and KEY.1.jpg: {', '.join(images)}"
                )
            if not images and len(parts) > 1:
                raise ValueError(f"its image has an unsupported format: {parts[-1]}")
            start, size = shard.spans[number].tolist()
            if size > MAX_RECORD_BYTES:
                raise ValueError(TOO_LARGE)
            try:
                value = parse_json(shard.read(number))
            except ValueError as e:
                raise ValueError(f"not valid JSON: {e}") from e
        except ChangedDataError:
            raise
        except ValueError as e:
            yield Entry(0, 0, number, e)
        else:
            yield Entry(start, size, number, value, tuple(shard.names[n] for n in sorted(images, key=_image_number)))


def _image_number(name: str) -> tuple[int, ...]:
    """Number of an image among those of a record: 1 for KEY.1.jpg, as a sort key; empty where it has none."""
    number = os.path.basename(name).partition(".")[2].partition(".")[0]
    return (int(number),) if number.isdecimal() else ()


def _is_record(base: str) -> bool:
    return base.partition(".")[2].lower() == "json"


def _is_image_of_another_format(name: str) -> bool:
    kind = mimetypes.guess_type(name)[0] or ""
    ending = os.path.splitext(name)[1].lower()
    return not is_image(name) and (kind.startswith("image/") or ending in Image.registered_extensions())


def shard_paths(path: Path) -> list[Path]:
    """List the shards of a `.tar`, a folder of them, or a pattern such as `shard-{000..012}.tar`.

    Returns:
        Their paths in order; none where the path is a file of another kind.

    Raises:
        FileNotFoundError: the folder has no `.tar`.
    """
    # Zero padding is that of the first number, as in a shell.
    pattern = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", str(path))
    if pattern:
        before, first, last, after = pattern.groups()
        return [Path(f"{before}{i:0{len(first)}d}{after}") for i in range(int(first), int(last) + 1)]
    if path.is_dir():
        found = sorted(p for p in path.glob("*.tar") if not p.name.startswith("._"))  # macOS leaves `._*`
        if not found:
            raise FileNotFoundError(f"no .tar in {path}")
        return found
    return [path] if path.suffix == ".tar" else []

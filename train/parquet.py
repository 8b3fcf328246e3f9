"""Tables of parquet files with images in a column, as the Hub has datasets (`SPLIT-00000-of-00004.parquet`)."""

from __future__ import annotations

import bisect
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .errors import BrokenDataError
from .sources import Member


class ParquetTable:
    """The rows of a split's files, in the order of their names. The images are read when they are wanted.

    A row's image is a structure with `bytes`. Reading one reads its row group, of which the last is kept: rows in
    their order are read once.

    Args:
        folder: has the files.
        split: start of their names.
        image: name of the column of images.

    Raises:
        ModuleNotFoundError: `pyarrow` is not installed.
        FileNotFoundError: there is no file of that split; those of others are named.
        BrokenDataError: a file of the split is missing or damaged.
    """

    def __init__(self, folder: Path, split: str, image: str = "image"):
        parquet = _pyarrow_parquet()
        self.path, self.image = folder, image
        names = sorted(p.name for p in folder.glob("*.parquet"))
        files = [name for name in names if re.fullmatch(rf"{re.escape(split)}(-\d+-of-\d+)?\.parquet", name)]
        if not files:
            raise FileNotFoundError(
                f"{folder} has no parquet file {split}-*.parquet, but {', '.join(names) or 'no parquet file'}"
            )
        # A figure of a part of a split could not be compared.
        part = re.search(r"-of-(\d+)\.", files[0])
        if part is not None and len(files) != int(part[1]):
            raise BrokenDataError(f"{folder} has {len(files)} of the {int(part[1])} files of split {split!r}")
        self.files: list[Any] = []
        self.groups: list[tuple[int, int, int]] = []
        """First row, file and number of each row group."""
        n_rows = 0
        for name in files:
            try:
                self.files.append(parquet.ParquetFile(folder / name))
            except (OSError, ValueError) as e:
                raise BrokenDataError(f"{folder / name} is damaged, or no parquet file: {e}") from e
            # Row groups are what a file can be read by.
            metadata = self.files[-1].metadata
            for group in range(metadata.num_row_groups):
                self.groups.append((n_rows, len(self.files) - 1, group))
                n_rows += metadata.row_group(group).num_rows
        self._group = -1
        self._images: list[Any] = []

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[Member, dict[str, Any]]]:
        """Yield the image of each row, and its values in other columns.

        Args:
            columns: names of the other columns.

        Raises:
            BrokenDataError: the files lack a column, or are damaged.
        """
        for first, file, number in self.groups:
            # The folder may hold another data set.
            has = self.files[file].schema_arrow.names
            if missing := [name for name in (self.image, *columns) if name not in has]:
                raise BrokenDataError(f"{self.path} has no columns {', '.join(missing)}, but {', '.join(has)}")
            table = self._read(file, number, columns)
            for i, values in enumerate(table.to_pylist()):
                # Sorted by name, rows are in their order.
                yield Member(self, f"row {first + i:09}", first + i), values

    def read(self, number: int) -> bytes:
        """Return the bytes of a row's image.

        Raises:
            BrokenDataError: the row has none.
        """
        # The last group that does not start after the row.
        at = bisect.bisect_right(self.groups, number, key=lambda group: group[0]) - 1
        first, file, group = self.groups[at]
        if self._group != at:
            # Only the images, which are most of the file.
            self._images = self._read(file, group, [self.image]).column(0).to_pylist()
            self._group = at
        value = self._images[number - first]
        data = value.get("bytes") if isinstance(value, dict) else None
        if not isinstance(data, bytes):
            raise BrokenDataError(f"row {number} of {self.path}: `{self.image}` must be a structure with `bytes`")
        return data

    def _read(self, file: int, group: int, columns: Sequence[str]) -> Any:
        try:
            return self.files[file].read_row_group(group, columns=list(columns))
        except (OSError, ValueError) as e:
            raise BrokenDataError(f"row group {group} of file {file} in {self.path} is damaged: {e}") from e


def image_size(member: Member) -> tuple[int, int]:
    """Return the width and height of an image, from its header.

    Raises:
        BrokenDataError: it is no image.
    """
    try:
        # Opening reads the header alone.
        with Image.open(io.BytesIO(member.read())) as image:
            return image.size
    except OSError as e:
        raise BrokenDataError(f"{member} is no image: {e}") from e


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as e:
        raise ModuleNotFoundError(f"reading parquet files needs the pyarrow package: pip install pyarrow ({e})") from e
    return pyarrow.parquet

"""Where images lie: a folder, or an archive that is indexed once and then read at any place.

A source answers two questions: is there an image of this name (`name in source`), and how to open it
(`source[name]`, a path or a `Member`). Every read of an archive opens it anew, so that threads, forked and spawned
processes share one without a lock.
"""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from ..model.image import decode_image, open_image


class Images(Protocol):
    """Images by name."""

    path: Path

    def __contains__(self, name: str) -> bool: ...

    def __getitem__(self, name: str) -> Path | Member:
        """What `open_picture` opens."""
        ...


class Archive(Protocol):
    """A file of files."""

    path: Path

    def read(self, number: int) -> bytes:
        """The content of a file."""
        ...


@dataclass(frozen=True)
class Member:
    """A file in an archive."""

    archive: Archive
    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.name} in {self.archive.path}"

    def __lt__(self, other: Member) -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash((self.archive.path, self.number))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Member) and (self.archive.path, self.number) == (other.archive.path, other.number)

    def read(self) -> bytes:
        return self.archive.read(self.number)


def open_picture(image: Path | Member) -> Image.Image:
    """An image of a source as RGB.

    Raises:
        FileNotFoundError, ValueError: it is not there, or damaged; it is named.
    """
    if isinstance(image, Path):
        return open_image(image)
    return decode_image(io.BytesIO(image.read()), str(image))


def open_source(path: str | Path) -> Images:
    """The images of a folder, a `.zip` or a `.tar`.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is neither, or the archive is damaged.
    """
    path = Path(path)
    if path.is_dir():
        return FolderImages(path)
    if not path.exists():
        raise FileNotFoundError(f"no image folder or archive at {path}")
    if path.suffix == ".zip":
        return ZipImages(path)
    if path.suffix == ".tar":
        return TarImages(path)
    raise ValueError(
        f"images must be a folder, a .zip or a .tar, got {path}. A compressed tar has to be unpacked: it cannot be "
        "read from the middle"
    )


class FolderImages:
    """Images under a folder.

    Whether they are there is told by listing each folder that is asked about, once: on a remote disk a request a
    folder, not one an image.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._listed: dict[str, frozenset[str]] = {}

    def __contains__(self, name: str) -> bool:
        folder, _, base = name.rpartition("/")
        if folder not in self._listed:
            try:
                self._listed[folder] = frozenset(os.listdir(self.path / folder))
            except (FileNotFoundError, NotADirectoryError):
                self._listed[folder] = frozenset()
        return base in self._listed[folder]

    def __getitem__(self, name: str) -> Path:
        return self.path / name

    def forget(self) -> None:
        """Give back the memory of the lists."""
        self._listed.clear()


class _Indexed:
    """Names of an archive's files and where they lie."""

    path: Path
    names: dict[str, int]
    _ordered: dict[int, str] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str | int) -> Member:
        """A file by its name, or by its number in the archive."""
        if isinstance(name, int):
            return Member(self, self.name(name), name)
        if name not in self.names:
            raise FileNotFoundError(f"no image {name} in {self.path}")
        return Member(self, name, self.names[name])

    def name(self, number: int) -> str:
        """The name of a file by its number."""
        if self._ordered is None:
            self._ordered = {n: name for name, n in self.names.items()}
        return self._ordered[number]

    def _bytes(self, begin: int, size: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(begin)
            data = file.read(size)
        if len(data) != size:
            raise ValueError(f"{self.path} is cut short: {size} bytes at {begin} are not all there")
        return data


class TarImages(_Indexed):
    """Files of an uncompressed tar. A name that comes twice is the last of that name, as in unpacking."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.names = {}
        spans = []
        try:
            with tarfile.open(self.path, "r:") as tar:
                for entry in tar:
                    if entry.isfile():
                        self.names[entry.name.removeprefix("./")] = len(spans)
                        spans.append((entry.offset_data, entry.size))
                    tar.members = []  # which would grow by a kilobyte a file
        except (tarfile.TarError, EOFError) as e:
            raise ValueError(f"{self.path} is damaged or cut short, or not an uncompressed tar: {e}") from e
        self.spans = np.array(spans, dtype=np.int64).reshape(-1, 2)

    def read(self, number: int) -> bytes:
        return self._bytes(*self.spans[number].tolist())


class ZipImages(_Indexed):
    """Files of a zip, stored or deflated."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.names = {}
        entries = []
        try:
            with zipfile.ZipFile(self.path) as archive:
                for entry in archive.infolist():
                    if entry.is_dir():
                        continue
                    if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                        raise ValueError(f"{entry.filename} in {self.path} is encrypted or not stored nor deflated")
                    self.names[entry.filename.removeprefix("./")] = len(entries)
                    entries.append((entry.header_offset, entry.compress_size, entry.compress_type, entry.CRC))
        except zipfile.BadZipFile as e:
            raise ValueError(f"{self.path} is damaged or cut short, or not a zip: {e}") from e
        self.entries = np.array(entries, dtype=np.int64).reshape(-1, 4)

    def read(self, number: int) -> bytes:
        begin, size, method, checksum = self.entries[number].tolist()
        # The local header is 30 bytes, a name and extra fields; these may differ from those of the directory.
        name, extra = struct.unpack("<26x2H", self._bytes(begin, 30))
        data = self._bytes(begin + 30 + name + extra, size)
        try:
            data = zlib.decompress(data, -zlib.MAX_WBITS) if method == zipfile.ZIP_DEFLATED else data
        except zlib.error as e:
            raise ValueError(f"{self.name(number)} in {self.path} is damaged: {e}") from e
        if zlib.crc32(data) != checksum:
            raise ValueError(f"{self.name(number)} in {self.path} is damaged: its checksum is wrong")
        return data

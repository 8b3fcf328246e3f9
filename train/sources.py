"""Where images lie: a folder, or an archive that is indexed once and then read at any place.

A source answers two questions: is there an image of this name (`name in source`), and how to open it
(`source[name]`, a path or a `Member`). Every read of an archive opens it anew, so that threads, forked and spawned
processes share one without a lock.
"""

from __future__ import annotations

import abc
import io
import os
import posixpath
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image

from ..model.image import decode_image, open_image
from ..model.limits import MAX_FILE_BYTES
from .errors import ChangedDataError
from .tar_index import TarError, tar_entries


class Images(Protocol):
    """Images by name."""

    path: Path

    def __contains__(self, name: str) -> bool: ...

    def missing(self, name: str) -> str:
        """Say why there is no image of that name."""
        ...

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
            except OSError:  # no such folder; or a name that none can have
                self._listed[folder] = frozenset()
        return base in self._listed[folder]

    def missing(self, name: str) -> str:
        return f"no image {name} in {self.path}"

    def __getitem__(self, name: str) -> Path:
        return self.path / name

    def forget(self) -> None:
        """Give back the memory of the lists."""
        self._listed.clear()


class _Indexed(abc.ABC):
    """Names of an archive's files and where they lie. Names are normalised: `./a//b.png` is `a/b.png`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.names: dict[str, int] = {}
        self.problems: dict[str, str] = {}
        """Files that are in the archive but cannot be read, and why."""
        self._ordered: dict[int, str] | None = None
        with open(self.path, "rb") as file:
            self._stamp = stamp(file)
            self._index(file)

    @abc.abstractmethod
    def _index(self, file: BinaryIO) -> None: ...

    @abc.abstractmethod
    def read(self, number: int) -> bytes: ...

    def __contains__(self, name: str) -> bool:
        return _normalised(name) in self.names

    def missing(self, name: str) -> str:
        """Say why there is no file of that name."""
        problem = self.problems.get(_normalised(name))
        return f"no image {name} in {self.path}" + (f": it is {problem}" if problem else "")

    def __getitem__(self, name: str | int) -> Member:
        """A file by its name, or by its number in the archive."""
        if isinstance(name, int):
            return Member(self, self.name(name), name)
        if name not in self:
            raise FileNotFoundError(self.missing(name))
        return Member(self, name, self.names[_normalised(name)])

    def name(self, number: int) -> str:
        """The name of a file by its number."""
        if self._ordered is None:
            self._ordered = {n: name for name, n in self.names.items()}
        return self._ordered[number]

    def _add(self, name: str, number: int, size: int) -> bool:
        """Note a file, in place of one of the same name that came before; whether it can be read."""
        if size > MAX_FILE_BYTES:
            self._add_problem(name, f"too large: {size:,} bytes, where {MAX_FILE_BYTES:,} are the most")
            return False
        self.problems.pop(name, None)
        self.names[name] = number
        return True

    def _add_problem(self, name: str, problem: str) -> None:
        self.names.pop(name, None)
        self.problems[name] = problem

    def _bytes(self, begin: int, size: int) -> bytes:
        try:
            file = open(self.path, "rb")
        except FileNotFoundError as e:
            raise ChangedDataError(f"{self.path} is not there any more") from e
        with file:
            if stamp(file) != self._stamp:
                raise ChangedDataError(f"{self.path} has changed since it was read")
            file.seek(begin)
            data = file.read(size)
        if len(data) != size:
            raise ValueError(f"{self.path} is cut short: {size} bytes at {begin} are not all there")
        return data


class TarImages(_Indexed):
    """Files of an uncompressed tar. A name that comes twice is the last of that name, as in unpacking.

    Links are followed within the archive: a hard link to the file of its target's name that came before it, a symbolic
    link to the one that is there in the end.
    """

    def _index(self, file: BinaryIO) -> None:
        spans: list[tuple[int, int]] = []
        symlinks: dict[str, str] = {}
        try:
            for entry in tar_entries(file):
                name = _normalised(entry.name)
                if _is_litter(name):
                    continue
                symlinks.pop(name, None)
                if entry.kind == "symlink":
                    self._add_problem(name, f"a link to {entry.target}, which is not in the archive")
                    if not entry.target.startswith("/"):
                        symlinks[name] = _normalised(posixpath.join(posixpath.dirname(name), entry.target))
                    continue
                target = _normalised(entry.target)
                if entry.kind == "file":
                    span = (entry.begin, entry.size)
                elif target in self.names:
                    span = spans[self.names[target]]
                else:
                    self._add_problem(name, f"a link to {entry.target}, which does not come before it in the archive")
                    if target in symlinks:
                        symlinks[name] = symlinks[target]
                    continue
                if self._add(name, len(spans), span[1]):
                    spans.append(span)
        except TarError as e:
            raise ValueError(f"{self.path} is damaged or cut short, or not an uncompressed tar: {e}") from e
        if not self.names and not self.problems:
            raise ValueError(f"{self.path} is damaged or cut short: it is a tar without a file")
        for name in symlinks:
            target, passed = name, set()
            while target in symlinks and target not in passed:
                passed.add(target)
                target = symlinks[target]
            if target in self.names:
                span = spans[self.names[target]]
                if self._add(name, len(spans), span[1]):
                    spans.append(span)
        self.spans = np.array(spans, dtype=np.int64).reshape(-1, 2)
        """Offset and size of each file, in bytes."""

    def read(self, number: int) -> bytes:
        return self._bytes(*self.spans[number].tolist())


class ZipImages(_Indexed):
    """Files of a zip, stored or deflated. A name that comes twice is the last of that name."""

    def _index(self, file: BinaryIO) -> None:
        entries = []
        try:
            with zipfile.ZipFile(file) as archive:
                listed = archive.infolist()
            n_files = _entries_of_zip(file)
        except MemoryError:
            raise
        except Exception as e:  # zipfile raises many kinds for a damaged directory
            raise ValueError(f"{self.path} is damaged or cut short, or not a zip: {e}") from e
        if n_files != len(listed):
            raise ValueError(
                f"{self.path} is damaged or cut short: its directory has {len(listed):,} of {n_files:,} files"
            )
        total = self._stamp[0]
        for entry in listed:
            name = _normalised(entry.filename)
            if entry.is_dir() or _is_litter(name):
                continue
            if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                self._add_problem(name, "encrypted, or neither stored nor deflated")
            elif not 0 <= entry.header_offset <= total - entry.compress_size:
                self._add_problem(name, "damaged: by the directory it lies outside of the archive")
            elif self._add(name, len(entries), max(entry.file_size, entry.compress_size)):
                written = entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437", "replace")
                sizes = entry.compress_size, entry.file_size
                entries.append((entry.header_offset, *sizes, entry.compress_type, entry.CRC, zlib.crc32(written)))
        self.entries = np.array(entries, dtype=np.int64).reshape(-1, 6)
        """Of each file: offset, sizes in the archive and inflated, method, checksums of its content and its name."""

    def read(self, number: int) -> bytes:
        begin, size, whole, method, checksum, name_checksum = self.entries[number].tolist()
        # The local header is 30 bytes, a name and extra fields; these may differ from those of the directory.
        mark, name_size, extra = struct.unpack("<4s22x2H", self._bytes(begin, 30))
        if mark != b"PK\3\4" or zlib.crc32(self._bytes(begin + 30, name_size)) != name_checksum:
            raise self._damaged(number, "its header is not where the directory says")
        data = self._bytes(begin + 30 + name_size + extra, size)
        if method == zipfile.ZIP_DEFLATED:
            inflater = zlib.decompressobj(-zlib.MAX_WBITS)
            try:
                data = inflater.decompress(data, whole + 1)  # a byte more shows that it is longer than it says
            except zlib.error as e:
                raise self._damaged(number, str(e)) from e
        if len(data) != whole:
            raise self._damaged(number, f"it has not the {whole:,} bytes that the directory says")
        if zlib.crc32(data) != checksum:
            raise self._damaged(number, "its checksum is wrong")
        return data

    def _damaged(self, number: int, reason: str) -> ValueError:
        return ValueError(f"{self.name(number)} in {self.path} is damaged: {reason}")


def stamp(file: BinaryIO) -> tuple[int, int]:
    """Size and time of the last change of an open file."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _normalised(name: str) -> str:
    return posixpath.normpath(name).lstrip("/")


def _is_litter(name: str) -> bool:
    """Whether a file is what macOS or an old tar leaves behind: `._a.png`, `__MACOSX/`, `PaxHeaders.1/a.png`."""
    *folders, base = name.split("/")
    return base.startswith("._") or any(f == "__MACOSX" or f.startswith("PaxHeader") for f in folders)


def _entries_of_zip(file: BinaryIO) -> int:
    """Count of files by the end of a zip's directory (APPNOTE 4.3.16; 4.3.14 where it is too large for that)."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - (1 << 16) - 22))
    tail = file.read()
    at = tail.rindex(b"PK\5\6")
    (count,) = struct.unpack_from("<H", tail, at + 10)
    if count == 0xFFFF and tail[at - 20 : at - 16] == b"PK\6\7":
        (record,) = struct.unpack_from("<Q", tail, at - 20 + 8)
        file.seek(record)
        mark, count = struct.unpack("<4s28xQ", file.read(40))
        if mark != b"PK\6\6":
            raise ValueError("the end of its zip64 directory is not where it should be")
    return count

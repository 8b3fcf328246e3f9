"""Sources of images: a folder, or an archive that is indexed once and then read at random.

`name in source` tests for an image; `source[name]` is what `read_image` reads, a path or a `Member`. Every read opens
the archive again, so that threads, forked and spawned processes share a source without a lock.
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
from ..model.video import Video
from .errors import ChangedDataError
from .tar_index import TarError, tar_entries


class Images(Protocol):
    """Images by name."""

    path: Path

    def __contains__(self, name: str) -> bool: ...

    def missing(self, name: str) -> str:
        """Explain why there is no image of that name."""
        ...

    def __getitem__(self, name: str) -> Path | Member:
        """Location of an image, for `read_image`."""
        ...


class Archive(Protocol):
    """A tar or zip whose files are numbered."""

    path: Path

    def read(self, number: int) -> bytes:
        """Read a file by its number."""
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


def read_image(image: Path | Member) -> Image.Image:
    """Read an image of a source as RGB.

    Raises:
        FileNotFoundError, ValueError: it does not exist or is damaged; the message names it.
    """
    if isinstance(image, Path):
        return open_image(image)
    return decode_image(io.BytesIO(image.read()), str(image))


@dataclass(frozen=True)
class Clip:
    """A video of a source: a folder of frames, or an animated file."""

    file: Path | Member

    def __str__(self) -> str:
        return str(self.file)


def read_visual(source: Path | Member | Clip) -> Image.Image | Video:
    """Read an image of a source as RGB, or open a video, whose frames are read when they are sampled.

    Raises:
        FileNotFoundError, ValueError: see `read_image`.
    """
    if isinstance(source, Clip):
        return Video(source.file if isinstance(source.file, Path) else source.file.read())
    return read_image(source)


def open_source(path: str | Path) -> Images:
    """Index the images of a folder, a `.zip` or a `.tar`.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: it is none of these, or the archive is damaged.
    """
    path = Path(path)
    if path.is_dir():
        return FolderImages(path)
    if not path.exists():
        raise FileNotFoundError(f"no image folder or archive at {path}")
    # By the name: a damaged archive should be an error, and not an unknown format.
    if path.suffix == ".zip":
        return ZipImages(path)
    if path.suffix == ".tar":
        return TarImages(path)
    raise ValueError(
        f"images must be a folder, a .zip or a .tar, got {path}. Decompress a compressed tar first: it has no "
        "random access"
    )


class FolderImages:
    """Images under a folder.

    Existence is looked up in a listing of each subfolder, read once: on a remote file system one request a folder, not
    one an image.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._listed: dict[str, frozenset[str]] = {}

    def __contains__(self, name: str) -> bool:
        folder, _, base = name.rpartition("/")
        # A folder that cannot be listed has no images; it is not asked for again.
        if folder not in self._listed:
            try:
                self._listed[folder] = frozenset(os.listdir(self.path / folder))
            except OSError:  # no such folder, or a name that no folder can have
                self._listed[folder] = frozenset()
        return base in self._listed[folder]

    def missing(self, name: str) -> str:
        return f"no image {name} in {self.path}"

    def __getitem__(self, name: str) -> Path:
        return self.path / name

    def clear_cache(self) -> None:
        """Free the memory of the listings."""
        self._listed.clear()


class _IndexedArchive(abc.ABC):
    """Files of an archive by normalized name (`./a//b.png` is `a/b.png`) and by number."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.names: dict[str, int] = {}
        self.problems: dict[str, str] = {}
        """Files that cannot be read, with the reason."""
        self._name_of: dict[int, str] | None = None
        with open(self.path, "rb") as file:
            self._stamp = stamp(file)
            self._index(file)

    @abc.abstractmethod
    def _index(self, file: BinaryIO) -> None: ...

    @abc.abstractmethod
    def read(self, number: int) -> bytes: ...

    def __contains__(self, name: str) -> bool:
        return _normalized(name) in self.names

    def missing(self, name: str) -> str:
        """Explain why there is no file of that name."""
        problem = self.problems.get(_normalized(name))
        return f"no image {name} in {self.path}" + (f": it is {problem}" if problem else "")

    def __getitem__(self, name: str) -> Member:
        if name not in self:
            raise FileNotFoundError(self.missing(name))
        return Member(self, name, self.names[_normalized(name)])

    def member(self, number: int) -> Member:
        """File of that number."""
        return Member(self, self.name(number), number)

    def name(self, number: int) -> str:
        """Name of the file of that number."""
        if self._name_of is None:
            self._name_of = {n: name for name, n in self.names.items()}
        return self._name_of[number]

    def _add(self, name: str, number: int, size: int) -> bool:
        """Add a file, in place of an earlier one of the same name. Returns whether it can be read."""
        if size > MAX_FILE_BYTES:
            self._add_problem(name, f"too large: {size:,} bytes, and at most {MAX_FILE_BYTES:,} are read")
            return False
        self.problems.pop(name, None)
        self.names[name] = number
        return True

    def _add_problem(self, name: str, problem: str) -> None:
        self.names.pop(name, None)
        self.problems[name] = problem

    def _bytes(self, start: int, size: int) -> bytes:
        # Opened for each read: a shared file offset would need a lock between threads and forked workers.
        try:
            file = open(self.path, "rb")
        except FileNotFoundError as e:
            raise ChangedDataError(f"{self.path} does not exist any more") from e
        with file:
            if stamp(file) != self._stamp:
                raise ChangedDataError(f"{self.path} has changed since it was read")
            file.seek(start)
            data = file.read(size)
        if len(data) != size:
            raise ValueError(f"{self.path} is truncated: it ends within the {size} bytes at {start}")
        return data


class TarImages(_IndexedArchive):
    """Files of an uncompressed tar. Of several files of one name the last counts, as in unpacking.

    Links are followed within the archive: a hard link to the last file of its target's name before it, a symbolic link
    to the last one of all.
    """

    def _index(self, file: BinaryIO) -> None:
        spans: list[tuple[int, int]] = []
        symlinks: dict[str, str] = {}
        try:
            for entry in tar_entries(file):
                name = _normalized(entry.name)
                if _is_metadata(name):
                    continue
                symlinks.pop(name, None)
                # A symbolic link may precede its target, so it is a problem until all entries are known.
                if entry.kind == "symlink":
                    self._add_problem(name, f"a link to {entry.target}, which is not in the archive")
                    if not entry.target.startswith("/"):
                        symlinks[name] = _normalized(posixpath.join(posixpath.dirname(name), entry.target))
                    continue
                target = _normalized(entry.target)
                if entry.kind == "file":
                    span = (entry.start, entry.size)
                elif target in self.names:
                    span = spans[self.names[target]]  # a hard link: its content is that of an earlier entry
                else:
                    self._add_problem(name, f"a link to {entry.target}, which does not come before it in the archive")
                    # A hard link to a symbolic link is that symbolic link.
                    if target in symlinks:
                        symlinks[name] = symlinks[target]
                    continue
                if self._add(name, len(spans), span[1]):
                    spans.append(span)
        except TarError as e:
            raise ValueError(f"{self.path} is damaged or truncated, or not an uncompressed tar: {e}") from e
        if not self.names and not self.problems:
            raise ValueError(f"{self.path} is damaged or truncated: it is a tar without any file")
        # Follow chains of symbolic links to a file.
        for name in symlinks:
            target, visited = name, set()
            while target in symlinks and target not in visited:  # a cycle ends at a name that is no file
                visited.add(target)
                target = symlinks[target]
            if target in self.names:
                span = spans[self.names[target]]
                if self._add(name, len(spans), span[1]):
                    spans.append(span)
        self.spans = np.array(spans, dtype=np.int64).reshape(-1, 2)
        """Offset and size of each file in bytes, int64 (files, 2)."""

    def read(self, number: int) -> bytes:
        return self._bytes(*self.spans[number].tolist())


class ZipImages(_IndexedArchive):
    """Files of a zip, stored or deflated. Of several files of one name the last counts."""

    def _index(self, file: BinaryIO) -> None:
        entries = []
        try:
            with zipfile.ZipFile(file) as archive:
                listed = archive.infolist()
            n_files = _zip_file_count(file)
        except MemoryError:
            raise
        except Exception as e:  # zipfile raises many kinds for a damaged directory
            raise ValueError(f"{self.path} is damaged or truncated, or not a zip: {e}") from e
        # zipfile stops silently at a damaged entry of the directory.
        if n_files != len(listed):
            raise ValueError(
                f"{self.path} is damaged or truncated: its directory has {len(listed):,} of {n_files:,} files"
            )
        total = self._stamp[0]
        for entry in listed:
            name = _normalized(entry.filename)
            if entry.is_dir() or _is_metadata(name):
                continue
            # Bit 0 of the flags is encryption.
            if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                self._add_problem(name, "encrypted, or neither stored nor deflated")
            elif not 0 <= entry.header_offset <= total - entry.compress_size:
                self._add_problem(name, "damaged: the directory places it outside of the archive")
            elif self._add(name, len(entries), max(entry.file_size, entry.compress_size)):
                # The name as bytes, to recognize the file's local header. Bit 11 of the flags is UTF-8.
                raw_name = entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437", "replace")
                sizes = entry.compress_size, entry.file_size
                entries.append((entry.header_offset, *sizes, entry.compress_type, entry.CRC, zlib.crc32(raw_name)))
        self.entries = np.array(entries, dtype=np.int64).reshape(-1, 6)
        """Offset, compressed and inflated bytes, method, CRC-32 of content and of name: int64 (files, 6)."""

    def read(self, number: int) -> bytes:
        start, size, inflated_size, method, checksum, name_checksum = self.entries[number].tolist()
        # A local header is 30 bytes, the name, and extra fields whose size may differ from the directory's.
        mark, name_size, extra = struct.unpack("<4s22x2H", self._bytes(start, 30))
        if mark != b"PK\3\4" or zlib.crc32(self._bytes(start + 30, name_size)) != name_checksum:
            raise self._damaged(number, "its header is not at the offset in the directory")
        data = self._bytes(start + 30 + name_size + extra, size)
        # Raw deflate data, without a zlib header.
        if method == zipfile.ZIP_DEFLATED:
            inflater = zlib.decompressobj(-zlib.MAX_WBITS)
            try:
                data = inflater.decompress(data, inflated_size + 1)  # one more byte detects a longer file
            except zlib.error as e:
                raise self._damaged(number, str(e)) from e
        if len(data) != inflated_size:
            raise self._damaged(number, f"it does not have the {inflated_size:,} bytes of the directory")
        if zlib.crc32(data) != checksum:
            raise self._damaged(number, "its checksum is wrong")
        return data

    def _damaged(self, number: int, reason: str) -> ValueError:
        return ValueError(f"{self.name(number)} in {self.path} is damaged: {reason}")


def stamp(file: BinaryIO) -> tuple[int, int]:
    """Size and modification time of an open file, to detect changes."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _normalized(name: str) -> str:
    return posixpath.normpath(name).lstrip("/")


def _is_metadata(name: str) -> bool:
    """Whether macOS or an old tar left the file behind: `._a.png`, `__MACOSX/`, `PaxHeaders.1/a.png`."""
    *folders, base = name.split("/")
    return base.startswith("._") or any(f == "__MACOSX" or f.startswith("PaxHeader") for f in folders)


def _zip_file_count(file: BinaryIO) -> int:
    """File count in the end of a zip's directory (APPNOTE 4.3.16, or 4.3.14 where it does not fit there)."""
    # The end record is 22 bytes and a comment of up to 64 KiB, at the end of the file. 16 bits count the files;
    # 0xFFFF means that the zip64 end record has the count, which a locator of 20 bytes before the end record points to.
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
            raise ValueError("the end of its zip64 directory is missing")
    return count

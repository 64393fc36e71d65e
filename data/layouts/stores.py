"""Named files below one root: a folder's, or the members of a zip archive that compresses nothing."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from pathline.core.errors import DataError

__all__ = ["Folder", "Store", "Zip", "few", "store_at"]

_LIMIT = 2**30  # bytes of one file; the labels of ImageNet take 60 MiB
_LOCAL = struct.Struct("<4s22xHH")  # a member's own header: signature, …, lengths of its name and of what follows it
_NAMED = 5  # files that an error names


class Store(ABC):
    """Files by name.

    Attributes:
        root: the folder or the archive.
        sizes: bytes of each file by its name, a path below the root with ``/``, sorted by name; hidden ones left out.
    """

    root: Path
    sizes: Mapping[str, int]

    def read(self, name: str) -> bytes:
        """Return a file's content.

        Raises:
            DataError: it cannot be read, is too large, or is no longer what it was; names the file.
        """
        size = self.sizes[name]
        if size > _LIMIT:
            raise DataError(f"got {self.root / name} of {size} bytes, expected {_LIMIT} or less")
        try:
            content = self._read(name)
        except OSError as error:
            raise DataError(f"got {self.root / name}, which cannot be read: {error}") from error
        if len(content) != size:
            raise DataError(f"got {self.root / name} with another length than its {size} bytes; it was changed")
        return content

    @abstractmethod
    def _read(self, name: str) -> bytes:
        """Return a file's content, of a file that has grown a byte more than it had."""


class Folder(Store):
    """Files of a folder and of the folders in it; links out of it are refused.

    Args:
        root: the folder.

    Raises:
        DataError: it cannot be listed, or a link leads out of it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            self.sizes = dict(sorted(_listed(root, "", root.resolve())))
        except OSError as error:
            raise DataError(f"got {root}, which cannot be listed: {error}; check data.path") from error

    def _read(self, name: str) -> bytes:
        with open(self.root / name, "rb", buffering=0) as file:
            return file.read(self.sizes[name] + 1)


class Zip(Store):
    """Members of a zip archive in which they are stored as they are (ZIP_STORED), each checked by its CRC when read.

    Args:
        root: the archive.

    Raises:
        DataError: it is none, or a member is compressed, encrypted, or there twice.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            with zipfile.ZipFile(root) as archive:
                members = [info for info in archive.infolist() if not info.is_dir()]
        except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise DataError(f"got {root}, which is no whole zip archive: {error}") from error
        self._members: dict[str, zipfile.ZipInfo] = {}
        for info in members:
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
                raise DataError(
                    f"got {root / info.filename} compressed or encrypted, expected members that are stored; pack them "
                    "by zip -0"
                )
            if info.filename.startswith("/") or ".." in info.filename.split("/"):
                raise DataError(f"got {root} with the member {info.filename!r}, which leads out of it")
            if info.filename in self._members:
                raise DataError(f"got {root / info.filename} twice in one archive, expected it once")
            if not _hidden(info.filename):
                self._members[info.filename] = info
        self.sizes = {name: self._members[name].file_size for name in sorted(self._members)}

    def _read(self, name: str) -> bytes:
        member = self._members[name]
        with open(self.root, "rb", buffering=0) as file:
            content = _member(file, member.header_offset, member.file_size)
        if zlib.crc32(content) != member.CRC:
            raise DataError(f"got {self.root / name} with another CRC than the archive tells; it is damaged")
        return content


def _member(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    signature, name, extra = _LOCAL.unpack(file.read(_LOCAL.size).ljust(_LOCAL.size, b"\0"))
    if signature != b"PK\x03\x04":
        return b""
    file.seek(name + extra, os.SEEK_CUR)
    return file.read(size)


def _listed(folder: Path, prefix: str, root: Path) -> Iterator[tuple[str, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root):
                raise DataError(f"got {entry.path}, a link out of {root}; copy what it means there")
            if entry.is_dir(follow_symlinks=False):
                yield from _listed(Path(entry.path), f"{prefix}{entry.name}/", root)
            elif entry.is_file():
                yield prefix + entry.name, entry.stat().st_size
            else:
                raise DataError(f"got {entry.path}, expected files and folders; a link to a folder is none")


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def store_at(path: Path) -> Store:
    """Return what lies at a path: a folder, or a file that has to be a zip archive.

    Raises:
        DataError: nothing, or no such archive.
    """
    try:
        kind = Folder if path.is_dir() else Zip
        there = path.exists()
    except OSError as error:  # as a name that is too long
        raise DataError(f"got {path}, which cannot be looked at: {error}; check data.path") from error
    if not there:
        raise DataError(f"got nothing at {path}, expected a folder, or a zip archive; check data.path")
    return kind(path)


def few(names: Iterable[str]) -> str:
    """Return the first of sorted names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else ""
    return ", ".join(ordered[:_NAMED]) + more

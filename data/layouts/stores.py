"""Named files below one root: a folder's, or the members of a zip archive."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from pathline.core.errors import DataError
from pathline.data.sources.zip import content_of, members_of

__all__ = ["Folder", "Store", "Zip", "few", "missing_below", "store_at"]

_LIMIT = 2**30  # bytes of one file; the labels of ImageNet take 60 MiB
_NAMED = 5  # files that an error names


class Store(ABC):
    """Files by name.

    Attributes:
        root: the folder or the archive.
        sizes: bytes of each file by its name, a path below the root with ``/``, sorted by name; hidden ones left out.
        folders: names of the topmost folders, empty ones too where the root is a folder.
    """

    root: Path
    sizes: Mapping[str, int]
    folders: Sequence[str]

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
            inside = [entry.name for entry in root.iterdir() if entry.is_dir()]
        except OSError as error:
            raise DataError(f"got {root}, which cannot be listed: {error}; check data.path") from error
        self.folders = sorted(name for name in inside if not _hidden(name))

    def _read(self, name: str) -> bytes:
        with open(self.root / name, "rb", buffering=0) as file:
            return file.read(self.sizes[name] + 1)


class Zip(Store):
    """Members of a zip archive, stored or deflated, each checked by its CRC when read.

    Args:
        root: the archive.

    Raises:
        DataError: it is none, or a member is encrypted, a link, there twice, or named as if it lay outside.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        inside = {member.name: member for member in members_of(root) if not _hidden(member.name)}
        self._members = dict(sorted(inside.items()))
        self.sizes = {name: member.size for name, member in self._members.items()}
        self.folders = sorted({name.partition("/")[0] for name in inside if "/" in name})

    def _read(self, name: str) -> bytes:
        return content_of(self.root, self._members[name])


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


def missing_below(numbers: Collection[int]) -> list[int]:
    """Return the first numbers that are missing below the highest of some, counted from 0."""
    return list(islice((number for number in range(max(numbers)) if number not in numbers), _NAMED))

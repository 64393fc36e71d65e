"""Image files in a folder, with folders as classes or without."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from pathline.core.errors import DataError
from pathline.data.decode import is_image, size_in
from pathline.data.sources.base import check_options, registry
from pathline.data.sources.encoded import EncodedSource
from pathline.data.sources.files import as_path, read_file, size_of
from pathline.data.sources.keys import TABLE, check_table, labels_of

__all__ = ["Folder"]


@registry.register("folder")
class Folder(EncodedSource):
    """A folder of images.

    Labels are those of a ``dataset.json`` in it, as EDM2's and REPA's tools write one; or else the topmost folders are
    classes, in the order of their sorted names; images side by side have none. Hidden files, and files whose names do
    not end like an image's, are left alone.

    Args:
        path: of the folder.
        exif: whether the orientation that a camera noted is applied; ADM's, DiT's and REPA's programs ignore it.

    Raises:
        DataError: no folder, no images, a link that leads out of it or to a folder, a class folder without images, or
            labels that do not belong to the images.
        InputTypeError: an option of another type.
    """

    kind: ClassVar[str] = "folder"

    def __init__(self, path: str, *, exif: bool = False) -> None:
        check_options(bool, exif=exif)
        root = as_path(path)
        if not root.is_dir():
            raise DataError(f"got {path}, which is no folder; expected a folder of images")
        keys = sorted(_keys(root))
        table = root / TABLE
        if table.is_file():
            check_table(size_of(table), len(keys), str(root))
        content = read_file(table) if table.is_file() else None
        super().__init__(root, keys, labels_of(keys, content, str(root), folders=_topmost(root)), exif=exif)

    def content(self, index: int) -> bytes:
        """Return a file's bytes."""
        return read_file(self.path / self.keys[index])

    def size(self, index: int) -> tuple[int, int]:
        """Return width and height that a header tells; no more of the file is read."""
        return size_in(self.path / self.keys[index], self.name(index))

    def name(self, index: int) -> str:
        """Return a file's path."""
        return str(self.path / self.keys[index])


def _keys(root: Path) -> Iterator[str]:
    """Yield the paths of all images below a folder, relative to it."""
    folders, home = [""], root.resolve()
    while folders:
        folder = folders.pop()
        for entry in _entries(root / folder):
            key = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                folders.append(key)
                continue
            if entry.is_symlink():
                _check_link(Path(entry.path), home)
            if not is_image(key):
                continue
            if not entry.is_file():
                raise DataError(f"got {entry.path}, which is no file; remove it")
            yield key


def _topmost(root: Path) -> list[str]:
    return [entry.name for entry in _entries(root) if entry.is_dir(follow_symlinks=False)]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what a folder holds, hidden entries and what an archiver of macOS leaves behind left out."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX"]
    except OSError as error:
        raise DataError(f"got {folder}, which cannot be looked at: {error}; check the path") from error


def _check_link(link: Path, home: Path) -> None:
    try:
        target = link.resolve(strict=True)
        if target.is_relative_to(home) and not target.is_dir():
            return
    except (OSError, RuntimeError) as error:  # a link to nothing, and one to itself
        raise DataError(f"got the link {link}, which leads nowhere: {error}; remove it") from error
    raise DataError(
        f"got the link {link} to {target}, expected links to files below {home} alone; copy there what is meant, or "
        "set path to where it lies"
    )

"""Bytes of files, read by any number of threads and processes at once, and never more than were told of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pathline.core.errors import DataError, InputTypeError

__all__ = ["LIMIT", "as_path", "read_file", "read_part", "size_of"]

LIMIT = 2**30  # bytes that one image may take


def as_path(path: str | Path) -> Path:
    """Return a path to something that is there.

    Raises:
        DataError: there is nothing.
        InputTypeError: no text.
    """
    if not isinstance(path, str | Path):
        raise InputTypeError(f"got path {path!r}, expected a text")
    found = Path(path).expanduser()
    try:
        found.stat()
    except (OSError, ValueError) as error:  # the second: a zero in a name
        raise DataError(f"got {path}, which cannot be looked at: {error}; check the path") from error
    return found


def size_of(path: Path) -> int:
    """Return the size of a file in bytes; raises DataError if it is none, as a pipe or a folder."""
    try:
        if not path.is_file():
            raise DataError(f"got {path}, which is no file; expected one")
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"got {path}, which cannot be looked at: {error}; check the path") from error


def read_file(path: Path) -> bytes:
    """Return a file's content; raises DataError if it is none, cannot be read, or is larger than the limit."""
    return read_part(path, 0, size_of(path), str(path))


def read_part(path: Path, offset: int, size: int, name: str) -> bytes:
    """Return ``size`` bytes of a file from ``offset`` on; ``name`` is that of the part, for errors.

    The file is opened anew: nothing is shared by threads, or kept over a fork, and the number of shards has no limit.

    Raises:
        DataError: the file ends before, or cannot be read, or the part is larger than the limit.
    """
    if size > LIMIT:
        raise DataError(f"got {name} of {size} bytes, expected {LIMIT} or fewer; leave it out")
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            content: Any = file.read(size)
    except OSError as error:
        raise DataError(f"got {name}, which cannot be read: {error}; check the file {path}") from error
    if len(content) != size:
        raise DataError(f"got {name} with {len(content)} bytes of {size}; the file {path} is truncated: copy it again")
    return bytes(content)

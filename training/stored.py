"""Samples in an ``.npz`` that is written piece by piece: never more than a piece of them is held.

N samples; S the shape of one.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pathline.core.errors import DataError
from pathline.training.manifest import make_folder, sync

__all__ = [
    "check_place",
    "clear_leftovers",
    "leftover_of",
    "remove",
    "replacing",
    "sha256_of",
    "write_npz",
    "write_text",
]

LEFTOVER = ".writing-"  # begins the names of files that are being written, as a killed process leaves them
_WRITING = re.compile(rf"{re.escape(LEFTOVER)}(?P<name>.+)-(?P<process>[0-9]+)")
MOMENT = (1980, 1, 1, 0, 0, 0)  # of the members of an archive: equal contents are equal files


def write_npz(
    path: Path,
    pieces: Iterable[NDArray[Any]],
    count: int,
    labels: NDArray[np.int64] | None,
    *,
    older: Sequence[Path] = (),
) -> str:
    """Write samples as ``arr_0``, and labels, if any, as ``arr_1``, not compressed, in the place of an older file.

    The file is as ``np.savez`` makes it, and appears when it is whole.

    Args:
        path: of the file.
        pieces: samples (n, *S) of one type and shape, in order; ``count`` in all.
        count: N.
        labels: (N,).
        older: files that tell of the older one, removed before it is replaced.

    Returns:
        The SHA-256 of the samples' bytes.
    """
    told = hashlib.sha256()
    with replacing(path, older) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy", MOMENT), "w", force_zip64=True) as member:
            written = 0
            for piece in pieces:
                if not written:
                    _write_head(member, piece.dtype, (count, *piece.shape[1:]))
                content = _content(piece)
                member.write(content)
                told.update(content)
                written += len(piece)
            assert written == count, f"{written} samples of {count}"
        if labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy", MOMENT), "w", force_zip64=True) as member:
                _write_head(member, labels.dtype, labels.shape)
                member.write(labels.tobytes())
    return told.hexdigest()


def sha256_of(pieces: Iterable[NDArray[Any]]) -> str:
    """Return the SHA-256 of the bytes of samples that come piece by piece."""
    told = hashlib.sha256()
    for piece in pieces:
        told.update(_content(piece))
    return told.hexdigest()


def _content(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).data.cast("B")


def _write_head(file: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    told = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, told)


def write_text(path: Path, text: str) -> None:
    """Write a text, in the place of an older file."""
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def replacing(path: Path, older: Sequence[Path] = ()) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of ``path`` when it is whole and on the disk, and else leaves no trace.

    Files that tell of the ``older`` one are gone from the disk before, so that they never lie beside the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        remove(older)
        beside.replace(path)
        sync(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def remove(paths: Sequence[Path]) -> None:
    """Remove those of some files that are there, also from the disk."""
    there = [path for path in paths if path.exists()]
    for path in there:
        path.unlink(missing_ok=True)
    for folder in {path.parent for path in there}:
        sync(folder)


def check_place(path: Path) -> None:
    """Check that a file can be written, by making the one beside it that would be; makes its folder.

    Raises:
        DataError: a folder has its name.
        OSError: the folder cannot be made or written to, or the name is too long.
    """
    if path.is_dir():
        raise DataError(f"got a folder at {path}, where a file is to be written; remove it, or name another output")
    make_folder(path.parent.absolute())
    beside = _beside(path)
    beside.touch()
    beside.unlink(missing_ok=True)


def leftover_of(name: str) -> str | None:
    """Return the name of the file that was being written under this one; None if this is another file's."""
    found = _WRITING.fullmatch(name)
    return None if found is None else found["name"]


def clear_leftovers(paths: Sequence[Path]) -> None:
    """Remove what killed processes left that were writing some files."""
    names = {path.name for path in paths}
    for folder in {path.parent for path in paths if path.parent.is_dir()}:
        for file in folder.glob(f"{LEFTOVER}*"):
            found = _WRITING.fullmatch(file.name)
            if found and found["name"] in names and not _runs(int(found["process"])):
                file.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f"{LEFTOVER}{path.name}-{os.getpid()}")


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        return True
    return process != os.getpid()

"""Samples in an ``.npz`` that is written piece by piece: never more than a piece of them is held.

N samples; S the shape of one.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pathline.training.manifest import sync

__all__ = ["LEFTOVER", "replacing", "sha256_of", "write_npz", "write_text"]

LEFTOVER = ".writing-"  # begins the names of files that are being written, as a killed process leaves them
MOMENT = (1980, 1, 1, 0, 0, 0)  # of the members of an archive: equal contents are equal files


def write_npz(path: Path, pieces: Iterable[NDArray[Any]], count: int, labels: NDArray[np.int64] | None) -> str:
    """Write samples as ``arr_0``, and labels, if any, as ``arr_1``, not compressed, in the place of an older file.

    The file is as ``np.savez`` makes it, and appears when it is whole.

    Args:
        path: of the file.
        pieces: samples (n, *S) of one type and shape, in order; ``count`` in all.
        count: N.
        labels: (N,).

    Returns:
        The SHA-256 of the samples' bytes.
    """
    told = hashlib.sha256()
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
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
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of ``path`` when it is whole and on the disk, and else leaves no trace."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{LEFTOVER}{path.name}-{os.getpid()}")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise

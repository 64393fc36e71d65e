"""Arrays inside an ``.npz``, read piece by piece, their headers checked before anything is allocated."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from pathline.core.errors import DataError

__all__ = ["member", "opened", "read_values"]

_DENSEST = 1100  # how many times smaller deflate makes what it packs, at most
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


@contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive; whatever is damaged in it names the file."""
    damaged = (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except DataError:
        raise
    except damaged as error:
        raise DataError(f"got {path}, which is no .npz of plain arrays: {error}") from error


@contextmanager
def member(
    archive: zipfile.ZipFile, name: str, path: Path
) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]]:
    """Open an array at its values, its header checked against its size, and that against the file's."""
    info, room = archive.getinfo(name), path.stat().st_size
    with archive.open(info) as stream:
        version = npy.read_magic(stream)
        if version not in _HEADERS:
            raise ValueError(f"{name} is of npy version {version}")
        shape, fortran, dtype = _HEADERS[version](stream)
        if dtype.hasobject or fortran:
            raise ValueError(f"{name} holds {'objects' if dtype.hasobject else 'values in the order of Fortran'}")
        needed, packed = math.prod(shape) * dtype.itemsize, info.compress_size
        if any(size < 0 for size in shape) or needed != info.file_size - stream.tell():
            raise ValueError(
                f"{name} of {info.file_size} bytes tells the shape {shape} of {dtype}; truncated or forged"
            )
        if packed > room or info.file_size > packed * (_DENSEST if info.compress_type else 1):
            raise ValueError(f"{name} tells {info.file_size} bytes, in a file of {room}; truncated or forged")
        yield stream, shape, dtype


def read_values(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any], path: Path) -> NDArray[Any]:
    """Read the next values of an array."""
    needed = math.prod(shape) * dtype.itemsize
    content = bytearray(stream.read(needed))
    if len(content) != needed:
        raise DataError(f"got {path}, which is truncated: {len(content)} of {needed} bytes")
    return np.frombuffer(content, dtype).reshape(shape)

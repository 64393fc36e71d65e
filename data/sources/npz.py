"""Images in arrays of numpy, as ADM's samples and references are, read row by row from inside of the archive.

n images of H × W pixels, C channels.
"""

from __future__ import annotations

import io
import math
import zlib
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from pathline.core.errors import DataError
from pathline.data.sources.arrays import ArraySource, Rows, row_keys
from pathline.data.sources.base import registry
from pathline.data.sources.files import LIMIT, as_path, read_part, size_of
from pathline.data.sources.keys import Labels, numbered
from pathline.data.sources.zip import Member, data_start, members_of

__all__ = ["Npz"]

_IMAGES, _LABELS = ("images", "arr_0"), ("labels", "arr_1")
_HEADER_LIMIT = 2**16 + 12  # bytes


@registry.register("npz")
class Npz(ArraySource):
    """An ``.npz`` file with images (n, H, W, C) or (n, H, W) of type uint8, one channel or three, and labels (n,).

    The arrays are called ``images`` and ``labels``, or ``arr_0`` and ``arr_1`` as ADM's programs have them; labels may
    be missing. Images that are not compressed stay in the file; compressed ones are held in memory.

    Args:
        path: of the file.

    Raises:
        DataError: a damaged or forged file, arrays of another type or shape, of objects, in Fortran's order, or
            compressed ones of more than 1 GiB.
    """

    kind: ClassVar[str] = "npz"

    def __init__(self, path: str) -> None:
        file = as_path(path)
        members = {member.name.removesuffix(".npy"): member for member in members_of(file)}
        images = next((members[name] for name in _IMAGES if name in members), None)
        if images is None:
            raise DataError(f"got {file} with the arrays {sorted(members)}, expected {' or '.join(_IMAGES)}")
        self.rows = _rows(file, images)
        labels = next((members[name] for name in _LABELS if name in members), None)
        found = Labels(None, []) if labels is None else _labels(file, labels, self.rows.count)
        super().__init__(file, row_keys(self.rows.count), found, [(file.name, size_of(file))])

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """Return an image."""
        return self.rows.row(index)


def _rows(path: Path, member: Member) -> Rows:
    name = f"{member.name} of {path}"
    held, start, shape, dtype = _array(path, member)
    if dtype != np.uint8 or len(shape) not in (3, 4) or not all(shape) or shape[3:] not in ((), (1,), (3,)):
        raise DataError(
            f"got {name} of type {dtype} and shape {shape}, expected images (n, H, W, 3) of type uint8, from 0 to 255"
        )
    if math.prod(shape[1:]) > LIMIT:
        raise DataError(f"got {name} of shape {shape}, expected images of {LIMIT} bytes or fewer")
    return Rows(name, held, start, shape)


def _labels(path: Path, member: Member, count: int) -> Labels:
    name = f"{member.name} of {path}"
    held, start, shape, dtype = _array(path, member)
    if dtype.kind not in "iu" or shape != (count,):
        raise DataError(f"got {name} of type {dtype} and shape {shape}, expected ({count},) whole numbers")
    content = held[start:] if isinstance(held, bytes) else read_part(held, start, count * dtype.itemsize, name)
    return numbered(np.frombuffer(content, dtype).tolist(), name)


def _array(path: Path, member: Member) -> tuple[Path | bytes, int, tuple[int, ...], np.dtype[Any]]:
    """Return where an array lies, a file or bytes, from which byte on, its shape and its type, all checked.

    What is compressed is decompressed only after its header was read, and never beyond the limit.
    """
    name = f"{member.name} of {path}"
    start = data_start(path, member)
    if not member.deflated:
        head = io.BytesIO(read_part(path, start, min(member.size, _HEADER_LIMIT), name))
        shape, dtype = _header(head, name)
        _check_size(name, shape, dtype, member.size - head.tell())
        return path, start + head.tell(), shape, dtype
    if member.size > LIMIT:
        raise DataError(
            f"got {name}, compressed and of {member.size} bytes, expected {LIMIT} or fewer; save it by np.savez"
        )
    stored, engine = read_part(path, start, member.stored, name), zlib.decompressobj(-15)
    try:
        first = engine.decompress(stored, min(member.size, _HEADER_LIMIT) + 1)  # one more than claimed tells
        head = io.BytesIO(first)
        shape, dtype = _header(head, name)
        _check_size(name, shape, dtype, member.size - head.tell())
        rest = member.size + 1 - len(first)
        content = first + engine.decompress(engine.unconsumed_tail, rest) if rest else first
    except zlib.error as error:
        raise DataError(f"got {name}, which cannot be decompressed: {error}; copy the file again") from error
    if len(content) != member.size or zlib.crc32(content) != member.crc:
        raise DataError(f"got {name} with other bytes than the archive's list tells; it is damaged: copy it again")
    return content, head.tell(), shape, dtype


def _header(head: IO[bytes], name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read the header of an array; no object is ever made of what it says."""
    try:
        version = npy.read_magic(head)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, fortran, dtype = read(head)
    except Exception as error:  # a forged header raises nearly anything
        raise DataError(f"got {name} with a header that is none: {error!r}; save it anew by np.savez") from error
    if dtype.hasobject or dtype.fields is not None:
        raise DataError(f"got {name} of type {dtype}, which may hold code, expected uint8; save plain arrays")
    if fortran and len(shape) > 1:
        raise DataError(f"got {name} in Fortran's order, expected C's; save np.ascontiguousarray of it")
    if not all(type(side) is int and side >= 0 for side in shape):
        raise DataError(f"got {name} of shape {shape}, expected whole numbers")
    return tuple(shape), dtype


def _check_size(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], size: int) -> None:
    if math.prod(shape) * dtype.itemsize != size:
        raise DataError(
            f"got {name} of type {dtype} and shape {shape} in {size} bytes; it is truncated or forged: save it anew"
        )

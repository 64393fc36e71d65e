"""Arrays of numpy's .npy format, read from bytes whose header is checked against their number."""

from __future__ import annotations

import io
import math
from collections.abc import Collection
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pathline.core.errors import DataError

__all__ = ["NPY_FLOATS", "NPY_INTEGERS", "read_array"]

NPY_FLOATS = ("<f2", "<f4")
NPY_INTEGERS = ("<i4", "<i8")
_PREAMBLE = 10  # bytes of version 1.0: the magic, the version, and a length of two bytes
_MAGIC = b"\x93NUMPY\x01\x00"


def read_array(content: bytes, name: str, types: Collection[str]) -> NDArray[np.generic]:
    """Return the array of a whole .npy file, without a copy and not to be written to.

    Args:
        content: of the file.
        name: of the file, for errors.
        types: that its values may have, as ``NPY_FLOATS``; objects are none.

    Raises:
        DataError: it is truncated, forged, of another type, or not in C order; names the file.
    """
    start = _PREAMBLE + int.from_bytes(content[len(_MAGIC) : _PREAMBLE], "little")
    if content[: len(_MAGIC)] != _MAGIC or start > len(content):
        raise DataError(f"got {name}, which is no whole .npy file of version 1.0; write it anew by np.save")
    try:
        shape, fortran, dtype = _header(content[_PREAMBLE - 2 : start])
    except Exception as error:  # of numpy's parser: ValueError, SyntaxError, TypeError and more
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"got {name} with a header that is none ({said}); write it anew by np.save") from error
    if dtype.str not in types:
        raise DataError(f"got {name} of type {dtype}, expected {' or '.join(np.dtype(kind).name for kind in types)}")
    if fortran and len(shape) > 1:
        raise DataError(f"got {name} in Fortran order, expected C order; save np.ascontiguousarray of it")
    if min(shape, default=0) < 0 or start + math.prod(shape) * dtype.itemsize != len(content):
        raise DataError(
            f"got {name} of {len(content)} bytes, expected {start} and {shape} values of {dtype}; the file is "
            "truncated or forged: write it anew"
        )
    return np.frombuffer(content, dtype, offset=start).reshape(shape)


@lru_cache(maxsize=64)
def _header(content: bytes) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Return shape, whether in Fortran order, and type; files of one layout have the same header."""
    return np.lib.format.read_array_header_1_0(io.BytesIO(content))

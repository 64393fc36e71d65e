"""Images in IDX files, as MNIST and its relatives have them.

Bytes 0 and 1 are 0, byte 2 is the type (8: uint8), byte 3 the number of dimensions; then each size in 4 bytes, the most
significant first, then the values. n images of H × W pixels.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from pathline.core.errors import DataError, InputError
from pathline.data.sources.arrays import ArraySource, Rows, row_keys
from pathline.data.sources.base import registry
from pathline.data.sources.files import LIMIT, as_path, size_of
from pathline.data.sources.keys import numbered

__all__ = ["Idx"]

_PARTS = {"train": ("train",), "test": ("t10k", "test")}


@registry.register("idx")
class Idx(ArraySource):
    """A pair of IDX files of images (n, H, W) and labels (n,), compressed by gzip or not.

    Args:
        path: the file of the images, as ``train-images-idx3-ubyte.gz``, whose labels lie beside it, as
            ``train-labels-idx1-ubyte.gz``; or the folder of both.
        split: of a folder, which pair.

    Raises:
        DataError: no such files, or files that are truncated, longer than their header says, of another type, or of
            different numbers of images and labels.
        InputError: another split.
    """

    kind: ClassVar[str] = "idx"

    def __init__(self, path: str, *, split: Literal["train", "test"] = "train") -> None:
        if split not in list(_PARTS):
            raise InputError(f"got split {split!r}, expected one of {', '.join(map(repr, _PARTS))}")
        place = as_path(path)
        file = _file_in(place, split) if place.is_dir() else place
        beside = _labels_beside(file)
        self.rows, labels = _read(file, 3), _read(beside, 1)
        if self.rows.count != labels.count:
            raise DataError(f"got {labels.count} labels in {beside} for {self.rows.count} images in {file}")
        files = [(name.name, size_of(name)) for name in (file, beside)]
        super().__init__(file, row_keys(self.rows.count), numbered(labels.all().tolist(), str(beside)), files)

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """Return an image, (H, W)."""
        return self.rows.row(index)


def _file_in(folder: Path, split: str) -> Path:
    """Return the file of a split's images in a folder; where it lies there compressed and not, the latter."""
    found = {
        file.name.removesuffix(".gz"): file
        for file in sorted(folder.glob("*images*idx3*"), reverse=True)
        if any(word in file.name for word in _PARTS[split]) and not file.name.startswith(".")
    }
    if len(found) != 1:
        raise DataError(
            f"got {sorted(found)} for the images of split {split} in {folder}, expected one file named like "
            f"{_PARTS[split][0]}-images-idx3-ubyte, or with .gz; set path to the file that is meant"
        )
    return next(iter(found.values()))


def _labels_beside(file: Path) -> Path:
    """Return the file of labels that belongs to one of images, compressed or not."""
    name = file.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    for end in ("", ".gz"):
        if (beside := file.with_name(name + end)).is_file() and beside != file:
            return beside
    raise DataError(f"got no labels for {file}, expected {name}, or with .gz, beside it")


def _read(path: Path, dimensions: int) -> Rows:
    """Check a file's header against its size.

    Raises:
        DataError: they do not agree, or the file is of another kind.
    """
    size, length = size_of(path), 4 + 4 * dimensions
    content = _unzipped(path) if path.suffix == ".gz" else None
    if content is None:
        with path.open("rb") as file:
            head = file.read(length)
    else:
        head, size = content[:length], len(content)
    if len(head) != length or head[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(
            f"got {path}, which begins with {head[:4].hex()}, expected 000008{dimensions:02x}: an IDX file of uint8 in "
            f"{dimensions} dimensions"
        )
    sizes = struct.unpack(f">{dimensions}I", head[4:])
    if length + math.prod(sizes) != size or not all(sizes):
        raise DataError(
            f"got {path} of {size} bytes with the sizes {sizes}, expected {length + math.prod(sizes)} bytes, and no "
            "size of 0; it is truncated or forged: copy it again"
        )
    return Rows(str(path), path if content is None else content, length, sizes)


def _unzipped(path: Path) -> bytes:
    """Return what a gzip file holds, up to one byte beyond the limit."""
    try:
        with gzip.open(path) as file:
            content = file.read(LIMIT + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"got {path}, which cannot be decompressed: {error}; copy it again") from error
    if len(content) > LIMIT:
        raise DataError(f"got {path}, which holds more than {LIMIT} bytes; decompress it")
    return content

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
    """Check a file's header against what it holds; what is compressed is read as far as the header says.

    Raises:
        DataError: they do not agree, or the file is of another kind.
    """
    size, zipped = size_of(path), path.suffix == ".gz"
    try:
        with gzip.open(path) if zipped else path.open("rb") as file:
            head = file.read(4 + 4 * dimensions)
            sizes = _sizes(path, head, dimensions)
            expected = math.prod(sizes)
            content = file.read(expected + 1) if zipped and expected <= LIMIT else b""
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"got {path}, which cannot be read: {error}; copy it again") from error
    found = len(content) if zipped else size - len(head)
    if found != expected or not expected:
        raise DataError(
            f"got {path} with the sizes {sizes}, none of which may be 0, and {'' if found <= expected else 'at least '}"
            f"{found} bytes behind them, expected {expected}, compressed ones up to {LIMIT}; it is truncated or "
            "forged: copy it again"
        )
    return Rows(str(path), content if zipped else path, 0 if zipped else len(head), sizes)


def _sizes(path: Path, head: bytes, dimensions: int) -> tuple[int, ...]:
    if len(head) != 4 + 4 * dimensions or head[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(
            f"got {path}, which begins with {head[:4].hex()} and has {len(head)} bytes of a header, expected "
            f"000008{dimensions:02x} and {4 + 4 * dimensions}: an IDX file of uint8 in {dimensions} dimensions"
        )
    return struct.unpack(f">{dimensions}I", head[4:])

"""Sources of images of one size, whose pixels lie one after another as bytes, in files or in memory.

n rows of an array; H, W, C the shape of one.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pathline.core.errors import DataError
from pathline.data.sources.base import ImageSource
from pathline.data.sources.files import read_part
from pathline.data.sources.keys import Labels, fingerprint

__all__ = ["ArraySource", "Rows", "row_keys"]


class Rows:
    """Rows of bytes.

    Args:
        name: of the array, for errors.
        held: the file that they lie in, or the bytes themselves.
        offset: where the first begins.
        shape: (n, …) of the array; a row takes the product of the rest.
    """

    def __init__(self, name: str, held: Path | bytes, offset: int, shape: tuple[int, ...]) -> None:
        self.name, self.held, self.offset, self.count, self.shape = name, held, offset, shape[0], shape[1:]
        self.size = math.prod(self.shape)

    def row(self, index: int) -> NDArray[np.uint8]:
        """Return a row; raises DataError if the file no longer holds it."""
        return self._take(index, 1).reshape(self.shape)

    def all(self) -> NDArray[np.uint8]:
        """Return all rows, (n, …); raises DataError if the file no longer holds them, or they are above the limit."""
        return self._take(0, self.count).reshape(self.count, *self.shape)

    def _take(self, first: int, count: int) -> NDArray[np.uint8]:
        start, size = self.offset + first * self.size, count * self.size
        if isinstance(self.held, bytes):
            return np.frombuffer(self.held, np.uint8, size, start)
        return np.frombuffer(read_part(self.held, start, size, f"row {first} of {self.name}"), np.uint8)


class ArraySource(ImageSource):
    """Images that are rows of arrays.

    Args:
        path: of the file or the folder.
        keys: of the images, sorted.
        labels: of the images.
        files: name and size in bytes of each file that is read.

    Attributes:
        kind: the name of the source.
    """

    kind: ClassVar[str]

    def __init__(self, path: Path, keys: Sequence[str], labels: Labels, files: Sequence[tuple[str, int]]) -> None:
        if not keys:
            raise DataError(f"got no images in {path}, expected some; check the path")
        self.path, self.keys, self.files = path, keys, files
        self.labels, self.class_names = labels

    @abstractmethod
    def pixels(self, index: int) -> NDArray[np.uint8]:
        """Return an image, (H, W) or (H, W, C) with one channel or three."""

    def read(self, index: int) -> Image.Image:
        """Return an image in RGB; raises DataError if its file can no longer be read."""
        pixels = self.pixels(index)
        return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels).convert("RGB")

    def size(self, index: int) -> tuple[int, int]:
        """Return width and height, the same of all images."""
        del index
        return self._size

    @cached_property
    def _size(self) -> tuple[int, int]:
        height, width = self.pixels(0).shape[:2]
        return width, height

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Name, number of images and classes, hash of keys and labels, and the files' sizes."""
        return {
            "name": self.kind,
            "count": len(self),
            "num_classes": len(self.class_names),
            "sha256": fingerprint(self.keys, self.labels),
            "files": [{"file": name, "bytes": size} for name, size in self.files],
        }


def row_keys(count: int) -> list[str]:
    """Return names of rows: their numbers in eight digits, so that they are sorted."""
    return [f"{number:08d}" for number in range(count)]

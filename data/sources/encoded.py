"""Sources of image files, as they lie in a folder or in an archive: their bytes are decoded by one set of rules."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from pathline.data.decode import decode, rules, size_in
from pathline.data.sources.base import ImageSource
from pathline.data.sources.keys import Labels, fingerprint

__all__ = ["EncodedSource"]


class EncodedSource(ImageSource):
    """Images that are decoded when they are read.

    Args:
        path: of the folder or the archive, for errors.
        keys: of the images, sorted.
        labels: of the images.
        exif: whether the orientation that a camera noted is applied.
        files: name and size in bytes of each archive, for the manifest; none for a folder.

    Attributes:
        kind: the name of the source.
    """

    kind: ClassVar[str]

    def __init__(
        self, path: Path, keys: Sequence[str], labels: Labels, *, exif: bool, files: Sequence[tuple[str, int]] = ()
    ) -> None:
        self.path, self.keys, self.exif, self.files = path, keys, exif, files
        self.labels, self.class_names = labels

    @abstractmethod
    def content(self, index: int) -> bytes:
        """Return an image's bytes as they are stored; raises DataError, naming the file, if they cannot be read."""

    def name(self, index: int) -> str:
        """Return what an image is called in errors."""
        return f"{self.keys[index]} of {self.path}"

    def read(self, index: int) -> Image.Image:
        """Return an image in RGB; raises DataError, naming the file, if it cannot be read or decoded."""
        return decode(self.content(index), self.name(index), exif=self.exif)

    def size(self, index: int) -> tuple[int, int]:
        """Return width and height that a header tells, before any orientation."""
        return size_in(self.content(index), self.name(index))

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Name, number of images and classes, hash of keys and labels, rules of decoding, and the archives' sizes."""
        return {
            "name": self.kind,
            "count": len(self),
            "num_classes": len(self.class_names),
            "sha256": fingerprint(self.keys, self.labels),
            "decoding": rules(exif=self.exif),
            **({"files": [{"file": name, "bytes": size} for name, size in self.files]} if self.files else {}),
        }

"""What a source of images is: pictures by index in a fixed order, as they were stored, with keys and labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from pathline.core.errors import InputTypeError
from pathline.core.registry import Registry

__all__ = ["ImageSource", "check_options", "registry"]

_SAID = {bool: "true or false", str: "a text", Mapping: "a mapping of options"}


class ImageSource(ABC):
    """Images of any size, by index; fit to be pickled: files are opened when first read, and again in each process.

    Attributes:
        keys: one stable name an image, as its path below the root; sorted, without repetition.
        labels: one class an image, 0 … len(class_names) − 1; None for images without.
        class_names: sorted names of the classes; empty without labels.
    """

    keys: Sequence[str]
    labels: Sequence[int] | None
    class_names: Sequence[str]

    def __len__(self) -> int:
        return len(self.keys)

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """Return an image in RGB, 8 bits a channel, upright or not as the source's options say.

        Raises:
            DataError: it cannot be decoded; names the file.
        """

    def size(self, index: int) -> tuple[int, int]:
        """Return width and height of an image, as it is stored; raises DataError as ``read``."""
        return self.read(index).size

    @property
    @abstractmethod
    def manifest(self) -> Mapping[str, Any]:
        """What the source is: its name, number of images, hash of keys and labels, decoding rules; fit for JSON."""


def check_options(kind: type, **options: Any) -> None:
    """Raise InputTypeError unless each option is of a type: bool, str or Mapping."""
    for name, value in options.items():
        if not isinstance(value, kind):
            raise InputTypeError(f"got {name} {value!r}, expected {_SAID[kind]}")


registry: Registry[ImageSource] = Registry("image source", "data.sources", ImageSource)

"""Images as they lie on a disk, decoded and cut when they are asked for.

N samples; C channels, R the side of a square.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pathline.core.draws import BoundDraws, Draws
from pathline.core.errors import DataError, InputError, InputTypeError
from pathline.data.base import Batch, Dataset, Indices, as_indices, registry
from pathline.data.crop import CROP, centre_crop
from pathline.data.layouts.base import SURVEYED
from pathline.data.sources import source_of
from pathline.data.visits import flips

__all__ = ["Images"]

Value = TypeVar("Value")
_CHUNK = 256  # images that the statistics take at once
_HEADERS = 4096  # images whose sizes are asked for at once
_HIGHEST = 255


@registry.register("images")
class Images(Dataset):
    """Images of a folder, an archive, arrays or another library's data set, decoded at each visit.

    Levels x from 0 to 255 become x/127.5 − 1, in [−1, 1]. Each image is scaled and cut to a square by ADM's rule; one
    that is a square of that size already is left as it is. Several threads decode at once.

    Args:
        path: of the folder or the file.
        resolution: R, in pixels; None takes images as they are, which then all have to be squares of one size:
            the headers of all are read first.
        source: what lies there, a name of ``pathline.data.sources`` or ``{name: …}`` with its options; ``auto`` tells
            it from the path.
        flip: whether a visit of training mirrors an image, left to right, with probability 1/2.
        exif: whether the orientation that a camera noted is applied; ADM's, DiT's and REPA's programs ignore it.
        channels: 3, or 1 for grey (ITU-R 601-2 luma of colours).
        workers: threads that decode.

    Raises:
        DataError: nothing that can be read at the path, labels that do not belong to the images, or, without a
            resolution, images that are no squares of one size.
        InputError: a resolution or a number of threads below 1, or another number of channels.
        InputTypeError: an option of another type.
    """

    def __init__(
        self,
        path: str,
        *,
        resolution: int | None = None,
        source: str | Mapping[str, Any] = "auto",
        flip: bool = False,
        exif: bool = False,
        channels: Literal[1, 3] = 3,
        workers: int = 4,
    ) -> None:
        numbers = [workers, channels, *([] if resolution is None else [resolution])]
        if not all(type(number) is int for number in numbers) or type(flip) is not bool or type(exif) is not bool:
            raise InputTypeError(
                f"got resolution {resolution!r}, channels {channels!r}, workers {workers!r}, flip {flip!r} and exif "
                f"{exif!r}; expected whole numbers, and true or false"
            )
        if min(numbers) < 1 or channels not in (1, 3):
            raise InputError(
                f"got resolution {resolution}, channels {channels} and workers {workers}; expected 1 or more, and 1 or "
                "3 channels"
            )
        self.source = source_of(path, source, **({"exif": True} if exif else {}))
        self.resolution, self.flip, self.workers = resolution, flip, workers
        labels = self.source.labels
        self._labels = torch.zeros(len(self.source)).long() if labels is None else torch.tensor(labels).long()
        self.num_classes = len(self.source.class_names)
        self._threads: tuple[int, ThreadPoolExecutor] | None = None
        side = self._common_side() if resolution is None else resolution
        self.shape = (channels, side, side)

    def __len__(self) -> int:
        return len(self.source)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the threads out, which cannot go into another process."""
        return {**self.__dict__, "_threads": None}

    def batch(self, indices: Indices) -> Batch:
        """Return images in [−1, 1], none mirrored, labels and indices.

        Raises:
            DataError: an image that cannot be read, or not of the size of the others; names it.
            InputError: an index that does not exist.
            InputTypeError: indices that are not whole numbers.
        """
        return _unit(self._load(as_indices(indices, len(self)), None))

    def load(self, indices: Indices, draws: BoundDraws) -> Batch:
        """Return images of type uint8, mirrored or not, labels and indices; raises as ``batch``."""
        return self._load(as_indices(indices, len(self)), flips(draws) if self.flip else None)

    def finish(self, loaded: Batch, draws: BoundDraws) -> Batch:
        """Convert loaded images to floats in [−1, 1] on the device where they are."""
        del draws
        return _unit(loaded)

    @cached_property
    def statistics(self) -> dict[str, Any]:
        """Mean and standard deviation of each channel, and the range, of 10,000 images drawn with seed 0, or of all.

        ``over`` tells of how many. Of these they are exact: each level of each channel is counted.
        """
        rows = np.sort(Draws(0).permutation("statistics", len(self))[:SURVEYED])
        counts = np.zeros((self.shape[0], _HIGHEST + 1), np.int64)
        for start in range(0, len(rows), _CHUNK):
            images = self._pixels(rows[start : start + _CHUNK], None)
            for channel in range(len(counts)):
                counts[channel] += np.bincount(images[:, channel].reshape(-1), minlength=_HIGHEST + 1)
        values, number = np.arange(_HIGHEST + 1) / 127.5 - 1, int(counts[0].sum())
        means = counts @ values / number
        squares = (counts * (values - means[:, None]) ** 2).sum(1)
        seen = values[counts.any(0)]
        return {
            "mean": means.tolist(),
            "std": np.sqrt(squares / max(number - 1, 1)).tolist(),
            "range": [float(seen[0]), float(seen[-1])],
            "over": {"samples": len(rows), "of": len(self), "seed": 0},
        }

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Name, count, shape, classes, how images are cut, converted and mirrored, and the source with its hash."""
        return {
            "name": "images",
            "count": len(self),
            "shape": list(self.shape),
            "num_classes": self.num_classes,
            "crop": "none" if self.resolution is None else CROP,
            "values": "x/127.5 - 1 of levels 0 to 255",
            "flip": self.flip,
            "source": dict(self.source.manifest),
        }

    def _load(self, index: Tensor, mirrored: Tensor | None) -> Batch:
        data = torch.from_numpy(self._pixels(index.numpy(), None if mirrored is None else mirrored.numpy()))
        return {"data": data, "label": self._labels[index], "index": index}

    def _pixels(self, index: NDArray[np.int64], mirrored: NDArray[np.bool_] | None) -> NDArray[np.uint8]:
        """Return images as (N, C, R, R), those that are asked for mirrored."""
        pixels = np.empty((len(index), *self.shape), np.uint8)

        def fill(row: int) -> None:
            image = self._image(int(index[row])).transpose(2, 0, 1)
            pixels[row] = image[..., ::-1] if mirrored is not None and mirrored[row] else image

        for _ in self._spread(fill, range(len(index))):
            pass
        return pixels

    def _image(self, index: int) -> NDArray[np.uint8]:
        """Return an image as (R, R, C)."""
        image, (channels, side, _) = self.source.read(index), self.shape
        if self.resolution is None:  # the file may be another one since its header was read
            self._check_size(index, image.size, side)
        try:
            pixels = centre_crop(image, side)
        except InputError as error:
            raise DataError(f"got {self.source.keys[index]}, which cannot be cut: {error}") from error
        return pixels if channels == 3 else np.asarray(Image.fromarray(pixels).convert("L"))[..., None]

    def _common_side(self) -> int:
        """Return the side of all images; raises DataError, naming one, where they are no squares of one size."""
        side, height = self.source.size(0)
        if side != height:
            raise DataError(
                f"got {self.source.keys[0]} of {side} x {height} pixels, expected a square; set resolution, to have "
                "all images cut to squares of one size"
            )
        for start in range(0, len(self), _HEADERS):
            rows = range(start, min(start + _HEADERS, len(self)))
            for row, size in zip(rows, self._spread(self.source.size, rows), strict=True):
                self._check_size(row, size, side)
        return side

    def _check_size(self, index: int, size: tuple[int, int], side: int) -> None:
        if size != (side, side):
            raise DataError(
                f"got {self.source.keys[index]} of {size[0]} x {size[1]} pixels, expected {side} x {side} beside "
                f"{self.source.keys[0]}; set resolution, to have all of them cut to one size"
            )

    def _spread(self, fill: Callable[[int], Value], rows: range) -> Iterable[Value]:
        """Call a function for each row, on several threads, and return what it gives; what it raises is raised here."""
        if self.workers == 1 or len(rows) < 2:
            return map(fill, rows)
        if self._threads is None or self._threads[0] != os.getpid():  # no thread goes along into a forked process
            self._threads = os.getpid(), ThreadPoolExecutor(self.workers, "images")
        return self._threads[1].map(fill, rows)


def _unit(loaded: Batch) -> Batch:
    return {**loaded, "data": loaded["data"].float().div_(127.5).sub_(1)}

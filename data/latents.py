"""Latents of an autoencoder, packed in safetensors files: read in place, a row at a time.

n rows of a file; C, H, W the shape of one latent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathline.core.errors import DataError, InputError, InputTypeError
from pathline.data.base import Batch, Dataset, Indices, as_indices, registry
from pathline.data.packed import Rows, files_in, read
from pathline.data.prepare.statistics import Spread

__all__ = ["Latents"]

_CHUNK = 256  # rows that the statistics take at once
_NAMED = 16  # rows that the statistics name of those left out


@registry.register("latents")
class Latents(Dataset):
    """Latents packed in safetensors files, each with the same keys and an own number of rows.

    Keys: ``latents`` (n, C, H, W) or ``moments`` (n, 2C, H, W); ``labels`` (n,) of type int32 or int64, which
    unlabelled data do without; ``images`` (n, 3, R, R) of type uint8, where they are asked for; others are not read.
    Of moments the first half, the mean of an autoencoder's posterior, is taken. The other half is never read: it is the
    logarithm of the variance or the standard deviation, and such files do not say which. Data ``prepared`` or ``repa``
    know, and draw from the posterior; folders of ``prepared`` are refused here, for they tell their scaling.

    Rows are counted through all files, sorted by name. Nothing is copied before it is asked for, and no value of the
    latents is checked: what is not finite makes training skip the step.

    Args:
        path: a file, or a folder of ``*.safetensors`` files; those whose names begin with a dot are left alone.
        num_classes: class labels 0 … num_classes − 1; 0 for data without labels, whose label is 0 throughout.
        scale: factor of the stored values; 0.18215 is that of Stable Diffusion's first autoencoders (arXiv:2112.10752),
            and 1 is for latents that were scaled before they were stored: by what, is then not known.
        images: whether batches have an ``image`` as well, uint8, for encoders to align to.

    Raises:
        DataError: no file, or one that is truncated, forged, or does not hold what it should; names the file.
        InputError: a negative number of classes, or a scale that is not finite and above 0.
        InputTypeError: an option of another type.
    """

    data_are_images = False

    def __init__(self, path: str, *, num_classes: int = 1000, scale: float = 0.18215, images: bool = False) -> None:
        numbers = isinstance(num_classes, int) and isinstance(scale, int | float)
        if not isinstance(path, str | Path) or not numbers or bool in (type(num_classes), type(scale)):
            raise InputTypeError(
                f"got path {path!r}, num_classes {num_classes!r}, scale {scale!r}; expected a text, a whole number and "
                "a number"
            )
        if not isinstance(images, bool):
            raise InputTypeError(f"got images {images!r}, expected true or false")
        if num_classes < 0 or not 0 < scale < math.inf:
            raise InputError(f"got num_classes {num_classes}, scale {scale}; expected 0 or more, and a scale above 0")
        self.num_classes, self.scale, self.images = num_classes, float(scale), images
        self.files = tuple(read(file, num_classes, images) for file in files_in(Path(path).expanduser()))
        first = self.files[0]
        for other in self.files:
            if other.sample != first.sample:
                raise DataError(
                    f"got {_words(*other.sample)} in {other.path} beside {_words(*first.sample)} in {first.path}; "
                    "keep each kind in a folder of its own"
                )
        channels, height, width = first.values.shape
        self.shape = (channels, height, width)
        self._ends = np.cumsum([len(packed.labels) for packed in self.files])
        self._labels = torch.cat([packed.labels for packed in self.files])

    @property
    def latents_of(self) -> Mapping[str, Any] | None:  # type: ignore[override]  # nobody sets it
        """The autoencoder as far as it is known: by its scaling, unless the latents were scaled before."""
        if self.scale == 1:
            return None
        zeros, stds = [0.0] * self.shape[0], [1 / self.scale] * self.shape[0]
        return {"scaling": {"mean": zeros, "std": stds, "source": "option scale"}}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def batch(self, indices: Indices) -> Batch:
        """Return scaled latents, labels and indices, and images if the data set was built with them."""
        index = as_indices(indices, len(self))
        batch = {"data": self._latents(index.numpy()), "label": self._labels[index], "index": index}
        images = [packed.images for packed in self.files if packed.images is not None]
        return {**batch, "image": self._gather(images, index.numpy(), torch.uint8)} if images else batch

    def _latents(self, index: NDArray[np.int64]) -> Tensor:
        return self._gather([packed.values for packed in self.files], index, torch.float32).mul_(self.scale)

    def _gather(self, columns: Sequence[Rows], index: NDArray[np.int64], dtype: torch.dtype) -> Tensor:
        """Return rows that lie in several files, (N, *S)."""
        gathered = torch.empty(len(index), *columns[0].shape, dtype=dtype)
        holders = np.searchsorted(self._ends, index, side="right")
        for number in np.unique(holders):
            chosen, rows = np.flatnonzero(holders == number), columns[number]
            first = self._ends[number] - len(rows.bytes)
            gathered[torch.from_numpy(chosen)] = rows.take(index[chosen] - first).to(dtype)
        return gathered

    @cached_property
    def statistics(self) -> dict[str, Any]:
        """Mean and standard deviation of each channel, and the range; one pass over all values, when first asked.

        Rows with values that are not finite are left out: ``left_out`` then has their number, and names the first.

        Raises:
            DataError: no row is left.
        """
        spread: Spread | None = None
        lost: list[int] = []
        for start in range(0, len(self), _CHUNK):
            data = self._latents(np.arange(start, min(start + _CHUNK, len(self))))
            finite = data.isfinite().flatten(1).all(1)
            lost += (start + (~finite).nonzero().flatten()).tolist()
            if bool(finite.any()):
                found = Spread.of(data[finite])
                spread = found if spread is None else spread.merged(found)
        if spread is None:
            raise DataError(f"got latents in {self.files[0].path} without a row of finite values; pack them again")
        told = spread.channels()
        left_out = {"left_out": {"count": len(lost), "rows": lost[:_NAMED]}} if lost else {}
        return {"mean": told.mean, "std": told.std, "range": [min(told.low), max(told.high)], **left_out}

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Name, count, shape, scale, and each file's name, rows and hash; one pass over all files, when first asked.

        The hash is that of header, values and labels, without the images: cached features of these have one of theirs.
        """
        return {
            "name": "latents",
            "kind": self.files[0].kind,
            "count": len(self),
            "shape": list(self.shape),
            "num_classes": self.num_classes,
            "scale": self.scale,
            "files": [{"file": p.path.name, "rows": len(p.labels), "sha256": p.sha256} for p in self.files],
        }


def _words(kind: str, shape: tuple[int, ...], image: tuple[int, ...] | None) -> str:
    return f"{kind} of samples of shape {shape}{'' if image is None else f' and images of shape {image}'}"

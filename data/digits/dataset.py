"""Handwritten digits: real, small, and shipped with the package."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathline.core.errors import InputError
from pathline.data.base import Batch, Dataset, Indices, as_indices, registry

__all__ = ["Digits"]

_SPLITS = {"train": slice(1, None, 2), "held-out": slice(0, None, 2), "all": slice(None)}


@cache
def _arrays() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images (1797, 8, 8) with values 0 … 16 and labels (1797,), in UCI's order."""
    with (
        files("pathline.data.digits").joinpath("digits.npz").open("rb") as file,
        np.load(file, allow_pickle=False) as z,
    ):
        return z["images"], z["labels"]


@registry.register("digits")
class Digits(Dataset):
    """1,797 handwritten digits of 8 × 8 pixels and 17 levels, in ten classes (Alpaydin and Kaynak, UCI, 1998).

    Values are x/8 − 1, in [−1, 1].

    Args:
        split: ``train``, the 898 odd rows of UCI's order counted from 0; ``held-out``, the 899 even ones; or ``all``.

    Raises:
        InputError: another split.
    """

    shape = (1, 8, 8)
    num_classes = 10
    in_memory = True

    def __init__(self, split: Literal["train", "held-out", "all"] = "train") -> None:
        if split not in list(_SPLITS):  # a list, so that what cannot be hashed is refused as well
            raise InputError(f"got split {split!r}, expected one of {', '.join(map(repr, _SPLITS))}")
        self.split = split
        images, labels = (array[_SPLITS[split]] for array in _arrays())
        self._sha256 = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        self._images: Tensor = torch.from_numpy(images.astype(np.float32) / 8 - 1).unsqueeze(1)
        self._labels: Tensor = torch.from_numpy(labels.astype(np.int64))

    def __len__(self) -> int:
        return len(self._labels)

    def batch(self, indices: Indices) -> Batch:
        """Return images in [−1, 1], labels and indices."""
        index = as_indices(indices, len(self))
        return {"data": self._images[index], "label": self._labels[index], "index": index}

    @property
    def statistics(self) -> dict[str, Any]:
        """Mean and standard deviation of the one channel, and the range."""
        return {
            "mean": [float(self._images.mean())],
            "std": [float(self._images.std())],
            "range": [float(self._images.min()), float(self._images.max())],
        }

    @property
    def manifest(self) -> dict[str, Any]:
        """Name, split, count, shape, source, licence and hash."""
        return {
            "name": "digits",
            "split": self.split,
            "count": len(self),
            "shape": list(self.shape),
            "num_classes": self.num_classes,
            "values": "x/8 - 1 of levels 0 to 16",
            "source": "Optical Recognition of Handwritten Digits, Alpaydin and Kaynak, 1998, doi:10.24432/C50P49",
            "licence": "CC BY 4.0",
            "sha256": self._sha256,
        }

"""What samples are compared with: real images, or what files hold of them.

N samples, M real samples, D features; images are (N, C, H, W), uint8 or floats in [−1, 1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pathline import data
from pathline.core.checks import check_finite, check_labels
from pathline.core.errors import DataError, InputError, InputTypeError
from pathline.data import Dataset
from pathline.metrics.features import Features
from pathline.metrics.moments import Moments, Statistics

__all__ = ["Real", "Reference", "check_samples"]

_ROWS = 1024  # images of a data set that are read at once


def check_samples(batch: Mapping[str, Tensor], shape: tuple[int, int, int] | None, num_classes: int | None) -> None:
    """Check samples: ``data`` (N, C, H, W), uint8 or floats in [−1, 1], and ``label`` (N,) if given.

    Args:
        batch: the samples.
        shape: (C, H, W) that they must have; None for any of one channel or three.
        num_classes: that labels lie below; None leaves them unchecked.

    Raises:
        InputError: images of another shape or range, or labels that the data do not have.
        InputTypeError: images that are neither uint8 nor floating point, or labels that are not whole numbers.
    """
    images = batch["data"]
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise InputTypeError(f"got samples of type {images.dtype}, expected uint8 or floats; levels a are a/127.5 - 1")
    expected = "(N, 1, H, W) or (N, 3, H, W)" if shape is None else f"(N, {str(tuple(shape))[1:]}"
    fits = images.ndim == 4 and (images.shape[1] in (1, 3) if shape is None else tuple(images.shape[1:]) == shape)
    if not fits:
        raise InputError(f"got samples of shape {tuple(images.shape)}, expected {expected}")
    if images.is_floating_point():
        check_finite(images, "samples")
        if len(images) and float(images.abs().max()) > 1:
            raise InputError(f"got samples up to ±{float(images.abs().max()):g}, expected [-1, 1]; call clamp(-1, 1)")
    if "label" in batch and num_classes is not None:
        check_labels(batch["label"], len(images), num_classes, null=False)


class Reference(ABC):
    """What samples are compared with, seen through any feature space.

    Attributes:
        manifest: what it is, fit for JSON.
        shape: (C, H, W) of its images, which samples must have; None where it does not tell.
        num_classes: number of its labels; None where it does not tell.
    """

    manifest: Mapping[str, Any]
    shape: tuple[int, int, int] | None = None
    num_classes: int | None = None

    @classmethod
    def of(cls, source: str | Path | Mapping[str, Any]) -> Reference:
        """Return a reference by what it is called; see ``metrics.reference.find``."""
        from pathline.metrics.reference import find  # which knows the kinds that derive from this

        return find(source)

    def check(self, batch: Mapping[str, Tensor]) -> None:
        """Check that samples are of the data's kind, as ``check_samples`` says."""
        check_samples(batch, self.shape, self.num_classes)

    @abstractmethod
    def statistics(self, features: Features, output: str) -> Statistics:
        """Return mean and covariance of an output of a feature space.

        Raises:
            DataError: it has none of that space, or of other weights.
        """

    @abstractmethod
    def vectors(self, features: Features, output: str, count: int | None = None) -> Tensor:
        """Return an output of a feature space for ``count`` of its images, or all, (M, D).

        Raises:
            DataError: as for ``statistics``.
        """

    def prepare(self, features: Features, output: str, vectors: int = 0) -> None:
        """Check, as far as it is cheap, that it has an output of a feature space; files are read, images are not.

        Args:
            features: the space.
            output: of it.
            vectors: number of images whose features are needed; 0 for statistics.

        Raises:
            DataError: it has none of that space, of other weights, or of fewer images.
        """
        del features, output, vectors

    def doubts(self, features: Features) -> tuple[str, ...]:
        """Return what is to be said of this reference beside this feature space."""
        del features
        return ()

    def stand_in(self, features: Features, output: str, count: int) -> Tensor | None:
        """Return the same of up to ``count`` real samples that may stand in the place of generated ones, if any."""
        del features, output, count
        return None


@dataclass(frozen=True)
class Real(Reference):
    """The two halves of a real data set: what a model was trained on, and what it never saw.

    As a reference it is the second; the first stands in the place of samples for comparison.
    """

    training: Dataset
    held_out: Dataset

    @classmethod
    def of(cls, source: str | Path | Mapping[str, Any]) -> Real:
        """Take the halves ``train`` and ``held-out`` of a data set by name."""
        named = source if isinstance(source, Mapping) else str(source)
        return cls(data.build(named, split="train"), data.build(named, split="held-out"))

    @property
    def manifest(self) -> Mapping[str, Any]:  # type: ignore[override]  # derived from the halves
        """That of the held-out half."""
        return {"kind": "held-out half", **self.held_out.manifest}

    @property
    def shape(self) -> tuple[int, int, int]:  # type: ignore[override]  # as above
        """Shape of an image."""
        return self.training.shape

    @property
    def num_classes(self) -> int:  # type: ignore[override]  # as above
        """Number of labels."""
        return self.training.num_classes

    def prepare(self, features: Features, output: str, vectors: int = 0) -> None:
        """See ``Reference``; of the held-out half."""
        if vectors > len(self.held_out):
            raise DataError(f"got {len(self.held_out)} held-out images, expected at least {vectors}; use larger data")

    def images(self, half: str, count: int | None = None) -> Tensor:
        """Return the first ``count`` images of the half ``training`` or ``held_out``, (M, C, H, W)."""
        return self._rows(half, count)["data"]

    def labels(self, half: str, count: int | None = None) -> Tensor:
        """Return their labels, (M,)."""
        return self._rows(half, count)["label"]

    def statistics(self, features: Features, output: str) -> Statistics:
        """See ``Reference``; of the held-out half."""
        found = Moments()
        for rows in self._streamed("held_out", features, output, None):
            found.update(rows)
        return found.statistics

    def vectors(self, features: Features, output: str, count: int | None = None) -> Tensor:
        """See ``Reference``; of the held-out half."""
        return torch.cat(list(self._streamed("held_out", features, output, count)))

    def stand_in(self, features: Features, output: str, count: int) -> Tensor:
        """See ``Reference``; of the training half."""
        return torch.cat(list(self._streamed("training", features, output, count)))

    def _streamed(self, half: str, features: Features, output: str, count: int | None) -> Iterator[Tensor]:
        dataset: Dataset = getattr(self, half)
        total = len(dataset) if count is None else min(count, len(dataset))
        for first in range(0, total, _ROWS):
            images = dataset.batch(range(first, min(first + _ROWS, total)))["data"]
            yield features.outputs(images)[output]

    def _rows(self, half: str, count: int | None) -> dict[str, Tensor]:
        dataset: Dataset = getattr(self, half)
        return dataset.batch(range(len(dataset) if count is None else min(count, len(dataset))))

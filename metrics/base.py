"""What a metric is: it takes batches, merges with another of its kind, and computes a record.

N samples, M real samples, D features; images are (N, C, H, W) in [−1, 1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from torch import Tensor

from pathline import data
from pathline.core.checks import check_finite, check_labels
from pathline.core.errors import InputError, InputTypeError
from pathline.core.registry import Registry
from pathline.data import Dataset

__all__ = ["Metric", "Real", "Record", "registry"]


@dataclass(frozen=True)
class Record:
    """A result with its evidence.

    Attributes:
        metric: what was measured, with the feature space.
        count: number of generated samples.
        values: the figures of the generated samples, by name.
        real: the same figures of real samples in their place.
        real_count: number of those.
        about: what each figure says, with its ideal or range.
    """

    metric: str
    count: int
    values: Mapping[str, float]
    real: Mapping[str, float]
    real_count: int
    about: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the record fit for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Real:
    """The two halves of a real data set: what a model was trained on, and what it never saw."""

    training: Dataset
    held_out: Dataset

    @classmethod
    def of(cls, name: str) -> Real:
        """Take the halves ``train`` and ``held-out`` of a data set by name."""
        return cls(data.build(name, split="train"), data.build(name, split="held-out"))

    def check(self, batch: Mapping[str, Tensor]) -> None:
        """Check that samples are of the data's kind: ``data`` (N, C, H, W) in [−1, 1], and ``label`` (N,) if given.

        Raises:
            InputError: images of another shape or range, or labels that the data do not have.
            InputTypeError: images that are not floating point, or labels that are not whole numbers.
        """
        images = batch["data"]
        if not images.is_floating_point():
            raise InputTypeError(
                f"got samples of type {images.dtype}, expected floating point; levels a are a/127.5 - 1"
            )
        if images.ndim != 4 or tuple(images.shape[1:]) != tuple(self.training.shape):
            raise InputError(f"got samples of shape {tuple(images.shape)}, expected (N, {str(self.training.shape)[1:]}")
        check_finite(images, "samples")
        if len(images) and float(images.abs().max()) > 1:
            raise InputError(f"got samples up to ±{float(images.abs().max()):g}, expected [-1, 1]; call clamp(-1, 1)")
        if "label" in batch:
            check_labels(batch["label"], len(images), self.training.num_classes, null=False)

    def images(self, half: str, count: int | None = None) -> Tensor:
        """Return the first ``count`` images of the half ``training`` or ``held_out``, (M, C, H, W)."""
        return self._rows(half, count)["data"]

    def labels(self, half: str, count: int | None = None) -> Tensor:
        """Return their labels, (M,)."""
        return self._rows(half, count)["label"]

    def _rows(self, half: str, count: int | None) -> dict[str, Tensor]:
        dataset: Dataset = getattr(self, half)
        return dataset.batch(range(len(dataset) if count is None else min(count, len(dataset))))


class Metric(ABC):
    """A figure of merit of generated samples, beside the same figure of real ones."""

    def __init__(self, real: Real) -> None:
        self.real = real
        self.count = 0

    def update(self, batch: Mapping[str, Tensor]) -> None:
        """Take a batch in: ``data`` (N, C, H, W) in [−1, 1], and ``label`` (N,) where asked labels matter.

        Raises:
            InputError, InputTypeError: samples that are not of the data's kind, as ``Real.check`` says.
        """
        self.real.check(batch)
        self.count += len(batch["data"])
        self.take(batch)

    @abstractmethod
    def take(self, batch: Mapping[str, Tensor]) -> None:
        """Take a checked batch in."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Take in what another metric of the same kind has taken in."""

    @abstractmethod
    def compute(self) -> Record:
        """Return the record; raises InputError without samples."""

    def need(self, count: int) -> None:
        """Raise InputError unless at least ``count`` samples have been taken in."""
        if self.count < count:
            raise InputError(f"got {self.count} samples, expected at least {count}; draw more")


registry: Registry[Metric] = Registry("metric", "metrics", Metric)

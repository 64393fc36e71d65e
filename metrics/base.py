"""What a metric is: it takes batches, merges with another of its kind, and computes a record.

N samples, M real samples, D features; images are (N, C, H, W) in [−1, 1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from torch import Tensor

from pathline.core.errors import InputError
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
            InputError: images of another shape than the data's.
        """
        shape = tuple(batch["data"].shape[1:])
        if shape != tuple(self.real.training.shape):
            raise InputError(
                f"got samples of shape {shape}, expected {tuple(self.real.training.shape)} as the data have"
            )
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

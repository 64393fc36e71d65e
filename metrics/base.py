"""What a metric is: it takes batches, merges with another of its kind, and computes a record.

N samples, M real samples, D features; images are (N, C, H, W), uint8 or floats in [−1, 1].
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pathline import data
from pathline.core.checks import check_finite, check_labels
from pathline.core.errors import InputError, InputTypeError
from pathline.core.registry import Registry
from pathline.data import Dataset
from pathline.metrics.features import Features
from pathline.metrics.moments import Moments, Statistics

__all__ = ["Metric", "Real", "Record", "Reference", "check_samples", "registry"]

_ROWS = 1024  # images of a data set that are read at once


@dataclass(frozen=True)
class Record:
    """A result with its evidence.

    Attributes:
        metric: what was measured, with the feature space.
        count: number of generated samples.
        values: the figures of the generated samples, by name.
        real: the same figures of real samples in their place; empty where there are none.
        real_count: number of those.
        about: what each figure says, with its ideal or range.
        uncertainty: of figures that have one, by name.
        uncertainty_law: how it was had, or how to have one.
        reference: what the samples were compared with: the manifest of it.
        features: the feature space: its name, the hash of its weights and its sizes.
        warnings: what makes the figures less than they seem.
    """

    metric: str
    count: int
    values: Mapping[str, float]
    real: Mapping[str, float]
    real_count: int
    about: Mapping[str, str] = field(default_factory=dict)
    uncertainty: Mapping[str, float] = field(default_factory=dict)
    uncertainty_law: str | None = None
    reference: Mapping[str, Any] = field(default_factory=dict)
    features: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the record fit for JSON."""
        return asdict(self)


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


class Metric(ABC):
    """A figure of merit of generated samples, beside the same figure of real ones where there are any.

    Args:
        real: what the samples are compared with; None for a metric that needs none.
        features: the feature space; None for a metric of the images themselves.

    Raises:
        InputError: a feature space that has no such output.

    Attributes:
        output: which output of the feature space the metric is of.
        count: samples so far.
    """

    output: ClassVar[str] = "features"

    def __init__(self, real: Reference | None, features: Features | None = None) -> None:
        if features is not None and self.output not in features.sizes:
            raise InputError(
                f"got the feature space {features.name}, which gives {', '.join(features.sizes)}, for "
                f"{type(self).__name__}, which is of {self.output}; use inception"
            )
        self.real, self.features = real, features
        self.count = 0

    def update(self, batch: Mapping[str, Tensor]) -> None:
        """Take a batch in.

        Args:
            batch: ``data`` (N, C, H, W), uint8 or floats in [−1, 1]; ``label`` (N,) where asked labels matter;
                ``index`` (N,), the samples' numbers, where they come in another order, as from several processes.

        Raises:
            InputError, InputTypeError: samples that are not of the data's kind, as ``check_samples`` says.
        """
        self.check(batch)
        self.add(batch, {} if self.features is None else self.features.outputs(batch["data"]))

    def check(self, batch: Mapping[str, Tensor]) -> None:
        """Check samples against the reference, where there is one; raises as ``update`` does."""
        if self.real is None:
            check_samples(batch, None, None)
        else:
            self.real.check(batch)

    def add(self, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Take in a batch that ``check`` has seen, with the outputs of the feature space by name, (N, D) each."""
        self.count += len(batch["data"])
        self.take(batch, outputs)

    @abstractmethod
    def take(self, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Take in what ``add`` was given, which has counted it."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Take in what another metric of the same kind and options has taken in."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return all that has been taken in, as tensors on the host."""

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` of a metric of the same kind and options returned, in the place of one's own."""

    @abstractmethod
    def compute(self) -> Record:
        """Return the record; raises InputError without samples."""

    def merge_state(self, state: Mapping[str, Tensor]) -> None:
        """Merge what ``state`` of another metric of the same kind and options returned."""
        other = copy.copy(self)
        other.load(state)  # which makes containers of its own
        self.merge(other)

    def need(self, count: int) -> None:
        """Raise InputError unless at least ``count`` samples have been taken in."""
        if self.count < count:
            raise InputError(f"got {self.count} samples, expected at least {count}; draw more")

    def compared(self) -> Reference:
        """Return the reference; raises InputError without one."""
        if self.real is None:
            raise InputError(f"got no reference for {type(self).__name__}; give one")
        return self.real

    def space(self) -> tuple[Features, str]:
        """Return the feature space and which output of it; raises InputError without one."""
        if self.features is None:
            raise InputError(f"got no feature space for {type(self).__name__}; give one")
        return self.features, self.output


registry: Registry[Metric] = Registry("metric", "metrics", Metric)

"""What a metric is: it takes batches, merges with another of its kind, and computes a record.

N samples, M real samples, D features; images are (N, C, H, W), uint8 or floats in [−1, 1].
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Self

from torch import Tensor

from pathline.core.errors import InputError
from pathline.core.registry import Registry
from pathline.metrics.features import Features
from pathline.metrics.real import Real, Reference, check_samples

__all__ = ["Metric", "Real", "Record", "Reference", "check_samples", "registry"]


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


class Metric(ABC):
    """A figure of merit of generated samples, beside the same figure of real ones where there are any.

    Args:
        real: what the samples are compared with; None for a metric that needs none.
        features: the feature space; None for a metric of the images themselves.

    Raises:
        InputError: a feature space that has no such output.

    Attributes:
        output: which output of the feature space the metric is of.
        labelled: whether it needs the labels that were asked for.
        count: samples so far.
    """

    output: ClassVar[str] = "features"
    labelled: ClassVar[bool] = False

    def __init__(self, real: Reference | None, features: Features | None = None) -> None:
        if features is not None and self.output not in features.sizes:
            raise InputError(
                f"got the feature space {features.name}, which gives {', '.join(features.sizes)}, for "
                f"{type(self).__name__}, which is of {self.output}; use inception"
            )
        self.real, self.features = real, features
        self.count = 0

    @property
    def least(self) -> int:
        """Number of samples that it needs."""
        return 1

    def expects(self, count: int, *, labelled: bool) -> None:
        """Check what can be checked before the first sample is there, so that none is drawn or read in vain.

        Args:
            count: number of samples to come.
            labelled: whether they will have labels.

        Raises:
            InputError: too few, or without the labels that the metric needs.
            DataError: a reference that does not have what the metric compares with.
        """
        if count < self.least:
            raise InputError(f"got {count} samples, expected at least {self.least}; {self.advice()}")
        if self.labelled and not labelled:
            raise InputError(
                f"got samples without labels for {type(self).__name__}, expected those that were asked for"
            )

    def advice(self) -> str:
        """Return what to do about too few samples."""
        return "draw more"

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

    def need(self) -> None:
        """Raise InputError unless as many samples have been taken in as it needs."""
        if self.count < self.least:
            raise InputError(f"got {self.count} samples, expected at least {self.least}; {self.advice()}")

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

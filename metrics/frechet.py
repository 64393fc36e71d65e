"""The Fréchet distance between Gaussians fitted to features, in float64."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from pathline.core.checks import check_finite
from pathline.core.errors import InputError
from pathline.metrics.base import Metric, Real, Record, registry
from pathline.metrics.features import Features

__all__ = ["Frechet", "Moments", "frechet_distance"]


class Moments:
    """Count, mean and scatter of (N, D) features, merged chunk by chunk in float64.

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.scatter = torch.zeros(0, 0, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Take in (N, D) features; raises InputError for a NaN or an infinity."""
        check_finite(features, "features")
        if not len(features):  # the mean of no rows is NaN
            return
        features = features.double()
        mean = features.mean(0)
        centred = features - mean
        self._add(len(features), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Take in what ``other`` has taken in."""
        if other.count:
            self._add(other.count, other.mean, other.scatter)

    @property
    def covariance(self) -> Tensor:
        """Covariance with N − 1 in the denominator; raises InputError below two samples."""
        if self.count < 2:
            raise InputError(f"got {self.count} samples, expected at least 2 for a covariance")
        return self.scatter / (self.count - 1)

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if not self.count:
            self.count, self.mean, self.scatter = count, mean.clone(), scatter.clone()
            return
        total = self.count + count
        shift = mean - self.mean
        self.scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total


def frechet_distance(first: Moments, second: Moments) -> float:
    """Return ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2·tr (Σ₁Σ₂)^½, ≥ 0, exact for rank-deficient covariances too.

    With Σᵢ = AᵢAᵢᵀ from eigen-decompositions, the last trace is the sum of the singular values of A₁ᵀA₂.
    """
    one, two = first.covariance, second.covariance
    if min(first.count, second.count) < len(first.mean):
        warnings.warn(
            f"{min(first.count, second.count)} samples for {len(first.mean)} features: the distance is biased upwards",
            stacklevel=2,
        )
    cross = torch.linalg.svdvals(_root(one).T @ _root(two)).sum()
    traces = one.trace() + two.trace()
    distance = float((first.mean - second.mean).square().sum() + traces - 2 * cross)
    if distance < -1e-6 * float(traces):
        raise InputError(
            f"got a Fréchet distance of {distance:g}, expected 0 or more; a covariance has negative eigenvalues"
        )
    return max(distance, 0.0)


def _root(covariance: Tensor) -> Tensor:
    """Return A of shape (D, rank) with AAᵀ = Σ."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > len(values) * torch.finfo(torch.float64).eps * values.max()
    root: Tensor = vectors[:, kept] * values[kept].sqrt()
    return root


@registry.register("frechet")
class Frechet(Metric):
    """Fréchet distance of the samples to the held-out half, beside that of as many training images.

    Args:
        real: the two halves of the data.
        features: the feature space.
    """

    def __init__(self, real: Real, features: Features) -> None:
        super().__init__(real)
        self.features = features
        self.moments = Moments()

    def take(self, batch: Mapping[str, Tensor]) -> None:
        """Update the moments."""
        self.moments.update(self.features(batch["data"]))

    def merge(self, other: Frechet) -> None:
        """Merge the moments."""
        self.count += other.count
        self.moments.merge(other.moments)

    def compute(self) -> Record:
        """Return the distance."""
        self.need(2)
        held_out, training = Moments(), Moments()
        held_out.update(self.features(self.real.images("held_out")))
        training.update(self.features(self.real.images("training", self.count)))
        return Record(
            f"frechet, {self.features.name}",
            self.count,
            {"distance": frechet_distance(self.moments, held_out)},
            {"distance": frechet_distance(training, held_out)},
            training.count,
            {"distance": "to the held-out half; 0 is equal"},
        )

"""The Fréchet distance between Gaussians fitted to features, in float64.

N samples, D features.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from pathline.core.checks import check_finite
from pathline.core.draws import Draws
from pathline.core.errors import InputError
from pathline.metrics.base import Metric, Record, Reference, registry
from pathline.metrics.features import Features
from pathline.metrics.moments import Moments, Statistics

__all__ = [
    "Frechet",
    "FrechetInception",
    "Moments",
    "SpatialFrechet",
    "Statistics",
    "check_covariance",
    "few_samples",
    "frechet_distance",
    "trace_by_eigenvalues",
    "trace_by_factors",
]

_EPS = torch.finfo(torch.float64).eps
_NEGATIVE = 1e-6  # of the trace: how far below zero rounding takes an eigenvalue, as that of float32
_TOLERANCE = 1e-7  # of the traces: up to this bound of its error the cheaper form is taken


def frechet_distance(first: Moments | Statistics, second: Moments | Statistics) -> float:
    """Return ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2·tr (Σ₁Σ₂)^½, ≥ 0, with N − 1 in the covariances.

    The last trace comes from ``trace_by_eigenvalues`` where both covariances have full rank and its error is bounded
    by 1e-7 of the traces, and from ``trace_by_factors`` elsewhere, which is exact for any rank. No matrix is made
    complex, and nothing is added to a diagonal.

    Raises:
        InputError: statistics of other sizes, with a NaN or an infinity, or a matrix that is no covariance.
    """
    if first.mean.shape != second.mean.shape:
        raise InputError(
            f"got statistics of {len(first.mean)} and {len(second.mean)} features, expected the same feature space"
        )
    said = few_samples(first, second)
    if said:
        warnings.warn(said, stacklevel=2)
    one, two = first.covariance.double(), second.covariance.double().to(first.covariance.device)
    for statistics, covariance in ((first, one), (second, two)):
        check_finite(statistics.mean, "a mean")
        check_covariance(covariance, "a covariance")
    traces = float(one.trace() + two.trace())
    cross = None if said else trace_by_eigenvalues(one, two, _TOLERANCE * traces)
    if cross is None:
        cross = trace_by_factors(one, two)
    shift = first.mean.double() - second.mean.double().to(first.mean.device)
    distance = float(shift.square().sum()) + traces - 2 * cross
    return max(distance, 0.0)


def check_covariance(matrix: Tensor, name: str) -> None:
    """Check that a matrix (D, D) may be a covariance: finite, symmetric, and of no negative eigenvalue, up to rounding.

    Rounding is 1e-5 of the largest entry for symmetry, and 1e-6 of the trace for eigenvalues: Σ + 1e-6·tr Σ has a
    Cholesky factor unless one is below.

    Raises:
        InputError: it is none.
    """
    check_finite(matrix, name)
    if float((matrix - matrix.T).abs().max()) > 1e-5 * float(matrix.abs().max()):
        raise InputError(f"got {name} that is not symmetric, expected a covariance")
    shifted = (matrix + matrix.T).double() / 2
    shifted.diagonal().add_(_NEGATIVE * float(matrix.diagonal().sum()))
    if bool(matrix.any()) and int(torch.linalg.cholesky_ex(shifted).info):
        raise InputError(f"got {name} with a negative eigenvalue, expected a covariance, which has none")


def few_samples(first: Moments | Statistics, second: Moments | Statistics) -> str | None:
    """Return what is to be said of samples that are fewer than their features, whose covariance has no full rank."""
    counts = [statistics.count for statistics in (first, second) if statistics.count is not None]
    if not counts or min(counts) >= len(first.mean):
        return None
    return f"{min(counts)} samples for {len(first.mean)} features: the distance is biased upwards"


def trace_by_eigenvalues(one: Tensor, two: Tensor, tolerance: float) -> float | None:
    """Return tr (Σ₁Σ₂)^½ as Σ √λ over the eigenvalues λ of LᵀΣ₁L with Σ₂ = LLᵀ, or None if it cannot be trusted.

    A symmetric eigenvalue solver errs by δ, a few ε·λ_max, in every λ, and so by up to √(λ + δ) − √λ in the sum: much
    where eigenvalues are small, as √ε each where they are zero.

    Args:
        one: Σ₁, (D, D) in float64.
        two: Σ₂.
        tolerance: of the error's bound.
    """
    factor, failed = torch.linalg.cholesky_ex(two)
    if int(failed):
        return None
    product = factor.T @ one @ factor
    values = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0)
    error = 16 * _EPS * values.max()
    bound = float(((values + error).sqrt() - values.sqrt()).sum())
    return float(values.sqrt().sum()) if bound <= tolerance else None


def trace_by_factors(one: Tensor, two: Tensor) -> float:
    """Return tr (Σ₁Σ₂)^½ as the sum of the singular values of A₁ᵀA₂ with Σᵢ = AᵢAᵢᵀ, exact for any rank."""
    return float(torch.linalg.svdvals(_root(one).T @ _root(two)).sum())


def _root(covariance: Tensor) -> Tensor:
    """Return A of shape (D, rank) with AAᵀ = Σ."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    kept = values > len(values) * _EPS * values.max()
    root: Tensor = vectors[:, kept] * values[kept].sqrt()
    return root


@registry.register("frechet", aliases=("fd",))
class Frechet(Metric):
    """Fréchet distance of the samples to a reference in any feature space.

    With ``features`` of timm this is FD-DINOv2 and its like. It falls with the number of samples, as 1/N, so that
    values of different N do not compare. Beside a ``Real`` is the distance of as many training images.

    Args:
        real: what to compare with.
        features: the feature space.
        groups: G ≥ 2 of a delete-a-group jackknife for a standard error: a sample's group is drawn by its number, each
            group is left out once, and the error is √((G−1)/G·Σ(dᵢ − d̄)²). It tells of the samples' draw alone, not
            of the training's seed nor of the bias with N; it takes labels as drawn, so that with balanced ones it is
            too large where classes differ much, and of samples that cannot be told from the reference it is up to √2
            too large. It costs G more distances. 0: none.

    Raises:
        InputError: a feature space without the output, or one group.
    """

    title: ClassVar[str] = "frechet"

    def __init__(self, real: Reference, features: Features, groups: int = 0) -> None:
        super().__init__(real, features)
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 0 or groups == 1:
            raise InputError(f"got groups {groups!r}, expected 0, or 2 and more")
        self.groups = groups
        self.parts = [Moments() for _ in range(max(1, groups))]

    @property
    def least(self) -> int:
        """Two for a covariance, and ten a group, as groups are of about one size."""
        return max(2, 10 * self.groups)

    def advice(self) -> str:
        """See ``Metric``."""
        return "draw more, or set groups to fewer" if self.groups else "draw more"

    def expects(self, count: int, *, labelled: bool) -> None:
        """See ``Metric``."""
        super().expects(count, labelled=labelled)
        self.compared().prepare(*self.space())

    def take(self, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Update the moments."""
        rows = outputs[self.output]
        if not self.groups:
            self.parts[0].update(rows)
            return
        numbers = batch.get("index", torch.arange(self.count - len(rows), self.count))
        # drawn, as numbers modulo G may go with labels
        drawn = (Draws(0).uniform("jackknife", numbers).double() * self.groups).long().to(rows.device)
        for group, part in enumerate(self.parts):
            part.update(rows[drawn == group])

    def merge(self, other: Frechet) -> None:
        """Merge the moments."""
        self.count += other.count
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine.merge(theirs)

    def state(self) -> dict[str, Tensor]:
        """Return the moments of every group."""
        return {f"{group}.{key}": value for group, part in enumerate(self.parts) for key, value in part.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take them over."""
        self.parts = [Moments() for _ in self.parts]
        for group, part in enumerate(self.parts):
            part.load({key: state[f"{group}.{key}"] for key in ("count", "mean", "scatter")})
        self.count = sum(part.count for part in self.parts)

    def compute(self) -> Record:
        """Return the distance."""
        self.need()
        reference, (features, output) = self.compared(), self.space()
        known = reference.statistics(features, output)
        moments, real = _merged(self.parts), reference.stand_in(features, output, self.count)
        training = Moments()
        if real is not None:
            training.update(real)
        errors, law = self._errors(known)
        said = few_samples(moments, known)
        return Record(
            f"{self.title}, {features.name}",
            self.count,
            {"distance": frechet_distance(moments, known)},
            {"distance": frechet_distance(training, known)} if training.count > 1 else {},
            training.count,
            {"distance": "to the reference; 0 is equal"},
            uncertainty=errors,
            uncertainty_law=law,
            reference={**reference.manifest, "count": known.count},
            features=dict(features.manifest),
            warnings=((said,) if said else ()) + reference.doubts(features),
        )

    def _errors(self, known: Statistics) -> tuple[dict[str, float], str]:
        if not self.groups:
            return {}, "none: draw 3 times with other seeds and tell all three, or set groups for a jackknife"
        rest = [_merged(self.parts[:g] + self.parts[g + 1 :]) for g in range(self.groups)]
        distances = torch.tensor([frechet_distance(part, known) for part in rest], dtype=torch.float64)
        scatter = float((distances - distances.mean()).square().sum())
        law = f"standard error by a jackknife over {self.groups} groups of samples; of their draw alone"
        return {"distance": ((self.groups - 1) / self.groups * scatter) ** 0.5}, law


def _merged(parts: Sequence[Moments]) -> Moments:
    found = Moments()
    for part in parts:
        found.merge(part)
    return found


@registry.register("fid")
class FrechetInception(Frechet):
    """The Fréchet Inception distance (arXiv:1706.08500): ``frechet`` of Inception's 2048 pooled features."""

    title: ClassVar[str] = "fid"


@registry.register("sfid")
class SpatialFrechet(Frechet):
    """sFID as ADM has it: ``frechet`` of seven channels of Inception's ``mixed_6``, place by place, 2023 values."""

    title: ClassVar[str] = "sfid"
    output: ClassVar[str] = "spatial"

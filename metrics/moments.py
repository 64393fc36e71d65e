"""Count, mean and scatter of features, and rows of them with their samples' numbers: what metrics keep of a stream.

N samples, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pathline.core.checks import check_finite
from pathline.core.errors import InputError

__all__ = ["Moments", "Rows", "Statistics"]


@dataclass(frozen=True)
class Statistics:
    """What a Fréchet distance is computed from, as a file holds it.

    Attributes:
        mean: (D,).
        covariance: (D, D), with N − 1 in the denominator.
        count: N; None where a file does not tell.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None


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

    def state(self) -> dict[str, Tensor]:
        """Return count, mean and scatter on the host."""
        return {"count": torch.tensor(self.count), "mean": self.mean.cpu(), "scatter": self.scatter.cpu()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` returned."""
        self.count = int(state["count"])
        self.mean, self.scatter = state["mean"].clone(), state["scatter"].clone()

    @property
    def covariance(self) -> Tensor:
        """Covariance with N − 1 in the denominator; raises InputError below two samples."""
        if self.count < 2:
            raise InputError(f"got {self.count} samples, expected at least 2 for a covariance")
        return self.scatter / (self.count - 1)

    @property
    def statistics(self) -> Statistics:
        """Mean, covariance and count."""
        return Statistics(self.mean, self.covariance, self.count)

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if not self.count:
            self.count, self.mean, self.scatter = count, mean.clone(), scatter.clone()
            return
        total = self.count + count
        shift = mean.to(self.mean) - self.mean
        self.scatter += scatter.to(self.scatter) + torch.outer(shift, shift) * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total


class Rows:
    """Rows by the numbers of their samples, in whatever order they come; without numbers, in the order of coming."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._numbers: list[Tensor] = []

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def add(self, rows: Tensor, numbers: Tensor | None = None) -> None:
        """Take in (N, …) rows, kept on the host, and the numbers (N,) of their samples.

        Raises:
            InputError: numbers for some rows and none for others.
        """
        if not len(rows):
            return
        if self._parts and bool(self._numbers) != (numbers is not None):
            raise InputError("got numbers of samples for some batches and none for others; give them for all or none")
        self._parts.append(rows.detach().cpu())
        if numbers is not None:
            self._numbers.append(numbers.detach().cpu())

    def merge(self, other: Rows) -> None:
        """Take in what ``other`` has taken in; raises InputError where one has numbers and the other none."""
        if len(other):
            self.add(torch.cat(other._parts), torch.cat(other._numbers) if other._numbers else None)

    def all(self) -> Tensor:
        """Return all rows in the order of their numbers; raises InputError for a sample that came twice."""
        rows = torch.cat(self._parts)
        if not self._numbers:
            return rows
        numbers, order = torch.cat(self._numbers).sort()
        twice = numbers[1:][numbers.diff() == 0]
        if len(twice):
            raise InputError(f"got sample {int(twice[0])} twice; give every sample once")
        return rows if torch.equal(order, torch.arange(len(order))) else rows[order]

    def state(self) -> dict[str, Tensor]:
        """Return rows and numbers, where there are any."""
        found = {"rows": self._parts, "numbers": self._numbers}
        return {name: torch.cat(parts) for name, parts in found.items() if parts}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` returned."""
        self._parts = [state["rows"]] if "rows" in state else []
        self._numbers = [state["numbers"]] if "numbers" in state else []

"""Figures of channels, in one pass and in float64: parts are merged, so that no sum of squares loses its digits.

C channels.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from pathline.data.prepare.manifest import Channels

__all__ = ["Spread"]


class Spread(BaseModel):
    """Count, mean, sum of squares about it, and ends of values, channel by channel; fit for JSON without loss.

    Attributes:
        count: values a channel.
        mean: (C,), as the others.
        squares: Σ(value − mean)².
        low: smallest values.
        high: largest ones.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    _LISTS: ClassVar = ("mean", "squares", "low", "high")
    count: int
    mean: list[float]
    squares: list[float]
    low: list[float]
    high: list[float]

    @classmethod
    def of(cls, values: Tensor) -> Spread:
        """Take in values (N, C, H, W); uint8 as images in [−1, 1]."""
        rows = values.transpose(0, 1).flatten(1)
        if values.dtype != torch.uint8:
            return cls._weighted(rows.double(), torch.ones((), dtype=torch.float64), rows.shape[1])
        levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
        counts = torch.stack([torch.bincount(row, minlength=256) for row in rows])  # far fewer numbers than pixels
        found = [cls._weighted(levels[None, count > 0], count[count > 0].double(), rows.shape[1]) for count in counts]
        joined = {key: [number for one in found for number in getattr(one, key)] for key in cls._LISTS}
        return cls(count=rows.shape[1], **joined)

    @classmethod
    def _weighted(cls, rows: Tensor, weights: Tensor, count: int) -> Spread:
        """Take in the values of each channel (C, n), of which each comes ``weights`` times, ``count`` in all."""
        mean = (rows * weights).sum(1) / count
        low, high = torch.aminmax(rows, dim=1)
        squares = ((rows - mean[:, None]).square_() * weights).sum(1)
        return cls(count=count, mean=mean.tolist(), squares=squares.tolist(), low=low.tolist(), high=high.tolist())

    @classmethod
    def from_channels(cls, told: Channels) -> Spread:
        """Take what a manifest tells."""
        squares = [std**2 * (told.count - 1) for std in told.std]
        return cls(count=told.count, mean=told.mean, squares=squares, low=told.low, high=told.high)

    def merged(self, other: Spread) -> Spread:
        """Return the figures of both (Chan, Golub and LeVeque, "Updating formulae", 1979, Eq. 2.1)."""
        count = self.count + other.count
        ours, theirs = np.array(self.mean), np.array(other.mean)
        gap = theirs - ours
        mean = ours + gap * (other.count / count)
        squares = np.array(self.squares) + other.squares + gap**2 * (self.count * other.count / count)
        return Spread(
            count=count,
            mean=_listed(mean),
            squares=_listed(squares),
            low=_listed(np.minimum(self.low, other.low)),
            high=_listed(np.maximum(self.high, other.high)),
        )

    def channels(self) -> Channels:
        """Return what a manifest tells of it."""
        std = np.sqrt(np.array(self.squares) / max(self.count - 1, 1))
        return Channels(count=self.count, mean=self.mean, std=_listed(std), low=self.low, high=self.high)


def _listed(values: NDArray[np.float64]) -> list[float]:
    found: Any = values.tolist()
    return list(found)

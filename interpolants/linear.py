"""The straight path of rectified flow and optimal-transport flow matching."""

from __future__ import annotations

import torch
from torch import Tensor

from pathline.interpolants.base import Coefficients, Interpolant, registry

__all__ = ["Linear"]


@registry.register("linear", aliases=("rectified",))
class Linear(Interpolant):
    """x_t = (1 − t)·data + t·noise, velocity noise − data (arXiv:2209.03003, arXiv:2210.02747 with σ_min = 0)."""

    straight = True

    def evaluate(self, t: Tensor) -> Coefficients:
        """Return 1 − t, t, −1 and 1."""
        one = torch.ones_like(t)
        return Coefficients(1 - t, t, -one, one)

    def _time_at(self, angle: Tensor) -> Tensor:
        return torch.sin(angle) / (torch.sin(angle) + torch.cos(angle))

"""The polynomial path."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pathline.core.errors import InputError
from pathline.interpolants.base import Coefficients, Interpolant, registry

__all__ = ["Polynomial"]


@registry.register("polynomial")
class Polynomial(Interpolant):
    """α = (1 − t)ᵖ, σ = 1 − α (arXiv:2412.06264). Power 1 is the linear path.

    Above power 1 it stands still at t = 1, where no conversion from a velocity exists; below it, its rates are
    infinite there.

    Args:
        power: p > 0.

    Raises:
        InputError: a power that is not above 0.
    """

    def __init__(self, power: float = 2.0) -> None:
        if not 0 < power < math.inf:
            raise InputError(f"got power {power}, expected a finite number above 0")
        self.power = float(power)

    def evaluate(self, t: Tensor) -> Coefficients:
        """Return (1 − t)ᵖ, 1 − (1 − t)ᵖ and their rates ∓p·(1 − t)ᵖ⁻¹."""
        alpha = (1 - t) ** self.power
        sigma = torch.where(t < 0.5, -torch.expm1(self.power * torch.log1p(-t)), 1 - alpha)
        rate = self.power * (1 - t) ** (self.power - 1)
        return Coefficients(alpha, sigma, -rate, rate)

    def _time_at(self, angle: Tensor) -> Tensor:
        return -torch.expm1(-torch.log1p(torch.tan(angle)) / self.power)

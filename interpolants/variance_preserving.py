"""Paths that keep α² + σ² = 1, from diffusion models. Their σ' is infinite at t = 0."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pathline.core.errors import InputError
from pathline.interpolants.base import Coefficients, Interpolant, registry

__all__ = ["LinearVariancePreserving", "VariancePreserving"]


@registry.register("vp", aliases=("variance-preserving",))
class VariancePreserving(Interpolant):
    """α = exp(−B/2), σ = √(1 − exp(−B)), B = ∫₀ᵗβ, β(t) = beta_min + t·(beta_max − beta_min) (arXiv:2011.13456).

    It ends a little before pure noise: α(1) = exp(−(beta_min + beta_max)/4) = 0.0066 by default.

    Args:
        beta_min: β at data, above 0; the paper's 0.1.
        beta_max: β at noise, at least beta_min; the paper's 20.

    Raises:
        InputError: betas out of order or not finite.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if not 0 < beta_min <= beta_max < math.inf:
            raise InputError(f"got beta_min {beta_min} and beta_max {beta_max}, expected 0 < beta_min <= beta_max")
        self.beta_min, self.beta_max = float(beta_min), float(beta_max)

    def evaluate(self, t: Tensor) -> Coefficients:
        """Return α, σ, −½βα and ½β·exp(−B)/σ."""
        growth = self.beta_max - self.beta_min
        total = t * (self.beta_min + 0.5 * t * growth)
        beta = self.beta_min + t * growth
        alpha, sigma = torch.exp(-total / 2), torch.sqrt(-torch.expm1(-total))
        return Coefficients(alpha, sigma, -0.5 * beta * alpha, 0.5 * beta * torch.exp(-total) / sigma)

    def _time_at(self, angle: Tensor) -> Tensor:
        """Solve B(t) = −ln(1 − sin²) for t."""
        total = -torch.log1p(-torch.sin(angle).square())
        root = (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * total).sqrt()
        return 2 * total / (self.beta_min + root)


@registry.register("linear-vp")
class LinearVariancePreserving(Interpolant):
    """x_t = (1 − t)·data + √(t(2 − t))·noise: α falls linearly and α² + σ² = 1 (arXiv:2412.06264)."""

    def evaluate(self, t: Tensor) -> Coefficients:
        """Return 1 − t, √(t(2 − t)), −1 and (1 − t)/σ."""
        alpha, sigma = 1 - t, torch.sqrt(t * (2 - t))
        return Coefficients(alpha, sigma, -torch.ones_like(t), alpha / sigma)

    def _time_at(self, angle: Tensor) -> Tensor:
        return 2 * torch.sin(angle / 2).square()

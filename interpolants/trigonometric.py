"""The trigonometric path, of constant speed on the circle α² + σ² = 1."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pathline.interpolants.base import Coefficients, Interpolant, registry

__all__ = ["Trigonometric"]


@registry.register("trigonometric", aliases=("gvp", "cosine"))
class Trigonometric(Interpolant):
    """x_t = cos(πt/2)·data + sin(πt/2)·noise, SiT's generalised variance-preserving path (arXiv:2401.08740)."""

    def evaluate(self, t: Tensor) -> Coefficients:
        """Return cos(πt/2), sin(πt/2) and their rates; the cosine as a sine, so that it is 0 at t = 1."""
        half = math.pi / 2
        alpha, sigma = torch.sin(half * (1 - t)), torch.sin(half * t)
        return Coefficients(alpha, sigma, -half * sigma, half * alpha)

    def _time_at(self, angle: Tensor) -> Tensor:
        return angle * (2 / math.pi)

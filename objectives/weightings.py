"""Weights of a loss along the path, by name, for losses in the space of velocity, noise, score or data.

An error δ of one prediction is an error of another: δ_velocity = −(W/σ)·δ_data = (W/α)·δ_noise, W = σ'α − α'σ. A loss
measured in the one space with weight w is the loss of the other with w times the square of that factor. A score is
measured in units of the noise, ‖σ·s + noise‖².

N samples; t has shape (N,).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from pathline.core.errors import InputError
from pathline.core.registry import Registry
from pathline.interpolants.base import Coefficients, Interpolant

__all__ = ["Weighting", "WeightingSpec", "build", "names", "register", "registry", "velocity_factor"]


def velocity_factor(at: Coefficients, kind: str) -> Tensor:
    """Return the squared factor from an error of ``kind`` to one of the velocity: 1, (W/α)² or (W/σ)²."""
    if kind == "data":
        return (at.wronskian / at.sigma).square()
    return (at.wronskian / at.alpha).square() if kind in ("noise", "score") else torch.ones_like(at.alpha)


class Weighting(ABC):
    """A weight for every time."""

    @abstractmethod
    def weight(self, t: Tensor, interpolant: Interpolant, kind: str) -> Tensor:
        """Return the weight of a loss in the space of ``kind`` at times (N,), in their precision."""

    def check(self, interpolant: Interpolant, kind: str, interval: tuple[float, float]) -> None:
        """Raise InputError if the weight is infinite or undefined at an end of the interval of training."""
        ends = torch.tensor(interval, dtype=torch.float64)
        for t, value in zip(interval, self.weight(ends, interpolant, kind), strict=True):
            if not bool(value.isfinite()) or float(value) > 1e12:  # 1/cos²(π/2) is 3e32, not infinite
                raise InputError(
                    f"got the weighting {type(self).__name__} for a predicted {kind} on the "
                    f"{type(interpolant).__name__} path, infinite at t = {t:g}; keep the objective's interval away "
                    "from it, as interval=(0.001, 0.999)"
                )


registry: Registry[Weighting] = Registry("weighting", "objectives.weightings", Weighting)
register, build, names = registry.register, registry.build, registry.names

WeightingSpec = Annotated[Weighting | str | Mapping[str, Any], registry]


@registry.register("none")
class Uniform(Weighting):
    """1, in the space of what is predicted."""

    def weight(self, t: Tensor, interpolant: Interpolant, kind: str) -> Tensor:
        """Return ones."""
        return torch.ones_like(t)

    def check(self, interpolant: Interpolant, kind: str, interval: tuple[float, float]) -> None:
        """Accept any path."""


@registry.register("velocity")
class Velocity(Weighting):
    """The loss of the velocity, whatever is predicted: (W/α)² on noise, SiT's "velocity" (arXiv:2401.08740, 3.2)."""

    def weight(self, t: Tensor, interpolant: Interpolant, kind: str) -> Tensor:
        """Return the squared factor to velocities."""
        return velocity_factor(interpolant.evaluate(t), kind)


@registry.register("likelihood")
class Likelihood(Weighting):
    """½·g² on the squared error of the score, g the path's own: a bound of the likelihood (arXiv:2101.09258).

    W/(ασ) on noise, SiT's "likelihood".
    """

    def weight(self, t: Tensor, interpolant: Interpolant, kind: str) -> Tensor:
        """Return α/(σW) times the squared factor to velocities."""
        at = interpolant.evaluate(t)
        w = at.wronskian
        if kind in ("noise", "score"):
            return w / (at.alpha * at.sigma)
        return w * at.alpha / at.sigma**3 if kind == "data" else at.alpha / (at.sigma * w)


@registry.register("sigma-sqrt")
class SigmaSqrt(Weighting):
    """σ⁻² on the loss of what is predicted, as in the Stable Diffusion 3 recipes (arXiv:2403.03206)."""

    def weight(self, t: Tensor, interpolant: Interpolant, kind: str) -> Tensor:
        """Return σ⁻²."""
        return interpolant.evaluate(t).sigma ** -2


@registry.register("cosmap")
class CosMap(Weighting):
    """2/(π·(1 − 2t + 2t²)) on the loss of what is predicted, the density of the law ``cosmap`` (arXiv:2403.03206)."""

    def weight(self, t: Tensor, interpolant: Interpolant, kind: str) -> Tensor:
        """Return the density."""
        return 2 / (math.pi * (1 - 2 * t + 2 * t**2))


@registry.register("min-snr")
class MinSnr(Weighting):
    """min(α², γσ²)/W² in the space of velocities, min(α²/σ², γ) on data (arXiv:2303.09556, carried over by W).

    Args:
        gamma: above 0; the paper's 5.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        if not 0 < gamma < math.inf:
            raise InputError(f"got gamma {gamma}, expected a finite number above 0")
        self.gamma = gamma

    def weight(self, t: Tensor, interpolant: Interpolant, kind: str) -> Tensor:
        """Return the weight on data, min(SNR, γ), on noise, min(1, γ/SNR), or on velocities."""
        at = interpolant.evaluate(t)
        least = torch.minimum(at.alpha**2, self.gamma * at.sigma**2)
        if kind == "data":
            return torch.where(at.sigma == 0, self.gamma, least / at.sigma**2)
        if kind in ("noise", "score"):
            return torch.where(at.alpha == 0, 1.0, least / at.alpha**2)
        return least / at.wronskian**2

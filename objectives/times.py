"""Laws of time: how training times are drawn. t = 0 is data, t = 1 is noise.

A law is its quantile function and its density. Laws over another law are in ``derived_times``.

N samples; t has shape (N,).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from pathline.core.draws import BoundDraws
from pathline.core.errors import InputError
from pathline.core.registry import Registry
from pathline.interpolants.base import Interpolant, InterpolantSpec
from pathline.interpolants.base import registry as paths

__all__ = [
    "CosMap",
    "LogNormal",
    "LogitNormal",
    "Mode",
    "TimeLaw",
    "TimeLawSpec",
    "UShaped",
    "Uniform",
    "build",
    "names",
    "register",
    "registry",
]


class TimeLaw(ABC):
    """A distribution over [0, 1]."""

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Return the times below which the law has probability u in [0, 1], in u's shape and precision."""

    @abstractmethod
    def density(self, t: Tensor) -> Tensor:
        """Return the density at times in (0, 1), in t's shape and precision."""

    def sample(self, draws: BoundDraws) -> Tensor:
        """Return one time a sample, (N,) float32 on the host, from the stream ``time``."""
        return self.quantile(draws.uniform("time").double()).float().clamp(0, 1)

    def bind(self, interpolant: Interpolant) -> TimeLaw:
        """Return this law for a path; itself, unless it is stated in a path's noise level."""
        return self


registry: Registry[TimeLaw] = Registry("law of time", "objectives.times", TimeLaw)
register, build, names = registry.register, registry.build, registry.names

TimeLawSpec = Annotated[TimeLaw | str | Mapping[str, Any], registry]


@registry.register("uniform")
class Uniform(TimeLaw):
    """Uniform on [0, 1)."""

    def quantile(self, u: Tensor) -> Tensor:
        """Return u."""
        return u

    def density(self, t: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(t)


def _check_normal(mean: float, std: float) -> None:
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise InputError(f"got mean {mean} and std {std}, expected finite numbers, std above 0")


def _normal_density(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)


@registry.register("logit-normal")
class LogitNormal(TimeLaw):
    """t = sigmoid(mean + std·n), n standard normal (arXiv:2403.03206, Eq. 19).

    Args:
        mean: shifts the mass towards noise (positive) or data (negative).
        std: spread, above 0; the paper's best is mean 0, std 1.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        _check_normal(mean, std)
        self.mean, self.std = mean, std

    def quantile(self, u: Tensor) -> Tensor:
        """Return sigmoid(mean + std·Φ⁻¹(u))."""
        scaled: Tensor = self.mean + self.std * torch.special.ndtri(u)
        return scaled.sigmoid()

    def density(self, t: Tensor) -> Tensor:
        """Return φ((logit t − mean)/std)/(std·t·(1 − t))."""
        return _normal_density((torch.logit(t) - self.mean) / self.std) / (self.std * t * (1 - t))

    def sample(self, draws: BoundDraws) -> Tensor:
        """Return (N,) logit-normal times."""
        return (self.mean + self.std * draws.normal("time")).sigmoid()


@registry.register("lognormal")
class LogNormal(TimeLaw):
    """EDM's law: the ratio of noise to data σ(t)/α(t) is exp(mean + std·n) (arXiv:2206.00364, Table 1).

    On the linear path it is the logit-normal law of the same numbers.

    Args:
        mean: of ln(σ/α); the paper's −1.2.
        std: above 0; the paper's 1.2.
        interpolant: the path whose noise levels these are; None is the objective's own, linear where there is none.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2, *, interpolant: InterpolantSpec | None = None) -> None:
        _check_normal(mean, std)
        self.mean, self.std = mean, std
        self.interpolant: Interpolant = paths.build("linear" if interpolant is None else interpolant)
        self._named = interpolant is not None

    def quantile(self, u: Tensor) -> Tensor:
        """Return the time at which σ/α is exp(mean + std·Φ⁻¹(u))."""
        return self.interpolant.time_at(torch.atan(torch.exp(self.mean + self.std * torch.special.ndtri(u))))

    def density(self, t: Tensor) -> Tensor:
        """Return φ((ln(σ/α) − mean)/std)·W/(ασ)/std, since d ln(σ/α)/dt = W/(ασ)."""
        at = self.interpolant.evaluate(t)
        z = ((at.sigma / at.alpha).log() - self.mean) / self.std
        return _normal_density(z) * at.wronskian / (at.alpha * at.sigma * self.std)

    def bind(self, interpolant: Interpolant) -> TimeLaw:
        """Return the law of the same noise levels on the objective's path, unless this one was built with a path."""
        return self if self._named else LogNormal(self.mean, self.std, interpolant=interpolant)


@registry.register("mode")
class Mode(TimeLaw):
    """t = 1 − u − scale·(cos²(πu/2) − 1 + u): heavy in the middle and light at the ends, or the reverse.

    From arXiv:2403.03206, Eq. 20; the quantile function here is of 1 − u, so that it grows.

    Args:
        scale: in [−1, 2/(π − 2)] = [−1, 1.752], where it is monotone; the paper's choice 1.29. 0 is uniform.
    """

    limits = (-1.0, 2 / (math.pi - 2))

    def __init__(self, scale: float = 1.29) -> None:
        low, high = self.limits
        if not low <= scale <= high:
            raise InputError(
                f"got scale {scale}, expected a number in [{low:g}, {high:.6g}], where the law is monotone"
            )
        self.scale = scale

    def quantile(self, u: Tensor) -> Tensor:
        """Return u − scale·(sin²(πu/2) − u)."""
        return u - self.scale * (torch.sin(math.pi / 2 * u).square() - u)

    def density(self, t: Tensor) -> Tensor:
        """Return 1 over the quantile's slope, at the u that bisection finds."""
        low, high = torch.zeros_like(t, dtype=torch.float64), torch.ones_like(t, dtype=torch.float64)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.quantile(middle) < t
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        u = (low + high) / 2
        return (1 / (1 + self.scale - self.scale * math.pi / 2 * torch.sin(math.pi * u))).to(t.dtype)


@registry.register("cosmap")
class CosMap(TimeLaw):
    """t = 1 − 1/(tan(πu/2) + 1): the cosine schedule's noise levels on the linear path (arXiv:2403.03206)."""

    def quantile(self, u: Tensor) -> Tensor:
        """Return sin/(sin + cos) of πu/2, the same without an infinite tangent."""
        sine, cosine = torch.sin(math.pi / 2 * u), torch.sin(math.pi / 2 * (1 - u))
        return sine / (sine + cosine)

    def density(self, t: Tensor) -> Tensor:
        """Return 2/(π·(1 − 2t + 2t²))."""
        return 2 / (math.pi * (1 - 2 * t + 2 * t.square()))


@registry.register("u-shaped")
class UShaped(TimeLaw):
    """Density proportional to cosh(2a·(t − ½)): heavy at both ends (arXiv:2405.20320, 3.2).

    Args:
        a: above 0; the paper's 4.
    """

    def __init__(self, a: float = 4.0) -> None:
        if not 0 < a < 300:
            raise InputError(f"got a {a}, expected a number in (0, 300)")
        self.a = a

    def quantile(self, u: Tensor) -> Tensor:
        """Return ½ + asinh((2u − 1)·sinh a)/(2a)."""
        return 0.5 + torch.asinh((2 * u - 1) * math.sinh(self.a)) / (2 * self.a)

    def density(self, t: Tensor) -> Tensor:
        """Return a·cosh(2a·(t − ½))/sinh a."""
        return self.a * torch.cosh(2 * self.a * (t - 0.5)) / math.sinh(self.a)

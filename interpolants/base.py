"""What every path shares: interpolation, velocity, and the conversions between what a network may predict.

x_t = α(t)·data + σ(t)·noise, with t = 0 data and t = 1 noise (arXiv:2303.08797). W = σ'α − α'σ.

N samples; S the shape of one sample; t has shape (N,) or ().
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pathline.core.checks import check_times
from pathline.core.errors import InputError, OpenEndError, UnknownNameError, suggest
from pathline.core.registry import Registry

__all__ = ["KINDS", "Coefficients", "Interpolant", "Kind", "broadcast", "check_kinds", "derive", "registry"]

Kind = Literal["velocity", "score", "noise", "data"]
KINDS: tuple[str, ...] = get_args(Kind)

_ENDS = (0.0, 1.0)
_ZERO = 1e-12  # cos(π/2) is 6e-17 in float64


class Coefficients(NamedTuple):
    """α, σ and their rates of change dα/dt, dσ/dt, all of one shape."""

    alpha: Tensor
    sigma: Tensor
    alpha_rate: Tensor
    sigma_rate: Tensor

    @property
    def wronskian(self) -> Tensor:
        """W = σ'α − α'σ, the determinant that turns (x, velocity) into (data, noise)."""
        return self.sigma_rate * self.alpha - self.alpha_rate * self.sigma


def broadcast(t: Tensor, x: Tensor) -> Tensor:
    """Reshape ``t`` of shape (N,) to (N, 1, …, 1) so that it multiplies ``x`` of shape (N, *S) sample by sample."""
    return t.reshape(-1, *(1,) * (x.ndim - 1)) if t.ndim else t


class Interpolant(ABC):
    """A path between data (t = 0) and noise (t = 1). A subclass gives its coefficients, all else follows."""

    straight: ClassVar[bool] = False
    """Whether samples move at constant velocity, so that a Taylor step of any length is exact."""

    @abstractmethod
    def evaluate(self, t: Tensor) -> Coefficients:
        """Return the coefficients at checked times, in t's shape and precision."""

    def coefficients(self, t: Tensor | float) -> Coefficients:
        """Return α, σ, dα/dt and dσ/dt in t's shape, precision and device.

        Args:
            t: times in [0, 1], shape (N,) or ().

        Raises:
            InputError: t outside [0, 1], NaN, or of another shape.
            OpenEndError: t at an end where a rate is infinite.
        """
        t = check_times(t)
        self._refuse_open_ends(t, self._open_rates(), "coefficients")
        return self.evaluate(t)

    def interpolate(self, data: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """Return x_t = α·data + σ·noise, shape (N, *S).

        Raises:
            InputError: data and noise differ in shape, or t is outside [0, 1] or of a wrong shape.
        """
        alpha, sigma, _, _ = self._expanded(data, noise, t)
        return alpha * data + sigma * noise

    def velocity(self, data: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """Return dx_t/dt = α'·data + σ'·noise, shape (N, *S); raises as ``interpolate`` and ``coefficients``."""
        self._refuse_open_ends(check_times(t), self._open_rates(), "velocity")
        _, _, alpha_rate, sigma_rate = self._expanded(data, noise, t)
        return alpha_rate * data + sigma_rate * noise

    def target(self, kind: Kind, data: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """Return what a network that predicts ``kind`` is trained to: the velocity, −noise/σ, the noise or the data.

        Raises:
            UnknownNameError: an unknown kind.
            OpenEndError: the kind does not exist at one of the times.
        """
        check_kinds(kind)
        if kind == "velocity":
            return self.velocity(data, noise, t)
        coefficients = self._expanded(data, noise, t)
        if kind == "data":
            return data
        if kind == "noise":
            return noise
        self._refuse_open_ends(check_times(t), self.open_ends("noise", "score"), "score")
        return -noise / coefficients.sigma

    def convert(
        self, value: Tensor, x: Tensor, t: Tensor | float, *, source: Kind = "velocity", target: Kind = "score"
    ) -> Tensor:
        """Convert one prediction at x_t into another, shape (N, *S).

        Args:
            value: the prediction, of kind ``source``, shape (N, *S).
            x: x_t, shape (N, *S).
            t: times in [0, 1], shape (N,) or ().

        Raises:
            UnknownNameError: an unknown kind.
            InputError: shapes that differ, or t outside [0, 1].
            OpenEndError: t at an end where the conversion does not exist: see ``open_ends``.
        """
        check_kinds(source, target)
        self._refuse_open_ends(check_times(t), self.open_ends(source, target), f"{target} from {source}")
        return derive(value, x, self._expanded(value, x, t), source, target)

    def open_ends(self, source: Kind, target: Kind) -> tuple[float, ...]:
        """List the ends (0.0, 1.0) at which ``target`` cannot be had from ``source``.

        An end is open where the conversion divides by zero or by infinity. Every path's score is open at 0, where
        σ = 0; a prediction of the data alone says nothing of the noise at σ = 0, nor one of the noise of the data
        at α = 0.
        """
        return _open_ends(self, source, target)

    def _open_rates(self) -> tuple[float, ...]:
        return tuple(t for t in _ENDS if not all(rate.isfinite() for rate in _at(self, t)))

    def _expanded(self, first: Tensor, second: Tensor, t: Tensor | float) -> Coefficients:
        """Coefficients shaped to multiply ``first`` and ``second``, of one shape (N, *S)."""
        if first.shape != second.shape:
            raise InputError(f"got shapes {tuple(first.shape)} and {tuple(second.shape)}, expected equal ones")
        times = check_times(t, len(first) if first.ndim else 0).to(first.device)
        return Coefficients(*(broadcast(c, first) for c in self.evaluate(times)))

    def _refuse_open_ends(self, t: Tensor, ends: tuple[float, ...], what: str) -> None:
        if not ends or t.device.type != "cpu":
            return
        for end in ends:
            if bool((t == end).any()):
                raise OpenEndError(
                    f"got t = {end:g}, where the {type(self).__name__} path has no {what}; keep t away from {end:g}"
                )


registry: Registry[Interpolant] = Registry("interpolant", "interpolants", Interpolant)


def derive(value: Tensor, x: Tensor, coefficients: Coefficients, source: str, target: str) -> Tensor:
    """Convert ``value`` at x_t without checks; ``coefficients`` broadcast against x. Only the score divides by σ alone.

    data = (σ'x − σu)/W and noise = (αu − α'x)/W for a velocity u; score = −noise/σ.
    """
    if source == target:
        return value
    alpha, sigma, alpha_rate, sigma_rate = coefficients
    if source == "score":
        return derive(-sigma * value, x, coefficients, "noise", target)
    if target == "score":
        return -derive(value, x, coefficients, source, "noise") / sigma
    if source == "velocity":
        top = sigma_rate * x - sigma * value if target == "data" else alpha * value - alpha_rate * x
        return top / coefficients.wronskian
    if source == "noise":
        if target == "data":
            return (x - sigma * value) / alpha
        return (alpha_rate * x + coefficients.wronskian * value) / alpha
    if target == "noise":
        return (x - alpha * value) / sigma
    return (sigma_rate * x - coefficients.wronskian * value) / sigma


def check_kinds(*kinds: str) -> None:
    """Raise UnknownNameError unless every kind is one of ``KINDS``."""
    for kind in kinds:
        if kind not in KINDS:
            raise UnknownNameError(f"unknown prediction {kind!r}; {suggest(kind, KINDS)}")


def _at(path: Interpolant, t: float) -> Coefficients:
    return path.evaluate(torch.tensor(t, dtype=torch.float64))


@lru_cache(maxsize=256)
def _open_ends(path: Interpolant, source: str, target: str) -> tuple[float, ...]:
    return tuple(t for t in _ENDS if any(_vanishes(d) for d in _divisors(_at(path, t), source, target)))


def _vanishes(divisor: Tensor) -> bool:
    return not bool(divisor.isfinite()) or abs(float(divisor)) < _ZERO


def _divisors(at: Coefficients, source: str, target: str) -> list[Tensor]:
    """What ``derive`` divides by; W counts as one wherever it is used, since an infinite one has no use."""
    if source == target:
        return []
    divisors = [at.sigma] if target == "score" else []
    if "velocity" in (source, target):
        divisors.append(at.wronskian)
    if source == "data":
        divisors.append(at.sigma)
    if source in ("noise", "score") and target in ("velocity", "data"):
        divisors.append(at.alpha)
    return divisors

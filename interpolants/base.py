"""What every path shares: interpolation, velocity, and the conversions between what a network may predict.

x_t = α(t)·data + σ(t)·noise, with t = 0 data and t = 1 noise (arXiv:2303.08797). W = σ'α − α'σ.

**Singularities.** A path says at which ends a quantity does not exist (``open_ends``, ``training_interval``), a solver
which times it evaluates; the two are compared before a solve.

N samples; S the shape of one sample; t has shape (N,) or ().
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.func import jvp

from pathline.core.checks import check_times
from pathline.core.errors import InputError, OpenEndError, UnknownNameError, suggest
from pathline.core.registry import Registry

__all__ = [
    "KINDS",
    "Coefficients",
    "Interpolant",
    "InterpolantSpec",
    "Kind",
    "broadcast",
    "check_kinds",
    "derive",
    "registry",
]

Kind = Literal["velocity", "score", "noise", "data"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_ENDS = (0.0, 1.0)
_ZERO = 1e-12  # cos(π/2) is 6e-17 in float64
_RATE_MARGIN, _SCORE_MARGIN = 1e-5, 1e-3  # as SiT trains: velocities on its vp path, scores on all


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

    straight: bool = False
    """Whether samples move at constant velocity, so that a Taylor step of any length is exact."""

    latent_noise: ClassVar[bool] = False
    """Whether the path adds γ(t)·z with a latent noise z of its own; see ``interpolants.bridge``."""

    coupling: str | Mapping[str, Any] = "independent"
    """How data and noise are paired in training unless said otherwise: a coupling by name or mapping."""

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
        self._refuse_open_ends(t, self.rate_ends(), "coefficients")
        return self.evaluate(t)

    def interpolate(self, data: Tensor, noise: Tensor, t: Tensor | float, latent: Tensor | None = None) -> Tensor:
        """Return x_t = α·data + σ·noise, shape (N, *S).

        Args:
            latent: z of a path with latent noise, (N, *S); None on all others.

        Raises:
            InputError: tensors that differ in shape, a latent too many or too few, or t outside [0, 1].
        """
        self._check_latent(data, latent)
        alpha, sigma, _, _ = self._expanded(data, noise, t)
        return alpha * data + sigma * noise

    def velocity(self, data: Tensor, noise: Tensor, t: Tensor | float, latent: Tensor | None = None) -> Tensor:
        """Return dx_t/dt = α'·data + σ'·noise, shape (N, *S); raises as ``interpolate`` and ``coefficients``."""
        self._check_latent(data, latent)
        self._refuse_open_ends(check_times(t), self.rate_ends(), "velocity")
        _, _, alpha_rate, sigma_rate = self._expanded(data, noise, t)
        return alpha_rate * data + sigma_rate * noise

    def acceleration(self, data: Tensor, noise: Tensor, t: Tensor | float, latent: Tensor | None = None) -> Tensor:
        """Return d²x_t/dt² = α''·data + σ''·noise, shape (N, *S), the rates differentiated forward.

        Raises:
            OpenEndError: t at an end where it is infinite: see ``acceleration_ends``; else as ``interpolate``.
        """
        self._check_latent(data, latent)
        self._refuse_open_ends(check_times(t), self.acceleration_ends(), "acceleration")
        alpha, sigma = (broadcast(c, data) for c in _second_rates(self, _paired_times(data, noise, t)))
        return alpha * data + sigma * noise

    def target(self, kind: str, data: Tensor, noise: Tensor, t: Tensor | float, latent: Tensor | None = None) -> Tensor:
        """Return what a network that predicts ``kind`` is trained to: the velocity, −noise/σ, the noise or the data.

        Raises:
            UnknownNameError: an unknown kind.
            InputError: a kind that the path does not have, as the score of a path between two data sets.
            OpenEndError: the kind does not exist at one of the times.
        """
        check_kinds(kind)
        if kind == "velocity":
            return self.velocity(data, noise, t, latent)
        self._check_latent(data, latent)
        self.check_conversion("noise", kind)
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
        return self.derive(value, x, self._expanded(value, x, t), source, target)

    def derive(self, value: Tensor, x: Tensor, coefficients: Coefficients, source: str, target: str) -> Tensor:
        """Convert as ``convert`` does, but for the values of t; ``coefficients`` are shaped to multiply x."""
        self.check_conversion(source, target)
        return derive(value, x, coefficients, source, target)

    def check_conversion(self, source: str, target: str) -> None:
        """Raise InputError if the path can nowhere turn one prediction into the other."""
        check_kinds(source, target)

    def open_ends(self, source: str, target: str) -> tuple[float, ...]:
        """List the ends (0.0, 1.0) at which ``target`` cannot be had from ``source``.

        An end is open where the conversion divides by zero or by infinity. Every path's score is open at 0, where
        σ = 0; a prediction of the data alone says nothing of the noise at σ = 0, nor one of the noise of the data
        at α = 0. The target ``diffusion`` is the path's own, ``own_diffusion``, whatever the source.
        """
        if target == "diffusion":
            return _open_diffusion(self)
        self.check_conversion(source, target)
        return _open_ends(self, source, target)

    def training_interval(self, kind: str) -> tuple[float, float]:
        """Return the times (low, high) in which a network that predicts ``kind`` is trained by default.

        All of [0, 1], but for 1e-5 at an end where the velocity is infinite and 1e-3 at one where the score is, the
        margins of SiT's program (arXiv:2401.08740).
        """
        ends, margin = (self.rate_ends(), _RATE_MARGIN)
        if kind != "velocity":
            ends, margin = (self.open_ends("noise", kind) if kind == "score" else ()), _SCORE_MARGIN
        return (margin if 0.0 in ends else 0.0), (1 - margin if 1.0 in ends else 1.0)

    def own_diffusion(self, t: Tensor | float) -> Tensor:
        """Return g² = 2σW/α of the path's own forward SDE, dx = (α'/α)·x dt + g dW, in t's shape and precision.

        Its marginals are the path's (arXiv:2011.13456); half of it is SiT's form "SBDM".

        Raises:
            OpenEndError: t at an end where it is infinite, as the noise end of the linear path.
        """
        t = check_times(t)
        self._refuse_open_ends(t, _open_diffusion(self), "diffusion of its own")
        at = self.evaluate(t)
        return 2 * at.sigma * at.wronskian / at.alpha

    def angle(self, t: Tensor | float) -> Tensor:
        """Return atan2(σ, α), which grows with t from 0 (data) to π/2 (noise); its tangent is EDM's σ."""
        at = self.evaluate(check_times(t))
        return torch.atan2(at.sigma, at.alpha)

    def time_at(self, angle: Tensor) -> Tensor:
        """Return the time at which atan2(σ, α) = ``angle``, in its shape and precision; angles beyond the path's ends
        give the ends.

        Raises:
            InputError: an angle outside [0, π/2].
        """
        if bool(((angle < 0) | (angle > math.pi / 2 + 1e-3)).any()) or bool(angle.isnan().any()):
            raise InputError(f"got angles from {float(angle.min()):g} to {float(angle.max()):g}, expected [0, π/2]")
        exact = angle.double()
        first, last = (float(self.angle(torch.tensor(t, dtype=torch.float64))) for t in _ENDS)
        t = self._time_at(exact.clamp(first, last)).clamp(0, 1)
        t = torch.where(exact <= first, 0.0, torch.where(exact >= last - 1e-15, 1.0, t))
        return t.to(angle.dtype)

    def _time_at(self, angle: Tensor) -> Tensor:
        """Bisect for the time of each angle, float64; paths that know it in closed form say so."""
        low, high = torch.zeros_like(angle), torch.ones_like(angle)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.angle(middle) < angle
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def rate_ends(self) -> tuple[float, ...]:
        """List the ends (0.0, 1.0) at which a rate is infinite, and with it the velocity of a sample."""
        return tuple(t for t in _ENDS if not all(rate.isfinite() for rate in _at(self, t)))

    def acceleration_ends(self) -> tuple[float, ...]:
        """List the ends (0.0, 1.0) at which α'' or σ'' is infinite, and with it the acceleration of a sample."""
        return _open_accelerations(self)

    def _check_latent(self, data: Tensor, latent: Tensor | None) -> None:
        if self.latent_noise != (latent is not None):
            advice = "draw one, (N, *S)" if self.latent_noise else "leave it out"
            came = "no latent noise" if latent is None else "latent noise"
            raise InputError(f"got {came} for the {type(self).__name__} path; {advice}")
        if latent is not None and latent.shape != data.shape:
            raise InputError(f"got latent noise of shape {tuple(latent.shape)}, expected {tuple(data.shape)}")

    def _expanded(self, first: Tensor, second: Tensor, t: Tensor | float) -> Coefficients:
        """Coefficients shaped to multiply ``first`` and ``second``, of one shape (N, *S)."""
        times = _paired_times(first, second, t)
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

InterpolantSpec = Annotated[Interpolant | str | Mapping[str, Any], registry]


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


def _paired_times(first: Tensor, second: Tensor, t: Tensor | float) -> Tensor:
    """Return checked times on the device of two tensors of one shape (N, *S)."""
    if first.shape != second.shape:
        raise InputError(f"got shapes {tuple(first.shape)} and {tuple(second.shape)}, expected equal ones")
    return check_times(t, len(first) if first.ndim else 0).to(first.device)


def _second_rates(path: Interpolant, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return α'' and σ'' in t's shape and precision."""
    _, second, *_ = jvp(lambda t: tuple(path.evaluate(t)[2:]), (t,), (torch.ones_like(t),))
    return second[0], second[1]


@lru_cache(maxsize=256)
def _open_accelerations(path: Interpolant) -> tuple[float, ...]:
    found = ((t, _second_rates(path, torch.tensor(t, dtype=torch.float64, device="cpu"))) for t in _ENDS)
    return tuple(t for t, rates in found if not all(rate.isfinite() for rate in rates))


def _at(path: Interpolant, t: float) -> Coefficients:
    return path.evaluate(torch.tensor(t, dtype=torch.float64, device="cpu"))  # whatever the default device


@lru_cache(maxsize=256)
def _open_ends(path: Interpolant, source: str, target: str) -> tuple[float, ...]:
    return tuple(t for t in _ENDS if any(_vanishes(d) for d in _divisors(_at(path, t), source, target)))


@lru_cache(maxsize=256)
def _open_diffusion(path: Interpolant) -> tuple[float, ...]:
    """A path's own diffusion is infinite where α = 0 at a finite rate, or where W is."""
    found = []
    for t in _ENDS:
        at = _at(path, t)
        squared = 2 * at.sigma * at.wronskian / at.alpha
        if not bool(squared.isfinite()) or abs(float(squared)) > 1 / _ZERO:
            found.append(t)
    return tuple(found)


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

"""Other programs' clocks and noise scales, and their conversion to ours (t = 0 data, t = 1 noise), all in one place.

A clock reads the same position on a path in other units. Times, intervals, grids and shifts are converted by name:
``clocks.convert(0.3, source="reversed")`` is 0.7. An infinite end (EDM's σ at pure noise) is converted exactly.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from pathline.core.errors import InputError, InputTypeError
from pathline.core.registry import Registry
from pathline.interpolants.base import Interpolant, InterpolantSpec
from pathline.interpolants.base import registry as paths
from pathline.interpolants.linear import Linear

__all__ = ["Clock", "ClockSpec", "build", "convert", "grid", "interval", "names", "register", "registry", "shift"]


class Clock(ABC):
    """A way to name positions on a path.

    Attributes:
        low, high: range of its values.
    """

    low: float
    high: float

    @abstractmethod
    def to_time(self, value: Tensor, path: Interpolant) -> Tensor:
        """Return t of checked values, in their shape and precision."""

    @abstractmethod
    def from_time(self, t: Tensor, path: Interpolant) -> Tensor:
        """Return this clock's values at t, in its shape and precision."""

    def shift(self, value: float) -> float:
        """Return what a shift of this clock is for t: a in t' = a·t/(1 + (a − 1)·t)."""
        return value

    def check(self, value: Tensor) -> None:
        """Raise InputError for values out of range."""
        if not bool(((value >= self.low) & (value <= self.high)).all()):
            raise InputError(
                f"got {value.tolist()} on the clock {type(self).__name__}, expected {self.low} to {self.high}"
            )


registry: Registry[Clock] = Registry("clock", "interpolants.clocks", Clock)
register, build, names = registry.register, registry.build, registry.names

ClockSpec = Annotated[Clock | str | Mapping[str, Any], registry]


@registry.register("time")
class Time(Clock):
    """Our own: t in [0, 1], 0 data and 1 noise; REPA's and RAE's too, and diffusers' σ of its flow models."""

    low, high = 0.0, 1.0

    def to_time(self, value: Tensor, path: Interpolant) -> Tensor:
        """Return ``value``."""
        return value

    def from_time(self, t: Tensor, path: Interpolant) -> Tensor:
        """Return ``t``."""
        return t


@registry.register("reversed", aliases=("sit", "flow-matching"))
class Reversed(Time):
    """1 − t: 0 is noise and 1 is data, as in SiT, LightningDiT, flow_matching and torchcfm.

    Velocities change their sign with it (``weights.reverse_clock``), and a shift its side: 0.3 there is 1/0.3 here.
    """

    def to_time(self, value: Tensor, path: Interpolant) -> Tensor:
        """Return 1 − value."""
        return 1 - value

    def from_time(self, t: Tensor, path: Interpolant) -> Tensor:
        """Return 1 − t."""
        return 1 - t

    def shift(self, value: float) -> float:
        """Return 1/value."""
        return 1 / value


@registry.register("diffusers-sigma")
class DiffusersSigma(Time):
    """σ of diffusers' flow-matching schedulers: our t, on the linear path alone."""

    def to_time(self, value: Tensor, path: Interpolant) -> Tensor:
        """Return ``value``; raises InputError off the linear path."""
        _only_linear(path, "diffusers' σ")
        return value

    def from_time(self, t: Tensor, path: Interpolant) -> Tensor:
        """Return ``t``; raises InputError off the linear path."""
        _only_linear(path, "diffusers' σ")
        return t


@registry.register("diffusers-step")
class DiffusersStep(Clock):
    """Time steps of diffusers' flow models: 1000·t, on the linear path alone.

    Args:
        steps: the scheduler's ``num_train_timesteps``, 1 or more; 1000 everywhere in diffusers.
    """

    low = 0.0

    def __init__(self, steps: int = 1000) -> None:
        if steps < 1:
            raise InputError(f"got {steps} steps, expected 1 or more")
        self.steps = self.high = steps

    def to_time(self, value: Tensor, path: Interpolant) -> Tensor:
        """Return value/steps; raises InputError off the linear path."""
        _only_linear(path, "diffusers' steps")
        return value / self.steps

    def from_time(self, t: Tensor, path: Interpolant) -> Tensor:
        """Return steps·t; raises InputError off the linear path."""
        _only_linear(path, "diffusers' steps")
        return t * self.steps


@registry.register("edm-sigma", aliases=("noise-ratio",))
class EdmSigma(Clock):
    """EDM's σ, the ratio of noise to data σ(t)/α(t), 0 to ∞ (arXiv:2206.00364). A shift multiplies it."""

    low, high = 0.0, math.inf

    def to_time(self, value: Tensor, path: Interpolant) -> Tensor:
        """Return t with σ(t)/α(t) = value."""
        return path.time_at(torch.atan(value.double())).to(value.dtype)

    def from_time(self, t: Tensor, path: Interpolant) -> Tensor:
        """Return σ(t)/α(t)."""
        at = path.evaluate(t)
        return at.sigma / at.alpha


@registry.register("log-snr")
class LogSnr(Clock):
    """ln(α²/σ²), ∞ at data to −∞ at noise (arXiv:2107.00630). A shift is what is added to it, −2·ln a."""

    low, high = -math.inf, math.inf

    def to_time(self, value: Tensor, path: Interpolant) -> Tensor:
        """Return t with ln(α²/σ²) = value."""
        return path.time_at(torch.atan(torch.exp(-value.double() / 2))).to(value.dtype)

    def from_time(self, t: Tensor, path: Interpolant) -> Tensor:
        """Return 2·ln(α/σ)."""
        at = path.evaluate(t)
        return 2 * (at.alpha.log() - at.sigma.log())

    def shift(self, value: float) -> float:
        """Return exp(−value/2)."""
        return math.exp(-value / 2)


def convert(
    value: Tensor | float,
    *,
    source: ClockSpec = "time",
    target: ClockSpec = "time",
    interpolant: InterpolantSpec = "linear",
) -> Tensor:
    """Read a position on one clock and return it on another, in its shape and precision (numbers: float64).

    Raises:
        InputError: a value outside the source's range.
        InputTypeError: neither a floating-point tensor nor a number.
    """
    if not isinstance(value, Tensor):
        value = torch.tensor(value, dtype=torch.float64)
    if not value.is_floating_point():
        raise InputTypeError(f"got values of type {value.dtype}, expected a floating-point tensor; call .float()")
    path, first = paths.build(interpolant), registry.build(source)
    first.check(value)
    return registry.build(target).from_time(first.to_time(value, path), path)


def interval(
    low: float, high: float, *, source: ClockSpec, interpolant: InterpolantSpec = "linear"
) -> tuple[float, float]:
    """Return an interval of another clock as (low, high) in t, as guidance takes it.

    Raises:
        InputError: low above high, or out of range.
    """
    if not low <= high:
        raise InputError(f"got an interval from {low} to {high}, expected low <= high on the clock it is given in")
    first, second = (float(convert(end, source=source, interpolant=interpolant)) for end in (low, high))
    return min(first, second), max(first, second)


def grid(values: Tensor | Sequence[float], *, source: ClockSpec, interpolant: InterpolantSpec = "linear") -> Tensor:
    """Return a grid of another clock as times, float64 and in its order.

    Raises:
        InputError: fewer than two values, values out of range, or not strictly monotone; nothing is sorted.
    """
    times = convert(torch.as_tensor(values, dtype=torch.float64), source=source, interpolant=interpolant)
    gaps = times.diff()
    if times.ndim != 1 or len(times) < 2 or not (bool((gaps > 0).all()) or bool((gaps < 0).all())):
        raise InputError(f"got a grid {times.tolist()} in t, expected two or more strictly monotone values")
    return times


def shift(value: float, *, source: ClockSpec) -> float:
    """Return a time shift of another clock as ours: a in t' = a·t/(1 + (a − 1)·t); above 1 towards noise.

    Raises:
        InputError: a shift that is not above 0 here.
    """
    clock = registry.build(source)
    if not math.isfinite(value) or (value <= 0 and not isinstance(clock, LogSnr)):
        raise InputError(f"got shift {value}, expected a finite number above 0; 1 is none")
    return clock.shift(value)


def _only_linear(path: Interpolant, what: str) -> None:
    if not isinstance(path, Linear):
        raise InputError(
            f"got {what} on the {type(path).__name__} path, which diffusers defines on the linear one alone"
        )

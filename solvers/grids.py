"""Time grids: where a fixed-step solver puts its steps. N steps have N + 1 grid points, in float64.

A grid owns its last interval, which is what the rules for a last step use. ``uniform`` and ``paper`` look the same from
either end; the others are laid from noise to data, and a solve from data to noise has the same points in reverse.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from pathline.core.errors import InputError
from pathline.core.registry import Registry
from pathline.interpolants import clocks
from pathline.interpolants.base import InterpolantSpec
from pathline.interpolants.base import registry as paths

__all__ = [
    "Custom",
    "DynamicShift",
    "Edm",
    "Grid",
    "GridSpec",
    "Paper",
    "Shifted",
    "Terminal",
    "Uniform",
    "build",
    "names",
    "part_way",
    "register",
    "registry",
]


class Grid(ABC):
    """A rule that puts N steps between two times."""

    @abstractmethod
    def times(self, steps: int, start: float, end: float) -> Tensor:
        """Return steps + 1 strictly monotone times from ``start`` to ``end``, float64 on the host."""


registry: Registry[Grid] = Registry("grid", "solvers.grids", Grid)
register, build, names = registry.register, registry.build, registry.names

GridSpec = Annotated[Grid | str | Mapping[str, Any], registry]


def part_way(t: float, t_next: float, part: float) -> float:
    """Return the time at a part of a step: 0 is its beginning, exactly, and 1 its end."""
    return (1 - part) * t + part * t_next


@registry.register("uniform")
class Uniform(Grid):
    """Equal steps."""

    def times(self, steps: int, start: float, end: float) -> Tensor:
        """Return ``linspace(start, end, steps + 1)``."""
        return torch.linspace(start, end, steps + 1, dtype=torch.float64)


@registry.register("paper")
class Paper(Grid):
    """Equal steps to a distance from the end, then one step: the grid of SiT's and DeepFlow's published samples.

    Args:
        last: length of the last step, in (0, 1); 0.04 in both papers.
    """

    def __init__(self, last: float = 0.04) -> None:
        if not 0 < last < 1:
            raise InputError(f"got last {last}, expected a step length in (0, 1)")
        self.last = last

    def times(self, steps: int, start: float, end: float) -> Tensor:
        """Return ``linspace(start, end ± last, steps)``, then ``end``."""
        if abs(start - end) <= self.last:
            raise InputError(
                f"got a solve from {start:g} to {end:g} with a last step of {self.last:g}; use the grid 'uniform'"
            )
        before = end + self.last if start > end else end - self.last
        times = torch.linspace(start, before, steps, dtype=torch.float64)
        return torch.cat((times, torch.tensor([end], dtype=torch.float64)))


class _FromNoise(Grid):
    """A grid that is laid from noise to data."""

    def times(self, steps: int, start: float, end: float) -> Tensor:
        """Return the points from the larger time to the smaller one, or the same in reverse."""
        points = self.descend(steps, max(start, end), min(start, end)).clone()
        points[0], points[-1] = max(start, end), min(start, end)  # exactly, whatever the rounding
        return points if start > end else points.flip(0)

    @abstractmethod
    def descend(self, steps: int, high: float, low: float) -> Tensor:
        """Return steps + 1 times from ``high`` to ``low``, float64."""


@registry.register("shifted")
class Shifted(_FromNoise):
    """Equal steps in u, with t = a·u/(1 + (a − 1)·u): a above 1 puts more steps near noise (arXiv:2403.03206, Eq. 23).

    Args:
        shift: a, above 0; 1 is none. Stable Diffusion 3 uses 3 for images of 1024². Shifts of the reversed clock, as
            LightningDiT's, are 1/a: ``clocks.shift(0.3, source="reversed")``.
    """

    def __init__(self, shift: float = 3.0) -> None:
        if not 0 < shift < math.inf:
            raise InputError(f"got shift {shift}, expected a finite number above 0; 1 is none")
        self.shift = float(shift)

    def descend(self, steps: int, high: float, low: float) -> Tensor:
        """Return the shifted points."""
        a = self.shift
        first, last = (t / (a + (1 - a) * t) for t in (high, low))
        u = torch.linspace(first, last, steps + 1, dtype=torch.float64)
        return a * u / (1 + (a - 1) * u)


@registry.register("dynamic-shift")
class DynamicShift(Shifted):
    """``shifted`` by an amount that grows with the number of image tokens, as diffusers does for Flux.

    μ runs linearly from ``base`` at ``base_tokens`` to ``largest`` at ``largest_tokens``, and a = exp(μ), or μ itself.
    The defaults are those of diffusers' ``calculate_shift``: 256 tokens have a = 1.649, 1024 1.878, 4096 3.158.

    Args:
        tokens: number of image tokens of a sample, (H/p)·(W/p).
        base: μ at ``base_tokens``.
        largest: μ at ``largest_tokens``.
        base_tokens: 1 or more.
        largest_tokens: more than ``base_tokens``.
        kind: ``exponential``, a = exp(μ), or ``linear``, a = μ.
    """

    def __init__(
        self,
        tokens: int,
        *,
        base: float = 0.5,
        largest: float = 1.15,
        base_tokens: int = 256,
        largest_tokens: int = 4096,
        kind: Literal["exponential", "linear"] = "exponential",
    ) -> None:
        if tokens < 1 or not 1 <= base_tokens < largest_tokens:
            raise InputError(
                f"got {tokens} tokens between {base_tokens} and {largest_tokens}, expected 1 or more, and two numbers "
                "that rise"
            )
        if kind not in ("exponential", "linear"):
            raise InputError(f"got kind {kind!r}, expected 'exponential' or 'linear'")
        mu = base + (largest - base) * (tokens - base_tokens) / (largest_tokens - base_tokens)
        super().__init__(math.exp(mu) if kind == "exponential" else mu)


@registry.register("terminal")
class Terminal(_FromNoise):
    """Another grid, stretched so that its last step begins at a given time: 1 − t grows by one factor.

    t ← start − (start − t)·(start − last)/(start − t_last) for all points but the end (diffusers' ``shift_terminal``).
    A single step stays as it is.

    Args:
        last: time at which the last step begins; 0.02 in LTX-Video.
        grid: the grid to stretch.
    """

    def __init__(self, last: float = 0.02, *, grid: GridSpec = "uniform") -> None:
        if not 0 < last < 1:
            raise InputError(f"got last {last}, expected a time in (0, 1)")
        self.last, self.grid = float(last), build(grid)

    def descend(self, steps: int, high: float, low: float) -> Tensor:
        """Return the stretched points."""
        points = self.grid.times(steps, high, low)
        if steps == 1:
            return points
        if not low < self.last < high:
            raise InputError(f"got last {self.last:g} for a solve between {high:g} and {low:g}; give a time in between")
        stretched = high - (high - points[:-1]) * (high - self.last) / (high - points[-2])
        return torch.cat((stretched, points[-1:]))


@registry.register("edm")
class Edm(_FromNoise):
    """EDM's grid: equal steps in v^(1/ρ), of a declared variable v, then one step to the end (arXiv:2206.00364, Eq. 5).

    v_i = (v_max^(1/ρ) + i/(N − 1)·(v_min^(1/ρ) − v_max^(1/ρ)))^ρ for i < N, then the end. v_max is moved to the start
    of the solve, which may be pure noise, v = ∞; a solve that starts or ends between the two has its points there.

    Args:
        low: v_min, above 0; EDM's 0.002.
        high: v_max, above ``low``; EDM's 80.
        rho: ρ, above 0; EDM's 7.
        variable: a clock whose value falls from noise to data, by name: ``edm-sigma``, the ratio of noise to data, or
            ``time``, which is what diffusers calls Karras sigmas on a flow.
        interpolant: the path on which the variable is read.
    """

    def __init__(
        self,
        low: float = 0.002,
        high: float = 80.0,
        rho: float = 7.0,
        *,
        variable: clocks.ClockSpec = "edm-sigma",
        interpolant: InterpolantSpec = "linear",
    ) -> None:
        if not 0 < low < high < math.inf or not 0 < rho < math.inf:
            raise InputError(f"got low {low}, high {high} and rho {rho}, expected 0 < low < high and rho above 0")
        self.low, self.high, self.rho = float(low), float(high), float(rho)
        self.variable, self.path = clocks.build(variable), paths.build(interpolant)

    def descend(self, steps: int, high: float, low: float) -> Tensor:
        """Return EDM's points as times."""
        first, last = (
            float(v) for v in self.variable.from_time(torch.tensor([high, low], dtype=torch.float64), self.path)
        )
        if not last < first:
            raise InputError(f"got the variable {type(self.variable).__name__}, which does not fall from noise to data")
        top, bottom = min(self.high, first), max(self.low, last)
        if not bottom < top:
            raise InputError(
                f"got EDM's values {self.low:g} to {self.high:g} for a solve between {last:g} and {first:g}"
            )
        count = steps + 1 if last >= self.low else steps
        root = torch.linspace(top ** (1 / self.rho), bottom ** (1 / self.rho), count, dtype=torch.float64)
        points = self.variable.to_time(root**self.rho, self.path)
        return points if count == steps + 1 else torch.cat((points, points.new_tensor([low])))


@registry.register("custom")
class Custom(_FromNoise):
    """Times of one's own.

    Args:
        points: two or more times in [0, 1], strictly falling or rising, from one end of the solve to the other; N steps
            have N + 1.

    Raises:
        InputError: not monotone, or outside [0, 1]; nothing is sorted. At a solver's construction: another number of
            points than its steps + 1, or other ends than its own.
    """

    def __init__(self, points: Sequence[float]) -> None:
        self.points = clocks.grid(list(points), source="time")

    def descend(self, steps: int, high: float, low: float) -> Tensor:
        """Return the points."""
        points = self.points if self.points[0] > self.points[-1] else self.points.flip(0)
        if len(points) != steps + 1 or abs(points[0] - high) > 1e-9 or abs(points[-1] - low) > 1e-9:
            raise InputError(
                f"got a grid of {len(points)} points between {points[0]:g} and {points[-1]:g} for {steps} steps "
                f"between {high:g} and {low:g}; give steps={len(points) - 1}, start={self.points[0]:g} and "
                f"end={self.points[-1]:g}"
            )
        return points

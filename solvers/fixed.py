"""Fixed-step Runge–Kutta methods for the ODE dx/dt = v(x, t), as fused loops in place."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from pathline.solvers.base import FixedStep, Run, registry
from pathline.solvers.grids import part_way

__all__ = ["RK4", "Euler", "Heun", "Midpoint"]


@registry.register("euler")
class Euler(FixedStep):
    """Euler's method: x ← x + Δt·v(x, t). Order 1, one network call a step, the end is not evaluated."""

    order = 1
    calls_per_step = 1
    evaluates_end = False

    def step(self, run: Run, x: Tensor, number: int, t: float, t_next: float) -> Tensor:
        """Take one step."""
        return run.combine(x, run.predict(x, t), t, velocity=t_next - t)


@registry.register("midpoint")
class Midpoint(FixedStep):
    """The explicit midpoint rule: x ← x + Δt·v(x + ½Δt·v(x, t), t + ½Δt).

    Order 2, two network calls a step, the end is not evaluated.
    """

    order = 2
    calls_per_step = 2
    evaluates_end = False

    def nodes(self) -> list[float]:
        """Return the grid, and the middles of its steps."""
        return _with_middles(self.times)

    def step(self, run: Run, x: Tensor, number: int, t: float, t_next: float) -> Tensor:
        """Take one step."""
        middle, dt = part_way(t, t_next, 0.5), t_next - t
        half = run.ahead(x, run.predict(x, t), t, velocity=0.5 * dt)
        return run.combine(x, run.predict(half, middle), middle, velocity=dt)


@registry.register("heun")
class Heun(FixedStep):
    """Heun's second-order method, the explicit trapezoidal rule; not his third-order one.

    x̂ = x + Δt·v(x, t);  x ← x + ½Δt·(v(x, t) + v(x̂, t + Δt)). Order 2, two network calls a step, both ends evaluated.
    """

    order = 2
    calls_per_step = 2
    evaluates_end = True

    def step(self, run: Run, x: Tensor, number: int, t: float, t_next: float) -> Tensor:
        """Take one step."""
        dt, first = t_next - t, run.predict(x, t)
        ahead = run.ahead(x, first, t, velocity=dt)
        x = run.combine(x, first, t, velocity=0.5 * dt)
        return run.combine(x, run.predict(ahead, t_next), t_next, velocity=0.5 * dt)


@registry.register("rk4")
class RK4(FixedStep):
    """The classic Runge–Kutta method (Kutta, 1901); torchdiffeq's method of this name is the 3/8 rule.

    Order 4, four network calls a step, both ends evaluated.
    """

    order = 4
    calls_per_step = 4
    evaluates_end = True

    def nodes(self) -> list[float]:
        """Return the grid, and the middles of its steps."""
        return _with_middles(self.times)

    def step(self, run: Run, x: Tensor, number: int, t: float, t_next: float) -> Tensor:
        """Take one step."""
        dt, middle = t_next - t, part_way(t, t_next, 0.5)
        stage, total = x, x.clone()
        for node, weight, length in ((t, 1 / 6, 0.5), (middle, 1 / 3, 0.5), (middle, 1 / 3, 1.0)):
            slope = run.predict(stage, node)
            total = run.combine(total, slope, node, velocity=weight * dt)
            stage = run.ahead(x, slope, node, velocity=length * dt)
        return run.combine(total, run.predict(stage, t_next), t_next, velocity=dt / 6)


def _with_middles(times: list[float]) -> list[float]:
    return [*times, *(part_way(t, t_next, 0.5) for t, t_next in pairwise(times))]

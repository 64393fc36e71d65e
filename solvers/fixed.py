"""Fixed-step methods for the ODE dx/dt = v(x, t), as fused loops in place."""

from __future__ import annotations

from torch import Tensor

from pathline.solvers.base import FixedStep, Run, registry

__all__ = ["Euler", "Heun"]


@registry.register("euler")
class Euler(FixedStep):
    """Euler's method: x ← x + Δt·v(x, t). Order 1, one network call a step, the end is not evaluated."""

    order = 1
    calls_per_step = 1
    evaluates_end = False

    def step(self, run: Run, x: Tensor, number: int, t: float, t_next: float) -> Tensor:
        """Take one step."""
        return x.add_(run.predict(x, t).velocity, alpha=t_next - t)


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
        dt = t_next - t
        first = run.predict(x, t).velocity
        second = run.predict(x.add(first, alpha=dt), t_next).velocity
        return x.add_(first.add(second), alpha=0.5 * dt)

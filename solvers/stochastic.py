"""Methods for the SDE dx = [v − ½·g²·score]dt + g dW, run from noise to data; its marginals are those of the ODE.

From data to noise the drift is v + ½·g²·score. g depends on t alone, so the noise is additive, and Itô's and
Stratonovich's readings agree.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from itertools import pairwise
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from pathline.core.errors import InputError, OpenEndError
from pathline.core.flow import BaseFlow, Prediction
from pathline.solvers import diffusions
from pathline.solvers.base import FixedStep, Run, registry
from pathline.solvers.diffusions import DiffusionSpec
from pathline.solvers.grids import GridSpec, part_way

__all__ = ["EulerMaruyama", "LastStep", "StochasticHeun", "StochasticRungeKutta", "StochasticStep"]

LastStep = Literal["mean", "tweedie", "euler", "none"]


class StochasticStep(FixedStep):
    """A method of fixed steps for the SDE, whose last step may follow a rule of its own, without noise.

    The last step is the last interval of the grid. With v, score, data and noise expected at its beginning it is
    - ``mean``: x + (v ∓ ½g²·score)Δt, the drift alone. Biased unless g vanishes at the end.
    - ``tweedie``: α·data + σ·noise with α, σ at ``end``: at t = 0 the expected data, Tweedie's formula.
    - ``euler``: x + v·Δt, a step of the ODE.
    - ``none``: a step like all others.

    Args:
        steps: number of steps N ≥ 1.
        grid: see ``FixedStep``.
        diffusion: g(t): a name, ``{"name": …, **options}``, an instance, or a function.
        last_step: one of the four.
        start: see ``Solver``.
        end: see ``Solver``.
    """

    needs = ("velocity", "score")
    draws_per_step: ClassVar[int] = 1
    diffusion_at_end: ClassVar[bool] = False
    """Whether a step evaluates g at its end."""

    def __init__(
        self,
        steps: int,
        *,
        grid: GridSpec = "uniform",
        diffusion: DiffusionSpec = "sigma",
        last_step: LastStep = "tweedie",
        start: float = 1.0,
        end: float = 0.0,
    ) -> None:
        super().__init__(steps, grid=grid, start=start, end=end)
        self.diffusion = diffusions.build(diffusion)
        if last_step not in get_args(LastStep):
            raise InputError(f"got last_step {last_step!r}, expected one of {', '.join(get_args(LastStep))}")
        self.last_step = last_step
        self.evaluates_end = self.evaluates_end and last_step == "none"

    @property
    def noisy_steps(self) -> int:
        """Number of steps that draw noise."""
        return self.steps - (self.last_step != "none")

    @property
    def calls(self) -> int:
        """See ``FixedStep``; a last step of its own is one call."""
        return self.noisy_steps * self.calls_per_step + (self.steps - self.noisy_steps)

    def check(self, flow: BaseFlow, x: Tensor, increments: Tensor | None) -> None:
        """Check also that g is finite at every time that is evaluated, on the flow's path."""
        super().check(flow, x, increments)
        last = self.noisy_steps + self.diffusion_at_end if self.last_step != "mean" else self.steps
        missing = {*self.times[:last]} & {*self.diffusion.open_ends(flow.interpolant)}
        if missing:
            raise OpenEndError(
                f"got a grid that evaluates t = {min(missing):g}, where the diffusion {type(self.diffusion).__name__} "
                f"is infinite on the {type(flow.interpolant).__name__} path; keep start and end away from it"
            )

    def increments_shape(self, x: Tensor) -> tuple[int, ...]:
        """Return (draws, N, *S); a last step of its own draws none."""
        return (self.noisy_steps * self.draws_per_step, *x.shape)

    def plan(self, run: Run) -> None:
        """Compute g² for all times at once."""
        nodes = self.nodes()
        squared = self.diffusion.squared(torch.tensor(nodes, dtype=torch.float64), run.flow.interpolant)
        run.plan = dict(zip(nodes, squared.tolist(), strict=True))

    def integrate(self, run: Run, x: Tensor) -> Tensor:
        """Walk over the grid."""
        self.plan(run)
        return super().integrate(run, x)

    def step(self, run: Run, x: Tensor, number: int, t: float, t_next: float) -> Tensor:
        """Take one step, or the last one."""
        return (self.advance if number < self.noisy_steps else self.finish)(run, x, number, t, t_next)

    @abstractmethod
    def advance(self, run: Run, x: Tensor, number: int, t: float, t_next: float) -> Tensor:
        """Take one step with noise."""

    def finish(self, run: Run, x: Tensor, number: int, t: float, t_next: float) -> Tensor:
        """Take the last step by its rule."""
        prediction, dt = run.predict(x, t), t_next - t
        if self.last_step == "tweedie":
            at = run.at(t_next)
            return run.combine(x, prediction, t, keep=0, data=float(at.alpha), noise=float(at.sigma))
        squared = run.plan[t] if self.last_step == "mean" else 0.0
        return _drift(run, x, prediction, t, dt, squared)


def _drift(run: Run, x: Tensor, prediction: Prediction, t: float, dt: float, squared: float) -> Tensor:
    """Return x + v·Δt + ½·g²·score·|Δt|, in place."""
    return run.combine(x, prediction, t, velocity=dt, score=0.5 * squared * abs(dt))


@registry.register("euler-maruyama")
class EulerMaruyama(StochasticStep):
    """The Euler–Maruyama method: x ← x + drift·Δt + g·√|Δt|·z. Order 1, one network call a step, none at the end.

    Its defaults are the sampler of the published DeepFlow and REPA numbers: the grid ``paper``, g² = 2t, and a last
    step that takes the mean.

    Args:
        steps: number of steps N ≥ 1; 250 in the papers.
        grid: see ``FixedStep``.
        diffusion: see ``StochasticStep``.
        last_step: see ``StochasticStep``; with one other than ``none``, N − 1 steps draw noise.
        start: see ``Solver``.
        end: see ``Solver``.
    """

    order = 1
    calls_per_step = 1
    evaluates_end = False

    def __init__(
        self,
        steps: int = 250,
        *,
        grid: GridSpec = "paper",
        diffusion: DiffusionSpec = "linear",
        last_step: LastStep = "mean",
        start: float = 1.0,
        end: float = 0.0,
    ) -> None:
        super().__init__(steps, grid=grid, diffusion=diffusion, last_step=last_step, start=start, end=end)

    def advance(self, run: Run, x: Tensor, number: int, t: float, t_next: float) -> Tensor:
        """Take one step."""
        dt, squared = t_next - t, run.plan[t]
        x = _drift(run, x, run.predict(x, t), t, dt, squared)
        return run.add(x, run.normal(x, number), math.sqrt(squared * abs(dt)))


@registry.register("stochastic-heun")
class StochasticHeun(StochasticStep):
    """SiT's Heun method for SDEs: the noise first, then one Heun step of the drift from there (arXiv:2401.08740).

    x̂ = x + g(t)·√|Δt|·z, then Heun's rule on the drift at (x̂, t) and at t + Δt. Order 1 like ``euler-maruyama``, with
    an error many times smaller; two network calls a step, the end evaluated only with ``last_step`` none.
    """

    order = 1
    calls_per_step = 2
    evaluates_end = True
    diffusion_at_end = True

    def advance(self, run: Run, x: Tensor, number: int, t: float, t_next: float) -> Tensor:
        """Take one step."""
        dt, squared, squared_next = t_next - t, run.plan[t], run.plan[t_next]
        x = run.add(x, run.normal(x, number), math.sqrt(squared * abs(dt)))
        first = run.predict(x, t)
        ahead = run.ahead(x, first, t, velocity=dt, score=0.5 * squared * abs(dt))
        x = run.combine(x, first, t, velocity=0.5 * dt, score=0.25 * squared * abs(dt))
        second = run.predict(ahead, t_next)
        return run.combine(x, second, t_next, velocity=0.5 * dt, score=0.25 * squared_next * abs(dt))


@registry.register("srk")
class StochasticRungeKutta(StochasticStep):
    """Rössler's SRA1 for additive noise, of strong order 1.5 (SIAM J. Numer. Anal. 48, 2010, Table 6.1).

    With F the drift in the direction of the solve, h = |Δt|, I = ∫dW = √h·z₁ and J = ∫(W − W₀)dt = ½h(I + √h·z₂/√3),
    both of one step, z₁ and z₂ its draws 2n and 2n + 1:
    x̂ = x + ¾h·F(x, t) + (3/2)·g(t + Δt)·J/h;
    x ← x + h·(⅓F(x, t) + ⅔F(x̂, t + ¾Δt)) + g(t + Δt)·I + (g(t) − g(t + Δt))·J/h.
    Two network calls a step, the end is not evaluated; g is.
    """

    order = 1.5
    calls_per_step = 2
    evaluates_end = False
    draws_per_step = 2
    diffusion_at_end = True

    def nodes(self) -> list[float]:
        """Return the grid, and the time of the second stage of each step."""
        return [*self.times, *(part_way(t, t_next, 0.75) for t, t_next in pairwise(self.times))]

    def advance(self, run: Run, x: Tensor, number: int, t: float, t_next: float) -> Tensor:
        """Take one step."""
        dt, h, node = t_next - t, abs(t_next - t), part_way(t, t_next, 0.75)
        g, g_next = math.sqrt(run.plan[t]), math.sqrt(run.plan[t_next])
        first, second = run.normal(x, 2 * number), run.normal(x, 2 * number + 1)
        half, rest = 0.5 * math.sqrt(h), math.sqrt(h / 12)  # J/h = half·z₁ + rest·z₂, I = 2·half·z₁
        start = run.predict(x, t)
        stage = run.ahead(x, start, t, velocity=0.75 * dt, score=0.375 * run.plan[t] * h)
        stage = run.add(run.add(stage, first, 1.5 * g_next * half), second, 1.5 * g_next * rest)
        x = run.combine(x, start, t, velocity=dt / 3, score=run.plan[t] * h / 6)
        x = run.combine(x, run.predict(stage, node), node, velocity=2 * dt / 3, score=run.plan[node] * h / 3)
        return run.add(run.add(x, first, (g + g_next) * half), second, (g - g_next) * rest)

"""Second-order steps by the learned acceleration."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from pathline.core.flow import BaseFlow
from pathline.plugins.deepflow.flows import AcceleratedPrediction, accelerated, check_branch
from pathline.solvers import register
from pathline.solvers.base import FixedStep, Run, Solution
from pathline.solvers.grids import GridSpec

__all__ = ["Taylor"]


@register("taylor")
class Taylor(FixedStep):
    """x ← x + Δt·v + ½Δt²·a: Taylor's second-order step by the acceleration that a DeepFlow backbone has learned.

    Order 2 where a = Dv/Dt = ∂v/∂t + (v·∇)v, which the objective's term ``material`` trains; the paper's term trains
    the step to data, another quantity. One network call a step, the end is not evaluated. Guidance acts on the
    acceleration by the formula that it has for velocities. At a scale w of classifier-free guidance the guided flow's
    own one has w(w − 1)·(d·∇)d more, d the difference of the two velocities: with a scale other than 1 the order is 1.

    Args:
        steps: number of steps N ≥ 1.
        branch: whose acceleration; None takes the branch before the one whose velocity is read, or the first where that
            one is read.
        grid: see ``FixedStep``.
        start: see ``Solver``.
        end: see ``Solver``.

    Raises:
        InputError: a branch below 1; in a solve, a flow without accelerations.
    """

    order = 2
    calls_per_step = 1
    evaluates_end = False

    def __init__(
        self, steps: int, *, branch: int | None = None, grid: GridSpec = "uniform", start: float = 1.0, end: float = 0.0
    ) -> None:
        super().__init__(steps, grid=grid, start=start, end=end)
        self.branch = None if branch is None else check_branch("acceleration of branch", branch)

    def solve(self, flow: BaseFlow, x: Tensor, **keywords: Any) -> Solution:
        """See ``Solver``; the flow is made to tell its acceleration first."""
        return super().solve(accelerated(flow, self.branch) if isinstance(flow, BaseFlow) else flow, x, **keywords)

    def check(self, flow: BaseFlow, x: Tensor, increments: Tensor | None) -> None:
        """See ``Solver``; also that the flow has accelerations."""
        super().check(accelerated(flow, self.branch), x, increments)

    def step(self, run: Run, x: Tensor, number: int, t: float, t_next: float) -> Tensor:
        """Take one step."""
        dt, prediction = t_next - t, cast("AcceleratedPrediction", run.predict(x, t))
        return run.add(run.combine(x, prediction, t, velocity=dt), prediction.acceleration, 0.5 * dt * dt)

"""Methods for the SDE dx = [v − ½·g²·score]dt + g dW, run from noise to data; its marginals are those of the ODE."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from pathline.core.draws import Draws
from pathline.core.errors import InputError, OpenEndError
from pathline.core.flow import BaseFlow
from pathline.solvers import diffusions
from pathline.solvers.base import FixedStep, Run, registry
from pathline.solvers.diffusions import DiffusionSpec
from pathline.solvers.grids import GridSpec

__all__ = ["EulerMaruyama"]

LastStep = Literal["mean", "tweedie"]


@registry.register("euler-maruyama")
class EulerMaruyama(FixedStep):
    """The Euler–Maruyama method: x ← x + drift·Δt + g·√|Δt|·z, one network call a step, the end is not evaluated.

    Its defaults are the sampler of the published DeepFlow and REPA numbers: the grid ``paper``, g² = 2t, and a last
    step without noise. From data to noise the drift is v + ½·g²·score.

    Args:
        steps: number of steps N ≥ 1; N − 1 of them draw noise. 250 in the papers.
        diffusion: g(t): a name, ``{"name": …, **options}`` or an instance.
        last_step: ``mean``, x + drift·Δt, or ``tweedie``, the expected data given x, for solves that end at t = 0.
            Mean is biased unless g vanishes at data.
        grid: see ``FixedStep``.
        start: see ``Solver``.
        end: see ``Solver``.
    """

    order = 1
    calls_per_step = 1
    evaluates_end = False
    needs = ("velocity", "score")

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
        super().__init__(steps, grid=grid, start=start, end=end)
        self.diffusion = diffusions.build(diffusion)
        if last_step not in ("mean", "tweedie"):
            raise InputError(f"got last_step {last_step!r}, expected 'mean' or 'tweedie'")
        if last_step == "tweedie" and self.end != 0:
            raise InputError(f"got last_step 'tweedie' for a solve that ends at {self.end:g}; it needs end=0")
        self.last_step = last_step

    def check(self, flow: BaseFlow, x: Tensor, increments: Tensor | None) -> None:
        """Check also that g is finite at every time that is evaluated, on the flow's path."""
        super().check(flow, x, increments)
        missing = {*self.times[:-1]} & {*self.diffusion.open_ends(flow.interpolant)}
        if missing:
            raise OpenEndError(
                f"got a grid that evaluates t = {min(missing):g}, where the diffusion {type(self.diffusion).__name__} "
                f"is infinite on the {type(flow.interpolant).__name__} path; keep start and end away from it"
            )

    def increments_shape(self, x: Tensor) -> tuple[int, ...]:
        """Return (steps − 1, N, *S): the last step draws none."""
        return (self.steps - 1, *x.shape)

    def step(self, run: Run, x: Tensor, number: int, t: float, t_next: float) -> Tensor:
        """Take one step."""
        prediction, dt = run.predict(x, t), t_next - t
        last = number == self.steps - 1
        if last and self.last_step == "tweedie":
            return prediction.data
        squared = float(self.diffusion.squared(torch.tensor(t, dtype=torch.float64), run.flow.interpolant))
        score = prediction.score
        x = x.add_(prediction.velocity, alpha=dt).add_(score, alpha=0.5 * squared * abs(dt))
        return x if last else x.add_(self._normal(run, x, number), alpha=math.sqrt(squared * abs(dt)))

    def _normal(self, run: Run, x: Tensor, number: int) -> Tensor:
        if run.increments is not None:
            return run.increments[number].to(x)
        return Draws(run.seed).normal("increments", run.sample_ids, x.shape[1:], counter=number).to(x)

"""What every solver shares: the entry checks, and what happens when a solve fails.

N samples; S the shape of one sample. Times are float64 on the host; the state keeps the float type it came in.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pathline.core.draws import Draws
from pathline.core.errors import InputError, InputTypeError, OpenEndError, SolverError
from pathline.core.flow import BaseFlow
from pathline.core.registry import Registry
from pathline.interpolants.base import Kind
from pathline.solvers import grids
from pathline.solvers.grids import GridSpec
from pathline.solvers.run import Run, Solution

__all__ = ["FixedStep", "Run", "Solution", "Solver", "registry"]


class Solver(ABC):
    """Integrates a flow from ``start`` to ``end``.

    Args:
        start: first time, in [0, 1]; 1 (noise) by default.
        end: last time, in [0, 1]; 0 (data) by default. Either direction.

    Attributes:
        order: of convergence in the step length; for an SDE strong, with g a function of t alone.
        calls_per_step: network calls a step.
        evaluates_end: whether it calls the network at ``end``.
        needs: the quantities it asks a prediction for.
        adaptive: whether it chooses its steps by an error estimate.
        one_way: whether it runs from noise to data alone, ``end`` before ``start``.
    """

    order: float
    calls_per_step: int
    evaluates_end: bool
    needs: ClassVar[tuple[Kind, ...]] = ("velocity",)
    adaptive: ClassVar[bool] = False
    one_way: ClassVar[bool] = False

    def __init__(self, *, start: float = 1.0, end: float = 0.0) -> None:
        if not (0 <= start <= 1 and 0 <= end <= 1) or start == end:
            raise InputError(f"got start {start} and end {end}, expected two different times in [0, 1]")
        self.start, self.end = float(start), float(end)
        self._check_direction()

    def _check_direction(self) -> None:
        if self.one_way and self.end > self.start:
            raise InputError(
                f"got start {self.start:g} and end {self.end:g}, but {type(self).__name__} runs from noise to data; "
                "give an end below the start, or use 'heun', 'rk4' or 'dopri5'"
            )

    def reversed(self) -> Self:
        """Return this solver from ``end`` to ``start`` over the same steps: inversion, from data to noise.

        Raises:
            InputError: a method that runs one way alone.
        """
        other = copy.copy(self)
        other.start, other.end = self.end, self.start
        other._check_direction()
        return other

    def __call__(self, flow: BaseFlow, x: Tensor, **keywords: Any) -> Tensor:
        """Return the samples of ``solve``, (N, *S)."""
        return self.solve(flow, x, **keywords).x

    def solve(
        self,
        flow: BaseFlow,
        x: Tensor,
        *,
        seed: int | None = None,
        sample_ids: Sequence[int] | Tensor | None = None,
        increments: Tensor | None = None,
        trajectory: bool = False,
        progress: bool = False,
        gradients: bool = False,
        **conditions: Any,
    ) -> Solution:
        """Integrate.

        Args:
            flow: a ``Flow``, guided or not.
            x: the state at ``start``, (N, *S), float32 or float64; left as it is.
            seed: of the noise drawn on the way; None takes one from torch's generator.
            sample_ids: N ids that key the noise, so that a sample is the same in any batch; None means 0 … N − 1.
            increments: standard normal draws to use instead, (draws, N, *S); for checks on one Brownian path.
            trajectory: also return the state at every grid point.
            progress: show a progress bar.
            gradients: keep the graph, so that the result can be differentiated; memory then grows with every call.
            conditions: named tensors for the backbone, as ``label`` of shape (N,).

        Raises:
            InputError, InputTypeError: a state, condition or option that does not fit.
            OpenEndError: the path lacks what the solver needs at a time it evaluates.
            SolverError: the state became NaN or infinite; carries t, step and NFE.
        """
        if isinstance(x, Tensor) and x.dtype not in (torch.float32, torch.float64):
            raise InputTypeError(f"got a state of type {x.dtype}, expected float32 or float64; call x.float()")
        if not isinstance(flow, BaseFlow):
            raise InputTypeError(f"got a {type(flow).__name__}, expected a flow; use Flow(backbone, interpolant)")
        flow.check(x, conditions)
        ids = range(len(x)) if sample_ids is None else sample_ids
        if len(ids) != len(x):
            raise InputError(f"got {len(ids)} sample ids for {len(x)} samples; give one a sample")
        self.check(flow, x, increments)
        seed = Draws.from_torch().seed if seed is None else Draws(seed).seed
        run = Run(flow.begin(), conditions, seed, ids, increments, progress, gradients=gradients)
        run.states = [] if trajectory else None
        calls, blocks = flow.nfe, flow.block_evaluations
        with torch.set_grad_enabled(gradients):
            result = self.integrate(run, x.clone())
            if not bool(torch.isfinite(result).all()):
                self._explain(flow, run, x)
        spent = flow.block_evaluations
        return run.solution(result, flow.nfe - calls, None if spent is None or blocks is None else spent - blocks)

    @abstractmethod
    def integrate(self, run: Run, x: Tensor) -> Tensor:
        """Integrate ``x``, which may be written to, and return the last state; no checks in the loop."""

    def check(self, flow: BaseFlow, x: Tensor, increments: Tensor | None) -> None:
        """Check that solver, flow and increments fit one another, before any network call."""
        if self.adaptive and flow.remembers:
            raise InputError(
                f"got a flow that depends on earlier calls for {type(self).__name__}, which rejects steps; use a "
                "solver with given steps, or guidance without momentum"
            )
        for quantity in self.needs:
            missing = self.evaluated() & {*flow.open_ends(quantity)}
            if missing:
                raise OpenEndError(
                    f"got a solve that evaluates t = {min(missing):g}, where the {type(flow.interpolant).__name__} "
                    f"path has no {quantity} from a predicted {flow.predicts}; keep start and end away from it"
                )
        wanted = self.increments_shape(x)
        if increments is None:
            return
        if wanted is None:
            raise InputError(f"got increments for {type(self).__name__}, which draws no noise; leave them out")
        if tuple(increments.shape) != wanted:
            raise InputError(f"got increments of shape {tuple(increments.shape)}, expected {wanted}: (draws, N, *S)")

    def evaluated(self) -> set[float]:
        """Return the ends, and other times known beforehand, at which the network is called."""
        return {self.start, self.end} if self.evaluates_end else {self.start}

    def increments_shape(self, x: Tensor) -> tuple[int, ...] | None:
        """Shape of all normal draws of a solve, (draws, N, *S); None if it draws none."""
        return None

    def _explain(self, flow: BaseFlow, run: Run, x: Tensor) -> None:
        """Run again with a check at every step, and raise at the first that fails."""
        calls = flow.nfe
        careful = Run(flow.begin(), run.conditions, run.seed, run.sample_ids, run.increments, careful=True)
        self.integrate(careful, x.detach().clone())
        raise SolverError(
            "the result is NaN or infinite, but not when run again", t=self.end, step=0, nfe=flow.nfe - calls
        )


registry: Registry[Solver] = Registry("solver", "solvers", Solver)


class FixedStep(Solver):
    """A solver with a given number of steps.

    Args:
        steps: number of steps N ≥ 1; N steps are N steps.
        grid: where they lie: a name, ``{"name": …, **options}`` or an instance.
        start: see ``Solver``.
        end: see ``Solver``.
    """

    def __init__(self, steps: int, *, grid: GridSpec = "uniform", start: float = 1.0, end: float = 0.0) -> None:
        super().__init__(start=start, end=end)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise InputError(f"got steps {steps!r}, expected a whole number of 1 or more")
        self.steps = steps
        self.grid = grids.build(grid)
        self.times: list[float] = self._checked(self.grid.times(steps, self.start, self.end))

    def _checked(self, times: Tensor) -> list[float]:
        gaps = times.diff()
        monotone = bool((gaps > 0).all()) or bool((gaps < 0).all())
        ends = torch.tensor([self.start, self.end], dtype=torch.float64)
        fits = times.shape == (self.steps + 1,) and torch.allclose(times[[0, -1]], ends, rtol=0, atol=1e-9)
        if not fits or not monotone or times.min() < 0 or times.max() > 1:
            raise InputError(
                f"got a grid of {times.numel()} points that does not go from {self.start:g} to {self.end:g} in "
                f"{self.steps} strictly monotone steps within [0, 1]"
            )
        return [self.start, *times[1:-1].tolist(), self.end]

    @property
    def calls(self) -> int:
        """Network calls of a solve, a guided one on a doubled batch counted once."""
        return self.steps * self.calls_per_step

    def reversed(self) -> Self:
        """See ``Solver``."""
        other = super().reversed()
        other.times = self.times[::-1]
        return other

    def evaluated(self) -> set[float]:
        """See ``Solver``: the grid, its end only if it is evaluated."""
        return set(self.times if self.evaluates_end else self.times[:-1])

    def nodes(self) -> list[float]:
        """Return the times that steps look at: the grid, and those inside of steps."""
        return self.times

    def integrate(self, run: Run, x: Tensor) -> Tensor:
        """Walk over the grid with ``step``."""
        run.prepare(self.nodes())
        run.visit(x, self.times[0], 0)
        watched = run.careful or run.states is not None
        for number, t, t_next in run.steps(self.times):
            x = self.step(run, x, number, t, t_next)
            if watched:
                run.visit(x, t_next, number)
        return x

    @abstractmethod
    def step(self, run: Run, x: Tensor, number: int, t: float, t_next: float) -> Tensor:
        """Advance ``x``, in place if possible, from ``t`` to ``t_next``."""

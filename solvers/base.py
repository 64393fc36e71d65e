"""What every solver shares: the entry checks, the result, and what happens when a solve fails.

N samples; S the shape of one sample. Times are float64 on the host; the state keeps the float type it came in.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pathline.core.draws import Draws
from pathline.core.errors import InputError, InputTypeError, OpenEndError, SolverError
from pathline.core.flow import BaseFlow, Prediction
from pathline.core.registry import Registry
from pathline.interpolants.base import Coefficients, Kind
from pathline.solvers import grids
from pathline.solvers.grids import GridSpec

__all__ = ["FixedStep", "Run", "Solution", "Solver", "registry"]


@dataclass(frozen=True)
class Solution:
    """The result of a solve, with its evidence.

    Attributes:
        x: samples, (N, *S).
        nfe: network calls; a guided call on a doubled batch is one.
        times: the times at which the network was called, float64, (nfe,); (nfe, N) from a solver that gives each sample
            times of its own.
        seed: of the noise drawn on the way; the same whether the solver draws any or not.
        trajectory: states at the grid points, both ends included, (steps + 1, N, *S); None unless asked for.
    """

    x: Tensor
    nfe: int
    times: Tensor
    seed: int
    trajectory: Tensor | None = None


@dataclass
class Run:
    """One solve under way: the flow, its conditions, and what is recorded.

    States are updated in place unless gradients are asked for, and no output of the network is kept over another call:
    a network may return the same buffer every time.
    """

    flow: BaseFlow
    conditions: dict[str, Any]
    seed: int
    sample_ids: Sequence[int] | Tensor
    increments: Tensor | None = None
    progress: bool = False
    careful: bool = False
    gradients: bool = False
    times: list[float | Tensor] = field(default_factory=list)
    states: list[Tensor] | None = None
    plan: Any = None
    _coefficients: dict[float, Coefficients] = field(default_factory=dict)
    _clock: dict[float, Tensor] = field(default_factory=dict)

    def predict(self, x: Tensor, t: float) -> Prediction:
        """Call the network once at one time for all samples."""
        self.times.append(t)
        time = self._clock.get(t)
        if time is None:
            time = torch.scalar_tensor(t, dtype=torch.float64)
        return self.flow.evaluate(x, time, self.conditions)

    def at(self, t: float) -> Coefficients:
        """Return the path's coefficients at t as numbers, computed once a solve."""
        if t not in self._coefficients:
            self.prepare([t])
        return self._coefficients[t]

    def prepare(self, times: Sequence[float]) -> None:
        """Compute the coefficients of many times at once."""
        clock = torch.tensor(times, dtype=torch.float64)
        self._clock.update(zip(times, clock.unbind(), strict=True))
        table = self.flow.interpolant.evaluate(clock)
        rows = zip(*(values.tolist() for values in table), strict=True)
        self._coefficients.update(zip(times, (Coefficients(*row) for row in rows), strict=True))

    def combine(self, x: Tensor, prediction: Prediction, t: float, keep: float = 1.0, **weights: float) -> Tensor:
        """Return keep·x + Σ weight·quantity of a prediction, in place: two operations where it is one value.

        Args:
            x: a state; in most uses the one at which ``prediction`` was made, at time ``t``.
            keep: weight of x itself.
            weights: as ``velocity=dt`` or ``score=…``.
        """
        if prediction.single and [*weights] == [prediction.kind]:
            return self.add(self.scale(x, keep), prediction.value, weights[prediction.kind])
        terms = {cast("Kind", kind): weight for kind, weight in weights.items() if weight}
        form = prediction.affine(terms, lambda: self.at(t))
        if form is None:
            parts = [(getattr(prediction, kind), weight) for kind, weight in terms.items()]
            x = self.scale(x, keep)
            for value, weight in parts:
                x = self.add(x, value, weight)
            return x
        if prediction.x is x:
            x = self.scale(x, keep + form[0])
        else:
            x = self.scale(x, keep)
            x = self.add(x, prediction.x, form[0]) if form[0] else x
        return self.add(x, prediction.value, form[1])

    def ahead(self, x: Tensor, prediction: Prediction, t: float, **weights: float) -> Tensor:
        """Return x + Σ weight·quantity in memory of its own; x stays as it is."""
        if prediction.single and [*weights] == [prediction.kind]:
            return x.add(prediction.value, alpha=weights[prediction.kind])
        return self.combine(x.clone(), prediction, t, **weights)

    def quantity(self, prediction: Prediction, t: float, kind: Kind) -> Tensor:
        """Return one quantity of a prediction in memory of its own."""
        form = prediction.affine({kind: 1.0}, lambda: self.at(t))
        if form is None:
            return cast(Tensor, getattr(prediction, kind)).clone()
        if form[0] == 0:
            return prediction.value.mul(form[1])
        return prediction.x.mul(form[0]).add_(prediction.value, alpha=form[1])

    def scale(self, x: Tensor, factor: float) -> Tensor:
        """Return factor·x, in place."""
        if factor == 1:
            return x
        return x.mul(factor) if self.gradients else x.mul_(factor)

    def add(self, x: Tensor, value: Tensor, weight: float) -> Tensor:
        """Return x + weight·value, in place."""
        return x.add(value, alpha=weight) if self.gradients else x.add_(value, alpha=weight)

    def normal(self, x: Tensor, number: int) -> Tensor:
        """Return standard normal draw ``number`` of the solve, of x's shape and type, to be read alone."""
        if self.increments is not None:
            draw = self.increments[number]
            return draw if draw.dtype == x.dtype and draw.device == x.device else draw.to(x)
        return Draws(self.seed).normal("increments", self.sample_ids, x.shape[1:], counter=number).to(x)

    def steps(self, grid: Sequence[float]) -> Iterator[tuple[int, float, float]]:
        """Walk over (number, start, end) of each step of a grid."""
        pairs: Iterable[tuple[float, float]] = pairwise(grid)
        if self.progress:
            pairs = tqdm(pairs, total=len(grid) - 1, desc="solving", unit="step")
        for number, (t, t_next) in enumerate(pairs):
            yield number, t, t_next

    def visit(self, x: Tensor, t: float, number: int) -> None:
        """Record a state, and in a careful run raise SolverError where it stops being finite."""
        if self.states is not None:
            self.states.append(x.clone())
        if self.careful and not bool(torch.isfinite(x).all()):
            raise SolverError("the state became NaN or infinite", t=t, step=number, nfe=len(self.times))


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
        calls = flow.nfe
        with torch.set_grad_enabled(gradients):
            result = self.integrate(run, x.clone())
            if not bool(torch.isfinite(result).all()):
                self._explain(flow, run, x)
        states = None if run.states is None else torch.stack(run.states)
        return Solution(result, flow.nfe - calls, _stacked(run.times), seed, states)

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
        wanted = self.increments_shape(x)
        if increments is None:
            return
        if wanted is None:
            raise InputError(f"got increments for {type(self).__name__}, which draws no noise; leave them out")
        if tuple(increments.shape) != wanted:
            raise InputError(f"got increments of shape {tuple(increments.shape)}, expected {wanted}: (draws, N, *S)")

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


def _stacked(times: list[float | Tensor]) -> Tensor:
    if any(isinstance(t, Tensor) for t in times):
        return torch.stack([t.double().cpu() for t in times if isinstance(t, Tensor)])
    return torch.tensor(times, dtype=torch.float64)


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

    def check(self, flow: BaseFlow, x: Tensor, increments: Tensor | None) -> None:
        """Check that the path has what the solver needs at every time that it evaluates."""
        super().check(flow, x, increments)
        evaluated = set(self.times if self.evaluates_end else self.times[:-1])
        for quantity in self.needs:
            missing = evaluated & set(flow.open_ends(quantity))
            if missing:
                raise OpenEndError(
                    f"got a grid that evaluates t = {min(missing):g}, where the {type(flow.interpolant).__name__} path "
                    f"has no {quantity} from a predicted {flow.predicts}; keep start and end away from it"
                )

    def integrate(self, run: Run, x: Tensor) -> Tensor:
        """Walk over the grid with ``step``."""
        run.prepare(self.times)
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

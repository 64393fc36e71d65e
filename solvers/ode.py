"""The methods of torchdiffeq for the ODE dx/dt = v(x, t), with its edges hidden; the package is optional.

The library integrates upwards alone: going down it sees −t and −v. N samples; S the shape of one sample.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from pathline.core.checks import require
from pathline.core.errors import InputError, SolverError
from pathline.solvers.base import FixedStep, Solver, registry
from pathline.solvers.grids import GridSpec, part_way
from pathline.solvers.run import Run

__all__ = ["AdaptiveODE", "FixedODE", "Method", "ode_solver"]

Method = Literal["euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "dopri5", "bosh3", "dopri8"]


class _Fixed(NamedTuple):
    """A method of given steps: its order, and the parts of a step at which it calls the network."""

    order: int
    nodes: tuple[float, ...]


_FIXED = {
    "euler": _Fixed(1, (0,)),
    "midpoint": _Fixed(2, (0, 1 / 2)),
    "heun2": _Fixed(2, (0, 1)),
    "heun3": _Fixed(3, (0, 1 / 3, 2 / 3)),
    "rk4": _Fixed(4, (0, 1 / 3, 2 / 3, 1)),
    "explicit_adams": _Fixed(4, (0, 1 / 3, 2 / 3, 1)),  # those of its first two steps, which are steps of rk4
}
_ADAPTIVE = {"dopri5": (5, 6), "bosh3": (3, 3), "dopri8": (8, 13)}  # order, network calls a step


@registry.register("ode")
def ode_solver(
    method: Method = "dopri5",
    *,
    steps: int | None = None,
    grid: GridSpec | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    max_nfe: int | None = None,
    per_sample: bool | None = None,
    start: float = 1.0,
    end: float = 0.0,
) -> Solver:
    """Build a solver that runs torchdiffeq (``pip install 'pathline[solvers]'``).

    Args:
        method: of given steps: ``euler``, ``midpoint``, ``heun2`` (our ``heun``), ``heun3`` (Heun's method of order 3),
            ``rk4`` (the 3/8 rule, not the classic one), ``explicit_adams`` (of order 4, on equal steps); adaptive:
            ``dopri5``, ``bosh3``, ``dopri8``.
        steps: number of steps, for a method of given steps, which needs it.
        grid: where they lie, likewise; None means ``uniform``.
        rtol: relative tolerance of a step, for an adaptive method; None means 1e-5.
        atol: absolute tolerance, likewise; None means 1e-5.
        max_nfe: network calls after which an adaptive solve gives up; None means 10,000.
        per_sample: whether a step's error, for an adaptive method, is that of the worst sample, so that no sample is
            solved less exactly for its company; False takes the mean over the batch. None means True. Steps are shared
            in either case: samples of different batches agree within the tolerances alone.
        start: see ``Solver``.
        end: see ``Solver``.

    Raises:
        InputError: an unknown method, or an option that the method would ignore.
        MissingPackageError: torchdiffeq is not installed.
    """
    if method not in get_args(Method):
        raise InputError(f"got method {method!r}, expected one of {', '.join(get_args(Method))}")
    stepped = {"steps": steps, "grid": grid}
    controlled = {"rtol": rtol, "atol": atol, "max_nfe": max_nfe, "per_sample": per_sample}
    for option, value in (controlled if method in _FIXED else stepped).items():
        if value is not None:
            kind, others = ("given steps", _ADAPTIVE) if method in _FIXED else ("steps of its own choice", _FIXED)
            raise InputError(
                f"got {option} for the method {method!r}, which takes {kind} and ignores it; leave it out, or use one "
                f"of {', '.join(others)}"
            )
    if method not in _FIXED:
        chosen = {option: value for option, value in controlled.items() if value is not None}
        return AdaptiveODE(method, **cast("dict[str, Any]", chosen), start=start, end=end)
    if steps is None:
        raise InputError(f"got no steps for the method {method!r}, which takes given steps; give steps=…")
    return FixedODE(method, steps, grid=grid or "uniform", start=start, end=end)


class FixedODE(FixedStep):
    """A method of torchdiffeq with given steps.

    The network is called at the times of our grid, never at those of the library, which are rounded to the state's
    precision. ``explicit_adams`` makes one call a step after two steps of ``rk4``, of four calls each.

    Args:
        method: see ``ode_solver``.
        steps: see ``FixedStep``.
        grid: see ``FixedStep``.
        start: see ``Solver``.
        end: see ``Solver``.

    Raises:
        InputError: ``explicit_adams`` on unequal steps, for which its weights are wrong.
        MissingPackageError: torchdiffeq is not installed.
    """

    def __init__(
        self, method: str, steps: int, *, grid: GridSpec = "uniform", start: float = 1.0, end: float = 0.0
    ) -> None:
        super().__init__(steps, grid=grid, start=start, end=end)
        self._odeint = require("torchdiffeq", "solvers").odeint
        self.method, (self.order, self._nodes) = method, _FIXED[method]
        self._multistep = method == "explicit_adams"
        self.calls_per_step = 1 if self._multistep else len(self._nodes)
        self.evaluates_end = 1 in self._nodes and not (self._multistep and steps > 2)
        lengths = [abs(t_next - t) for t, t_next in pairwise(self.times)]
        if self._multistep and max(lengths) - min(lengths) > 1e-9:
            raise InputError(
                f"got steps of length {min(lengths):g} to {max(lengths):g} for the method 'explicit_adams', expected "
                "equal ones; use the grid 'uniform', or the solver 'ab3', which fits any grid"
            )

    @property
    def calls(self) -> int:
        """See ``FixedStep``."""
        return sum(len(self._parts(number)) for number in range(self.steps))

    def _parts(self, number: int) -> tuple[float, ...]:
        return self._nodes[:1] if self._multistep and number > 1 else self._nodes

    def integrate(self, run: Run, x: Tensor) -> Tensor:
        """Hand the grid to the library, which calls back before every step."""
        drift = _GridDrift(self, run)
        grid = drift.sign * torch.tensor(self.times, dtype=torch.float64)
        options: dict[str, Any] = {"grid_constructor": lambda *_: grid}
        if self._multistep:
            options["max_order"] = 5  # its default diverges
        ends = grid[[0, -1]].to(x.device)
        result = self._odeint(drift, x, ends, rtol=0.0, atol=0.0, method=self.method, options=options)[-1].clone()
        return drift.finish(result)

    def step(self, run: Run, x: Tensor, number: int, t: float, t_next: float) -> Tensor:
        """Not there: the library walks over the grid by itself."""
        raise NotImplementedError("a method of torchdiffeq takes no single steps; call solve")


class _GridDrift:
    """What the library integrates over a grid: ±v(x, ±t) at times of our own, in the order of its calls."""

    def __init__(self, solver: FixedODE, run: Run) -> None:
        self.run, self.end, self.number = run, solver.end, 0
        self.sign = math.copysign(1.0, solver.end - solver.start)
        pairs = enumerate(pairwise(solver.times))
        times = [part_way(t, t_next, part) for number, (t, t_next) in pairs for part in solver._parts(number)]
        run.prepare(times)
        self._times, self._steps = iter(times), run.steps(solver.times)

    def callback_step(self, s: Tensor, x: Tensor, ds: Tensor) -> None:
        """Take note of the state at the beginning of a step."""
        number, t, _ = next(self._steps)
        self.run.visit(x, t, self.number)
        self.number = number

    def __call__(self, s: Tensor, x: Tensor) -> Tensor:
        """Call the network."""
        t = next(self._times)
        return self.run.weighted(self.run.predict(x, t), t, velocity=self.sign)

    def finish(self, x: Tensor) -> Tensor:
        """Take note of the last state, and close the progress bar."""
        next(self._steps, None)
        self.run.visit(x, self.end, self.number)
        return x


class AdaptiveODE(Solver):
    """An adaptive method of torchdiffeq. Its last step lands on ``end``; no call lies outside [start, end].

    Two calls to begin, then ``calls_per_step`` for each step, accepted or not; both ends are evaluated. The trajectory
    holds both ends. Times reach the network in the state's precision.

    Args:
        method: ``dopri5``, ``bosh3`` or ``dopri8``.
        rtol: see ``ode_solver``.
        atol: see ``ode_solver``.
        max_nfe: see ``ode_solver``.
        per_sample: see ``ode_solver``.
        start: see ``Solver``.
        end: see ``Solver``.

    Raises:
        InputError: an option out of range.
        MissingPackageError: torchdiffeq is not installed.
        SolverError: in a solve: the network returns NaN, the budget is spent, or the step length vanishes.
    """

    evaluates_end = True
    adaptive = True

    def __init__(
        self,
        method: str,
        *,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        max_nfe: int = 10_000,
        per_sample: bool = True,
        start: float = 1.0,
        end: float = 0.0,
    ) -> None:
        super().__init__(start=start, end=end)
        self._odeint = require("torchdiffeq", "solvers").odeint
        self.method, (self.order, self.calls_per_step) = method, _ADAPTIVE[method]
        for name, value in (("rtol", rtol), ("atol", atol)):
            if not 0 < value < math.inf:
                raise InputError(f"got {name} {value}, expected a finite number above 0")
        if max_nfe < self.calls_per_step + 2:
            raise InputError(f"got max_nfe {max_nfe}, expected {self.calls_per_step + 2} or more: one step of {method}")
        self.rtol, self.atol, self.max_nfe, self.per_sample = float(rtol), float(atol), max_nfe, per_sample

    @property
    def calls(self) -> None:
        """Network calls of a solve: not known beforehand."""
        return None

    def integrate(self, run: Run, x: Tensor) -> Tensor:
        """Hand both ends to the library, the last as a time on which a step must land."""
        run.visit(x, self.start, 0)
        if not x.numel():
            return x
        drift = _GuardedDrift(self, run, torch.finfo(x.dtype).eps)
        ends = drift.sign * torch.tensor([self.start, self.end], dtype=torch.float64).to(x.device)
        options = {"step_t": ends[1:], "norm": _worst if self.per_sample else _mean}
        self._odeint(drift, x, ends, rtol=self.rtol, atol=self.atol, method=self.method, options=options)
        run.visit(drift.latest, self.end, drift.step)
        return drift.latest


class _GuardedDrift:
    """What the library integrates by steps of its own choice: ±v(x, ±t), watched where it cannot be trusted to.

    Its own guards are assertions, which ``python -O`` removes: without them a NaN never ends.

    Attributes:
        latest: the state of the latest call. In all three methods the last stage of a step is its result; what the
            library returns is a polynomial through it, which rounding moves by more than 1e-6 in float32.
        step: number of the step under way.
    """

    latest: Tensor

    def __init__(self, solver: AdaptiveODE, run: Run, eps: float) -> None:
        self.solver, self.run, self.eps, self.step = solver, run, eps, -1
        self.sign = math.copysign(1.0, solver.end - solver.start)
        self._bounds = sorted((solver.start, solver.end))

    def callback_step(self, s: Tensor, x: Tensor, ds: Tensor) -> None:
        """Give up before a step that does not advance, or from a state that is not finite."""
        self.step += 1
        if not float(s + ds) > float(s):
            raise self._failed("the step length vanishes: the velocity has a jump or a pole there", float(s))
        if not bool(torch.isfinite(x).all()):
            raise self._failed("the state became NaN or infinite", float(s))

    def __call__(self, s: Tensor, x: Tensor) -> Tensor:
        """Call the network, if the budget allows it."""
        if len(self.run.times) >= self.solver.max_nfe:
            budget = f"the budget of {self.solver.max_nfe} network calls is spent; raise max_nfe, rtol or atol"
            raise self._failed(budget, float(s))
        t, self.latest = self._time(float(s)), x
        slope = self.run.weighted(self.run.predict(x, t), t, velocity=self.sign)
        if not bool(torch.isfinite(slope).all()):
            raise self._failed("the network returned NaN or infinite values", float(s))
        return slope

    def _time(self, s: float) -> float:
        """Return the time to which the library's belongs: it comes rounded, nudged off the ends, or beyond them."""
        t = self.sign * s
        for end in self._bounds:
            if abs(t - end) <= self.eps:
                return end
        return min(max(t, self._bounds[0]), self._bounds[1])

    def _failed(self, message: str, s: float) -> SolverError:
        return SolverError(
            f"{message} (method {self.solver.method})", t=self._time(s), step=max(self.step, 0), nfe=len(self.run.times)
        )


def _rows(error: Tensor) -> Tensor:
    """Root mean square of each sample, (N,), in float64: squares do not overflow. Step lengths carry no gradient."""
    rows = error.detach().reshape(len(error), -1)
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return lengths / math.sqrt(rows.shape[1])


def _worst(error: Tensor) -> Tensor:
    return _rows(error).max()


def _mean(error: Tensor) -> Tensor:
    return _rows(error).square().mean().sqrt()

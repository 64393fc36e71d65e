"""An adaptive method with an error norm, a step length and a clock of each sample's own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pathline.core.errors import InputError, SolverError
from pathline.interpolants.base import broadcast
from pathline.solvers.base import Run, Solver, registry

__all__ = ["DormandPrince"]

# Dormand and Prince, J. Comput. Appl. Math. 6 (1980), Table 2
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 5.0  # as Hairer, Nørsett, Wanner, Solving ODEs I, II.4, but 5 for their 1.5 to 5
_SMALLEST = 1e-10  # of the whole interval


@registry.register("dopri5")
class DormandPrince(Solver):
    """Dormand and Prince's method of order 5 with an error estimate of order 4, for the ODE dx/dt = v(x, t).

    Every sample has steps of its own, so that none depends on the others of its batch, and lands on the end exactly; no
    call lies outside [start, end]. The batch goes on until its slowest sample has arrived. Two calls to begin, then six
    for each round of steps, accepted or not; both ends are evaluated.

    Args:
        rtol: relative tolerance of a step, above 0. 1e-5 suits networks in float32, whose rounding is near 1e-6.
        atol: absolute tolerance of a step, above 0.
        max_nfe: network calls after which a solve gives up.
        points: number of equal parts of the interval at whose ends each sample lands: ``trajectory`` holds points + 1
            states.
        start: see ``Solver``.
        end: see ``Solver``.

    Raises:
        InputError: an option out of range.
        SolverError: in a solve: the budget is spent, or a step length vanishes, as where the network returns NaN.
    """

    order = 5
    calls_per_step = 6
    evaluates_end = True
    adaptive = True

    def __init__(
        self,
        *,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        max_nfe: int = 10_000,
        points: int = 1,
        start: float = 1.0,
        end: float = 0.0,
    ) -> None:
        super().__init__(start=start, end=end)
        for name, value in (("rtol", rtol), ("atol", atol)):
            if not 0 < value < math.inf:
                raise InputError(f"got {name} {value}, expected a finite number above 0")
        if max_nfe < 8 or points < 1:
            raise InputError(
                f"got max_nfe {max_nfe} and points {points}, expected 8 or more calls and 1 or more points"
            )
        self.rtol, self.atol, self.max_nfe, self.points = float(rtol), float(atol), max_nfe, points

    def integrate(self, run: Run, x: Tensor) -> Tensor:
        """Land on one point after the other."""
        run.visit(x, self.start, 0)
        if not len(x):
            return x
        marks = torch.linspace(self.start, self.end, self.points + 1, dtype=torch.float64).tolist()
        state = _State.begin(self, run, x)
        for number, _, mark in run.steps([*marks[:-1], self.end]):
            while state.advance(self, run, mark):
                pass
            run.visit(state.x, mark, number)
        return state.x


class _State:
    """Where each sample is: state x, time t, slope at x, and the length of its next step."""

    def __init__(self, x: Tensor, t: Tensor, slope: Tensor, length: Tensor) -> None:
        self.x, self.t, self.slope, self.length, self.rounds = x, t, slope, length, 0

    @classmethod
    def begin(cls, solver: DormandPrince, run: Run, x: Tensor) -> _State:
        """Choose the first step as Hairer, Nørsett and Wanner do (II.4, "starting step size")."""
        t = torch.full((len(x),), solver.start, dtype=torch.float64, device=x.device)
        span, sign = abs(solver.end - solver.start), math.copysign(1.0, solver.end - solver.start)
        slope = _velocity(run, x, t).clone()
        scale = solver.atol + solver.rtol * x.abs()
        size, speed = _norm(x / scale), _norm(slope / scale)
        first = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed).clamp(max=span)
        ahead = x + broadcast(first * sign, x).to(x) * slope
        bend = _norm((_velocity(run, ahead, t + sign * first) - slope) / scale) / first
        largest = torch.maximum(speed, bend)
        second = torch.where(largest <= 1e-15, (first * 1e-3).clamp(min=1e-6), (0.01 / largest) ** (1 / 5))
        return cls(x, t, slope, torch.minimum(100 * first, second).clamp(_SMALLEST * span, span))

    def advance(self, solver: DormandPrince, run: Run, mark: float) -> bool:
        """Try one step of each sample towards ``mark``; return whether one has not arrived."""
        left = (mark - self.t).abs()
        step = torch.minimum(self.length, left)
        lands = self.length >= left * (1 - 1e-12)
        signed = torch.where(lands, mark - self.t, math.copysign(1.0, solver.end - solver.start) * step)
        self._check(solver, run, step, left)
        ahead, slope, error = self._stages(run, signed)
        scale = torch.maximum(self.x.abs(), ahead.abs()).mul_(solver.rtol).add_(solver.atol)
        ratio = _norm(error.div_(scale))
        ratio = torch.where(ratio.isfinite(), ratio, math.inf)
        accepted = ratio <= 1
        if not bool(accepted.all()):
            wide = broadcast(accepted, self.x)
            ahead, slope = torch.where(wide, ahead, self.x), torch.where(wide, slope, self.slope)
        self.x, self.slope = ahead, slope
        self.t = torch.where(accepted, torch.where(lands, mark, self.t + signed), self.t)
        factor = (_SAFETY * ratio.clamp(min=1e-10) ** (-1 / 5)).clamp(_SHRINK, _GROW)
        factor = torch.where(accepted, factor.clamp(min=1.0), factor.clamp(max=1.0))
        # a step cut short by its mark says nothing against the longer one
        grown = torch.where(accepted & lands, torch.maximum(self.length, step * factor), step * factor)
        self.length = torch.where(left > 0, grown, self.length)
        self.rounds += 1
        return bool((self.t != mark).any())

    def _stages(self, run: Run, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the state of order 5 after ``step``, the slope there, and the error estimate."""
        h, ahead, slope = broadcast(step, self.x).to(self.x), self.x, self.slope
        moves = [slope * h]  # each in memory of its own: a network may return one buffer every time
        for node, row in zip(_NODES, _STAGES, strict=True):
            ahead = _added(self.x.add(moves[0], alpha=row[0]), moves[1:], row[1:])
            slope = _velocity(run, ahead, self.t + node * step)
            moves.append(slope * h)
        return ahead, slope.clone(), _added(moves[0] * _ERROR[0], moves[1:], _ERROR[1:])

    def _check(self, solver: DormandPrince, run: Run, step: Tensor, left: Tensor) -> None:
        """Give up before a round that the budget or the smallest step forbids."""
        nfe = len(run.times)
        if nfe + 6 > solver.max_nfe:
            raise SolverError(
                f"the budget of {solver.max_nfe} network calls is spent; raise max_nfe, rtol or atol",
                t=float(self.t[int(left.argmax())]),
                step=self.rounds,
                nfe=nfe,
            )
        tiny = (step < _SMALLEST * abs(solver.end - solver.start)) & (left > step)
        broken = tiny | ~step.isfinite()
        if bool(broken.any()):
            worst = int(broken.nonzero()[0])
            raise SolverError(
                f"the step length of sample {worst} of the batch vanishes: the network returns NaN, or its velocity "
                "has a jump or a pole there",
                t=float(self.t[worst]),
                step=self.rounds,
                nfe=nfe,
            )


def _velocity(run: Run, x: Tensor, t: Tensor) -> Tensor:
    """Call the network at times (N,)."""
    run.times.append(t)
    return run.flow.evaluate(x, t, run.conditions).velocity


def _added(total: Tensor, values: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    """Add Σ weight·value to ``total``, in place."""
    for value, weight in zip(values, weights, strict=True):
        if weight:
            total = total.add_(value, alpha=weight)
    return total


def _norm(x: Tensor) -> Tensor:
    """Root mean square over all but the first dimension, (N,), float64. Step lengths carry no gradient."""
    rows = x.detach().reshape(len(x), -1)
    size: Tensor = torch.linalg.vector_norm(rows, dim=1).double()
    return size / math.sqrt(max(1, rows.shape[1]))

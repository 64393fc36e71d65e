"""Multistep methods: the order of a Runge–Kutta method for one network call a step, from the calls before.

s and t are the times at the beginning and the end of a step, λ = ln(α/σ) is half of the log-SNR, and h = λ_t − λ_s.
Where λ is infinite, at pure noise or at data, a step has order 1.
"""

from __future__ import annotations

import math
from collections import deque
from functools import lru_cache
from typing import ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from pathline.core.errors import InputError
from pathline.interpolants.base import Coefficients
from pathline.solvers.base import FixedStep, Run, registry
from pathline.solvers.grids import GridSpec, part_way

__all__ = ["AdamsBashforth2", "AdamsBashforth3", "DPMSolver", "UniPC"]


class Node(NamedTuple):
    """An earlier time of a solve and what the network said there, in memory of its own."""

    t: float
    value: Tensor


class _AdamsBashforth(FixedStep):
    """x ← x + ∫ p(τ)dτ over the step, p the polynomial through the last velocities; weights fit any grid."""

    calls_per_step = 1
    evaluates_end = False
    terms: ClassVar[int]

    def integrate(self, run: Run, x: Tensor) -> Tensor:
        """Walk over the grid with a history of velocities."""
        run.plan = deque(maxlen=self.terms)
        return super().integrate(run, x)

    def step(self, run: Run, x: Tensor, number: int, t: float, t_next: float) -> Tensor:
        """Take one step with as many velocities as there are."""
        run.plan.append(Node(t, run.weighted(run.predict(x, t), t, velocity=1.0)))
        weights = _weights([node.t for node in run.plan], t, t_next)
        for node, weight in zip(run.plan, weights, strict=True):
            x = run.add(x, node.value, weight)
        return x


@registry.register("ab2")
class AdamsBashforth2(_AdamsBashforth):
    """The two-step Adams–Bashforth method on any grid, begun by a step of Euler's. Order 2, one network call a step.

    On equal steps x ← x + Δt·(3/2·v − 1/2·v₋₁). The end is not evaluated.
    """

    order = 2
    terms = 2


@registry.register("ab3")
class AdamsBashforth3(_AdamsBashforth):
    """The three-step Adams–Bashforth method on any grid. Order 3, one network call a step and one more for the first.

    On equal steps x ← x + Δt·(23·v − 16·v₋₁ + 5·v₋₂)/12. It begins by a midpoint and a two-step step, whose errors are
    of third order. The end is not evaluated.
    """

    order = 3
    terms = 3

    @property
    def calls(self) -> int:
        """See ``FixedStep``: one more than steps."""
        return self.steps + 1

    def step(self, run: Run, x: Tensor, number: int, t: float, t_next: float) -> Tensor:
        """Take one step; the first by the midpoint rule."""
        if number:
            return super().step(run, x, number, t, t_next)
        velocity, middle = run.weighted(run.predict(x, t), t, velocity=1.0), part_way(t, t_next, 0.5)
        run.plan.append(Node(t, velocity))
        half = x.add(velocity, alpha=middle - t)
        return run.combine(x, run.predict(half, middle), middle, velocity=t_next - t)


class _ExponentialMultistep(FixedStep):
    """A multistep method in λ for the expected data, exact for data that do not change over a step."""

    calls_per_step = 1
    evaluates_end = False
    needs = ("data",)

    one_way = True


def _half_log_snr(at: Coefficients) -> float:
    if at.alpha <= 1e-12 or at.sigma <= 0:  # cos(π/2) is 6e-17
        return math.copysign(math.inf, float(at.alpha) - float(at.sigma))
    return math.log(at.alpha) - math.log(at.sigma)


@registry.register("dpm++", aliases=("dpm-solver++",))
class DPMSolver(_ExponentialMultistep):
    """DPM-Solver++(2M) (arXiv:2211.01095, Algorithm 2) on any path of data and noise.

    x_t = (σ_t/σ_s)·x_s + (α_t − α_s·σ_t/σ_s)·D, with D the expected data at s, from the second step on extrapolated to
    the middle of the step in λ: D + (h/2h₋₁)·(D − D₋₁). Order 2, one network call a step, the end is not evaluated.
    """

    order = 2

    def integrate(self, run: Run, x: Tensor) -> Tensor:
        """Walk over the grid, remembering one prediction."""
        run.plan = deque(maxlen=1)
        return super().integrate(run, x)

    def step(self, run: Run, x: Tensor, number: int, t: float, t_next: float) -> Tensor:
        """Take one step."""
        data = run.weighted(run.predict(x, t), t, data=1.0)
        now, there = run.at(t), run.at(t_next)
        ratio = float(there.sigma / now.sigma)
        weight = float(there.alpha - now.alpha * ratio)
        half = self._extrapolation(run, now, there)
        x = run.add(run.scale(x, ratio), data, weight * (1 + half))
        if half:
            x = run.add(x, run.plan[0].value, -weight * half)
        run.plan.append(Node(t, data))
        return x

    @staticmethod
    def _extrapolation(run: Run, now: Coefficients, there: Coefficients) -> float:
        """Return h/(2·h₋₁); 0 where there is no earlier prediction or one of the two is infinite."""
        if not run.plan:
            return 0.0
        first, second, third = (_half_log_snr(at) for at in (run.at(run.plan[0].t), now, there))
        return (third - second) / (2 * (second - first)) if math.isfinite(third - first) else 0.0


@registry.register("unipc")
class UniPC(_ExponentialMultistep):
    """UniPC-p in its variant B₂ (arXiv:2302.04867, Algorithms 5 to 8) on any path of data and noise.

    Predictor: x_t = (σ_t/σ_s)·x_s + (α_t − α_s·σ_t/σ_s)·(D + Σ ρ_k·(D_k − D)/r_k), with D_k the expected data at
    earlier times and r_k = (λ_k − λ_s)/h. The next call also corrects the state that it was made at, by a term in its
    own expected data, before it is used again; the last state alone is not corrected. One network call a step, the end
    is not evaluated. A single weight ρ is ½, as in the authors' program.

    Args:
        steps: see ``FixedStep``.
        order: p, 1 to 3; 2 by default, the authors' advice for guided sampling. Between times of finite λ errors fall
            with order 2 for p = 1 and 3 for p = 2 and 3, whose first steps have fewer terms; with order 2 from pure
            noise or to data.
        grid: see ``FixedStep``.
        start: see ``Solver``.
        end: see ``Solver``; before ``start``.
    """

    def __init__(
        self, steps: int, *, order: int = 2, grid: GridSpec = "uniform", start: float = 1.0, end: float = 0.0
    ) -> None:
        super().__init__(steps, grid=grid, start=start, end=end)
        if order not in (1, 2, 3):
            raise InputError(f"got order {order!r}, expected 1, 2 or 3")
        self.terms, self.order = order, min(order + 1, 3)

    def integrate(self, run: Run, x: Tensor) -> Tensor:
        """Walk over the grid, remembering predictions and the last corrected state."""
        run.plan = _History(deque(maxlen=self.terms), deque(maxlen=1))
        return super().integrate(run, x)

    def step(self, run: Run, x: Tensor, number: int, t: float, t_next: float) -> Tensor:
        """Correct the state at the beginning of the step, and predict that at its end."""
        nodes, states = run.plan
        data = run.weighted(run.predict(x, t), t, data=1.0)
        if states:
            x = self._advance(run, states[0].value, nodes, t, data)
        nodes.append(Node(t, data))
        states.append(Node(t, x.clone()))
        return self._advance(run, x, nodes, t_next, None)

    def _advance(self, run: Run, x: Tensor, nodes: deque[Node], t: float, ahead: Tensor | None) -> Tensor:
        """Step from the last node to t; ``ahead``, the expected data there, makes the predictor a corrector."""
        last, now, there = nodes[-1], run.at(nodes[-1].t), run.at(t)
        ratio = float(there.sigma / now.sigma)
        weight = float(there.alpha - now.alpha * ratio)
        first, h = _half_log_snr(now), _half_log_snr(there) - _half_log_snr(now)
        finite = math.isfinite(h)
        earlier = [n for n in [*nodes][-2::-1] if finite and math.isfinite(_half_log_snr(run.at(n.t)))]
        places = tuple((_half_log_snr(run.at(node.t)) - first) / h for node in earlier)
        rho = _unified_weights(h, places, ahead is not None)
        values = [node.value for node in earlier] + ([] if ahead is None else [ahead])
        shares = [weight * w / r for w, r in zip(rho, (*places, 1.0), strict=False)]
        x = run.add(run.scale(x, ratio), last.value, weight - sum(shares))
        for value, share in zip(values, shares, strict=True):
            x = run.add(x, value, share)
        return x


class _History(NamedTuple):
    nodes: deque[Node]
    states: deque[Node]


@lru_cache(maxsize=4096)
def _unified_weights(h: float, places: tuple[float, ...], corrector: bool) -> list[float]:
    """Return ρ of the earlier nodes at ``places`` in units of h, and of the node at the end for a corrector.

    They solve Σ_k ρ_k·r_k^{i−1} = i!·h^i·φ_{i+1}(h)/B(h), i = 1 … n, B(h) = e^h − 1, in data prediction with −h for h.
    """
    points = [*places, 1.0] if corrector else [*places]
    if len(points) == 1:
        return [0.5]
    if not points:
        return []
    z, rows, right, factorial = -h, [], [], 1.0
    phi = math.expm1(z) / z - 1
    for i in range(len(points)):
        rows.append([r**i for r in points])
        right.append(phi * factorial / math.expm1(z))
        factorial *= i + 2
        phi = phi / z - 1 / factorial
    return [float(w) for w in np.linalg.solve(np.array(rows), np.array(right))]


def _weights(nodes: list[float], start: float, end: float) -> list[float]:
    """Return ∫ of each Lagrange polynomial of up to three ``nodes`` from start to end."""
    a, h = [node - start for node in nodes], end - start
    if len(a) == 1:
        return [h]
    weights = []
    for i, node in enumerate(a):
        others = a[:i] + a[i + 1 :]
        if len(others) == 1:
            integral = h**2 / 2 - others[0] * h
        else:
            integral = h**3 / 3 - sum(others) * h**2 / 2 + math.prod(others) * h
        weights.append(integral / math.prod(node - other for other in others))
    return weights

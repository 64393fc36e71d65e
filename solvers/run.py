"""A solve under way, and its result.

N samples; S the shape of one sample. Times are float64 on the host; the state keeps the float type it came in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pathline.core.draws import Draws
from pathline.core.errors import SolverError
from pathline.core.flow import BaseFlow, Prediction
from pathline.interpolants.base import Coefficients, Kind

__all__ = ["Run", "Solution"]


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
        block_evaluations: transformer blocks that these calls ran, one of a call on a doubled batch counted once; None
            if a network does not tell its ``depth``. What stands between blocks, as DeepFlow's VeRA, is not counted.
    """

    x: Tensor
    nfe: int
    times: Tensor
    seed: int
    trajectory: Tensor | None = None
    block_evaluations: int | None = None


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
    _scratch: Tensor | None = None

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
        if prediction.single and len(weights) == 1 and prediction.kind in weights:
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
        """Return x + Σ weight·quantity; x stays as it is, and the result does until the next call of this method."""
        if prediction.single and len(weights) == 1 and prediction.kind in weights:
            weight, room = weights[prediction.kind], None if self.gradients else self._scratch
            self._scratch = torch.add(x, prediction.value, alpha=weight, out=room)
            return self._scratch
        return self.combine(x.clone(), prediction, t, **weights)

    def weighted(self, prediction: Prediction, t: float, **weights: float) -> Tensor:
        """Return Σ weight·quantity of a prediction made at time t, in memory of its own."""
        terms = {cast("Kind", kind): weight for kind, weight in weights.items() if weight}
        form = prediction.affine(terms, lambda: self.at(t))
        if form is None:
            parts = [getattr(prediction, kind) * weight for kind, weight in terms.items()]
            return sum(parts[1:], start=cast(Tensor, parts[0]))
        total = prediction.value.mul(form[1])
        return total.add_(prediction.x, alpha=form[0]) if form[0] else total

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

    def solution(self, x: Tensor, nfe: int, block_evaluations: int | None = None) -> Solution:
        """Return the result with what was recorded."""
        states = None if self.states is None else torch.stack(self.states)
        if any(isinstance(t, Tensor) for t in self.times):
            times = torch.stack([t.double().cpu() for t in self.times if isinstance(t, Tensor)])
        else:
            times = torch.tensor(self.times, dtype=torch.float64)
        return Solution(x, nfe, times, self.seed, states, block_evaluations)
